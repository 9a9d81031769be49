"""secateur.pruner: states saved, loaded, of other settings, and damaged."""

import copy
import io

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, SecateurWarning
from tiny import net, same, train

SCORES = ["magnitude", "random", "taylor", "snip", "movement", "fisher"]


def build(score, kind="Adam"):
    model = net()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05)
    pruner = sc.Pruner(model, 0.8, schedule=sc.cubic(3, 23, 4), score=score)
    return model, optimizer, pruner


@pytest.mark.parametrize("stop", [2, 11, 23])
@pytest.mark.parametrize("score", SCORES)
def test_resume_in_the_middle_is_bit_exact(score, stop):
    model, optimizer, pruner = build(score)
    pruner.attach(optimizer)
    train(model, optimizer, range(30))
    whole = pruner.finish()

    first, one, before = build(score)
    before.attach(one)
    train(first, one, range(stop))
    file = io.BytesIO()
    torch.save([first.state_dict(), one.state_dict(), before.state_dict()], file)
    train(first, one, range(stop, 30))  # what was saved is a copy

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, two, after = build(score)
    for thing, state in zip((second, two, after), saved, strict=True):
        thing.load_state_dict(state)
    assert after.steps == stop
    after.attach(two)
    train(second, two, range(stop, 30))
    assert after.finish() == whole == before.finish()
    assert same(second, model)
    assert same(first, model)


def test_resume_where_nan_held_the_masks():
    model, optimizer, pruner = build("taylor")
    pruner.attach(optimizer)
    train(model, optimizer, range(6))
    kept = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.warns(SecateurWarning, match="the masks were to change at step 7"):
        train(model, optimizer, range(6, 7))
    state = pruner.state_dict()
    again, other, more = build("taylor")
    again.load_state_dict(kept)  # somebody goes on from sound weights
    more.load_state_dict(state)
    more.attach(other)
    train(again, other, range(7, 30))
    assert more.finish().pruned == 72


def test_a_resume_without_the_weights_of_the_model_is_told_of():
    def go_on(model, state, steps):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        pruner = sc.Pruner(model, 0.75, schedule=sc.cubic(0, 4))
        if state is not None:
            pruner.load_state_dict(state)
        pruner.attach(optimizer)
        train(model, optimizer, steps)
        return pruner.state_dict()

    model = net()
    state = go_on(model, None, range(3))
    with pytest.warns(SecateurWarning, match="prunes are not zero: .* load the state of the model too"):
        go_on(net(), state, range(3, 4))
    go_on(model, state, range(3, 5))  # a warning is an error here


def test_state_dict_is_a_copy():
    _, _, pruner = build("magnitude")
    state = pruner.state_dict()
    for packed in state["bits"].values():
        packed.zero_()
    assert pruner.masks.pruned == 0
    pruner.load_state_dict(pruner.state_dict())
    assert pruner.masks.pruned == 0


def test_resume_with_another_scope_sparsity_or_schedule():
    state = sc.Pruner(net(), 0.5, schedule=sc.linear(0, 9)).state_dict()
    others = {
        r"another scope \(2\.weight\)": sc.Pruner(
            m := net(), 0.5, schedule=sc.linear(0, 9), scope=sc.weights(m, skip="2")
        ),
        r"sparsity\.0\.weight 0\.5 in the saved one, 0\.6 in this one.*build this one with the same": sc.Pruner(
            net(), 0.6, schedule=sc.linear(0, 9)
        ),
        r"schedule\.kind 'linear' in the saved one, 'cubic' in this": sc.Pruner(net(), 0.5, schedule=sc.cubic(0, 9)),
        r"schedule\.stop 9 in the saved one, 10 in this one": sc.Pruner(net(), 0.5, schedule=sc.linear(0, 10)),
    }
    for message, other in others.items():
        other.step()
        masks = other.masks
        with pytest.raises(InputError, match=message):
            other.load_state_dict(state)
        assert other.masks == masks
        assert other.steps == 1


def test_resume_with_a_sparsity_that_differs_in_the_eighth_digit():
    state = sc.Pruner(net(), 0.12345678).state_dict()
    with pytest.raises(InputError, match=r"0\.12345678 in the saved one.*build this one with the same"):
        sc.Pruner(net(), 0.12345679).load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("random", "magnitude"), ("magnitude", "random"), ("taylor", "magnitude")]
)
def test_resume_with_another_score(saved, loaded):
    """A resume would go on with other masks: an error that says so, before anything has changed."""
    _, _, before = build(saved)
    _, _, after = build(loaded)
    state = before.state_dict()
    state["steps"] = 3
    with pytest.raises(InputError, match=r"score|magnitude"):
        after.load_state_dict(state)
    assert after.steps == 0


