"""Schedules are absolute, end exactly on target, and go on after a resume as if nothing had happened."""

import io
import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur as sc
from models import MODELS, Mlp, Tagger, build, copies, k, same, train, zeros


def saved(*states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SCORES = {
    "magnitude": lambda: "magnitude",
    "random": lambda: sc.scores.random(4),
    "movement": lambda: "movement",
    "taylor": lambda: "taylor",
}


@pytest.mark.parametrize("score", SCORES)
def test_a09_resume_of_a_schedule(score):
    def start(seed):
        model = build(Mlp, seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003, weight_decay=0.01)
        pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(start=300, stop=470, every=7), score=SCORES[score]())
        return model, optimizer, pruner

    model, optimizer, pruner = start(0)
    pruner.attach(optimizer)
    train(model, optimizer, 437)
    assert 0 < pruner.sparsity < 0.9
    states = saved(model.state_dict(), optimizer.state_dict(), pruner.state_dict())
    train(model, optimizer, 43, first=437)
    masks = pruner.finish()

    again, its_optimizer, its_pruner = start(8)
    for one, state in zip((again, its_optimizer, its_pruner), states, strict=True):
        one.load_state_dict(state)
    assert its_pruner.steps == 437
    its_pruner.attach(its_optimizer)
    train(again, its_optimizer, 43, first=437)
    assert its_pruner.finish() == masks
    assert masks.pruned == k(0.9, masks.size) == zeros(sc.weights(again))
    assert same(copies(again), copies(model))
    assert same(its_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert same(its_pruner.state_dict(), pruner.state_dict())


def test_a09_attaching_before_loading_leaves_loaded_weights_alone():
    """Model and optimizer loaded, then attach, then the pruner's state: no weight may be lost on the way."""
    model = build(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5, score=sc.scores.random(4))
    pruner.attach(optimizer)
    train(model, optimizer, 3)
    states = saved(model.state_dict(), pruner.state_dict())

    again = build(Mlp, 8)
    again.load_state_dict(states[0])
    its_pruner = sc.Pruner(again, 0.5, score=sc.scores.random(5))
    try:
        its_pruner.attach(torch.optim.SGD(again.parameters(), lr=0.1))
        its_pruner.load_state_dict(states[1])
    except sc.errors.SecateurError:
        return  # refused: also well
    assert zeros(sc.weights(again)) == 170
    assert same(copies(again), copies(model))


def test_a10_iterative_amounts_by_prune():
    model = build(Tagger)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    size = sc.weights(model).size
    for i in range(1, 11):
        sparsity = Fraction(9 * i, 100)
        masks = sc.prune(model, sparsity, optimizer=optimizer)
        assert zeros(sc.weights(model)) == masks.pruned == k(sparsity, size)
        if i == 4:  # reloaded in a fresh model
            fresh = build(Tagger, seed=3)
            fresh.load_state_dict(saved(model.state_dict())[0])
            model, optimizer = fresh, torch.optim.Adam(fresh.parameters(), lr=0.01)
        if i == 7:  # trained freely: the zeros are gone
            train(model, optimizer, 2)
            assert zeros(sc.weights(model)) < size // 10
    assert masks.sparsity == pytest.approx(0.9, abs=0.5 / size)


@pytest.mark.parametrize(("final", "size"), [(0.9, 340), (0.7, 50), (0.3, 50), (0.6, 250)])
def test_a10_iterative_amounts_by_a_schedule(final, size):
    """After step i exactly k(i s / 10, N): s is a decimal number, as it is written."""
    model = torch.nn.Linear(size // 10, 10)
    pruner = sc.Pruner(model, final, schedule=sc.linear(0, 10))
    got = []
    for i in range(1, 11):
        pruner.step()
        got.append(int((model.weight == 0).sum()))
        with torch.no_grad():
            model.weight[model.weight != 0] += 0.01  # trained on
        if i == 5:  # removed and reloaded
            state, weights = saved(pruner.state_dict(), model.state_dict())
            model = torch.nn.Linear(size // 10, 10)
            model.load_state_dict(weights)
            pruner = sc.Pruner(model, final, schedule=sc.linear(0, 10))
            pruner.load_state_dict(state)
    assert got == [k(Fraction(str(final)) * i / 10, size) for i in range(1, 11)]
    pruner.finish()


@pytest.mark.parametrize("way", ["prune", "pruner"])
def test_a11_prune_and_finalize_in_a_loop(way):
    model = build(Tagger)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    size = sc.weights(model).size
    for i in range(1, 11):
        if way == "prune":
            masks = sc.prune(model, 0.05 * i, optimizer=optimizer)
        else:
            pruner = sc.Pruner(model, 0.05 * i)
            pruner.attach(optimizer)
            train(model, optimizer, 2, first=2 * i)
            masks = pruner.finish()
        assert masks.pruned == zeros(sc.weights(model)) == k(Fraction(i, 20), size)
        assert not optimizer._optimizer_step_post_hooks
    assert masks.pruned == k(0.5, size)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("when", ["once", "midway", "finished"])
def test_a33_undo(kind, when):
    model = build(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 1)
    before = copies({"w": model}["w"])
    pruner = sc.Pruner(model, 0.9, schedule="one_shot" if when == "once" else sc.linear(0, 4), allocation="uniform")
    pruner.snapshot()
    pruner.attach(optimizer)
    train(model, optimizer, {"once": 0, "midway": 2, "finished": 5}[when])
    if when == "finished":
        pruner.finish()
    assert zeros(sc.weights(model)) > 0
    pruner.undo()
    scope = sc.weights(model)
    assert all(same(w.detach(), before[n]) for n, w in scope.items())
    if when == "once":
        assert same(copies(model), before)
    assert (pruner.steps, pruner.sparsity, pruner.masks.pruned) == (0, 0, 0)
    train(model, optimizer, 2)  # free again
    assert zeros(scope) == 0


def test_a33_undo_begins_again_from_nothing():
    """The second run is the first one over again, also where a score adds up gradients."""

    def run(model, pruner):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pruner.attach(optimizer)
        train(model, optimizer, 3)
        return pruner.masks

    model = build(Mlp)
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(1, 10), score="movement")
    start = copies(model)
    pruner.snapshot()
    first = run(model, pruner)
    pruner.undo()
    model.load_state_dict(start)
    again = run(model, pruner)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a33_undo_without_snapshot():
    model = build(Mlp)
    with pytest.raises(sc.errors.StateError, match=r"snapshot\(\) before pruning"):
        sc.Pruner(model, 0.5).undo()


KINDS = ["linear", "cubic", "geometric", "cosine"]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 50),
    st.integers(0, 300),
    st.integers(1, 400),
    st.integers(0, 1000).map(lambda n: Fraction(n, 1000)),
)
def test_a65_every_schedule_ends_on_target(kind, start, length, every, final):
    schedule = getattr(sc.schedules, kind)(start, start + length, every)
    told = [schedule.sparsity(step, final) for step in range(start + length + 3)]
    assert told[start + length :] == [final] * 3
    assert all(value == 0 for value in told[:start])
    assert all(0 <= a <= b <= 1 for a, b in itertools.pairwise(told))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_a65_in_a_loop(kind, every):
    model = build(Mlp)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.9, schedule=getattr(sc.schedules, kind)(2, 19, every))
    pruner.attach(optimizer)
    train(model, optimizer, 10)
    with pytest.raises(sc.errors.StateError, match=r"after 10 steps.*of the 306 asked for.*earlier stop"):
        pruner.finish()
    train(model, optimizer, 9, first=10)
    assert zeros(sc.weights(model)) == 306
    pruner.finish()


def test_a65_in_epochs_and_by_a_function():
    model = build(Mlp)
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(0, 3, every=2).in_epochs(5))
    for _ in range(15):
        pruner.step()
    assert pruner.finish().pruned == 306
    model = build(Mlp)
    pruner = sc.Pruner(model, 0.9, schedule=lambda step: 0.9 if step >= 7 else 0.1)
    for _ in range(7):
        pruner.step()
    assert pruner.finish().pruned == zeros(sc.weights(model)) == 306