@pytest.mark.parametrize("bad", [{}, {"version": 2}, {"version": 1}, {"0.weight": torch.ones(2)}])
def test_no_state_of_a_pruner(bad):
    with pytest.raises(InputError, match="not a state_dict of a Pruner"):
        sc.Pruner(net(), 0.5).load_state_dict(bad)


# damaged states


def gradients():
    model = net()
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 9), score="taylor")
    nn.functional.cross_entropy(model(torch.ones(2, 6)), torch.tensor([0, 1])).backward()
    pruner.observe()
    pruner.step()
    pruner.observe()
    return pruner


def drawn():
    pruner = sc.Pruner(net(), 0.8, schedule=sc.linear(0, 9), score="random")
    pruner.step()
    return pruner


JUNK = [None, -1, 5, 1.5, True, "x", [], [1], [-1], ["x"], [10**9], {}, {"0.weight": None}, {"other": torch.ones(3)}]
JUNK += [
    {"0.weight": tensor, "2.weight": torch.zeros(4, dtype=torch.uint8)}
    for tensor in (
        torch.zeros(8),  # of another dtype
        torch.zeros(7, dtype=torch.uint8),  # too short
        torch.zeros(8, 1, dtype=torch.uint8),
        torch.full((8,), 255, dtype=torch.uint8),  # with bits beyond the last weight
        torch.zeros(8, dtype=torch.uint8),  # sound, but not what the counts say
        torch.zeros(8, dtype=torch.uint8, device="meta"),
        torch.full((10, 6), float("nan")),
        torch.full((10, 6), float("inf")),
        torch.zeros(10, 6, dtype=torch.int64),
        torch.zeros(6, 10),
        torch.zeros(10, 6, device="meta"),
        torch.zeros(10, 6, dtype=torch.complex64),
        torch.zeros(8, dtype=torch.uint8).to_sparse(),
        torch.zeros(10, 6).to_sparse(),
    )
]
KEYS = ("version", "settings", "steps", "counts", "shapes", "bits", "sums", "generator")


@pytest.mark.parametrize("make", [gradients, drawn])
@pytest.mark.parametrize("key", KEYS)
def test_a_damaged_state_is_an_input_error_and_changes_nothing(make, key):
    state = make().state_dict()
    if key not in state:
        return
    broken = [{**state, key: value} for value in [*JUNK, torch.zeros(3), torch.zeros(3, dtype=torch.uint8)]]
    broken += [{name: value for name, value in state.items() if name != key}]
    for one in broken:
        if (key, repr(one.get(key))) in (("steps", "5"), ("sums", "{}")):  # sound, though another's
            continue
        pruner = make()
        before = pruner.state_dict()
        with pytest.raises(InputError, match=r"give what|load an earlier checkpoint|build this one"):
            pruner.load_state_dict(one)
        after = pruner.state_dict()
        assert repr(after) == repr(before)
    for one in (None, 5, [], "state"):
        with pytest.raises(InputError, match="give what"):
            make().load_state_dict(one)


@pytest.mark.parametrize("allocation", ["erk", "lamp", "global", sc.allocation.uniform(min_keep=0.1)])
def test_resume_with_another_allocation(allocation):
    state = sc.Pruner(net(), 0.5, allocation="uniform").state_dict()
    with pytest.raises(
        InputError,
        match=r"allocation\.(share|min_keep) .* in the saved one, .* in this one; build this one with the same",
    ):
        sc.Pruner(net(), 0.5, allocation=allocation).load_state_dict(state)


def test_states_of_the_first_versions_load():
    """Their settings were a sentence, which did not name the allocation."""
    pruner = sc.Pruner(net(), 0.5, schedule=sc.linear(0, 9))
    pruner.step()
    words = "sparsity 0.5 of 90; schedule linear(start=0, stop=9, every=1); score magnitude; pattern None"
    again = sc.Pruner(net(), 0.5, schedule=sc.linear(0, 9))
    again.load_state_dict({**pruner.state_dict(), "settings": words})
    assert (again.steps, again.masks) == (1, pruner.masks)
    with pytest.raises(
        InputError, match=r"sparsity 0\.5 of 90.* in the saved one, .*sparsity 0\.6 of 90.* in this one; build this one"
    ):
        sc.Pruner(net(), 0.6, schedule=sc.linear(0, 9)).load_state_dict({**pruner.state_dict(), "settings": words})


@pytest.mark.parametrize("steps", [10**12, 10**18, 2**80])
def test_more_steps_than_any_training_makes_are_damage(steps):
    pruner = sc.Pruner(net(), 0.5)
    pruner.step()
    with pytest.raises(InputError, match="not a whole number from 0 to 1,000,000,000,000; load an earlier checkpoint"):
        pruner.load_state_dict({**pruner.state_dict(), "steps": steps})
    assert pruner.steps == 1
