"""secateur.pruner: masks through a training loop that stays as it is."""

import copy
import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError, MaskError, SecateurWarning, StateError
from tiny import batch, net, raw, same, train

SCORES = ["magnitude", "random", "taylor", "snip", "movement", "fisher"]


def at(schedule, step, model, final=0.8):
    from fractions import Fraction

    size = sc.weights(model).size
    return math.floor(schedule.sparsity(step, Fraction(str(final))) * size + Fraction(1, 2))


@pytest.mark.parametrize("kind", ["linear", "cubic", "geometric", "cosine"])
@pytest.mark.parametrize("score", [*SCORES, "synflow"])
def test_masks_only_shrink_and_counts_are_exact(score, kind):
    model = net()
    schedule = getattr(sc.schedules, kind)(2, 17, 4)
    chosen = sc.scores.synflow(model, torch.ones(1, 6)) if score == "synflow" else score
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    pruner = sc.Pruner(model, 0.8, schedule=schedule, score=chosen)
    pruner.attach(optimizer)
    last = pruner.masks

    def each(step):
        nonlocal last
        assert pruner.steps == step + 1
        assert pruner.masks & last == pruner.masks
        assert pruner.masks.pruned == at(schedule, step + 1, model)
        assert pruner.sparsity == pruner.masks.sparsity
        assert sc.check(model, pruner.masks) == {}
        last = pruner.masks

    train(model, optimizer, range(20), each)
    masks = pruner.finish()
    assert masks.sparsity == 0.8 == 72 / 90
    for name, weight in sc.weights(model).items():
        zeros = weight.detach()[~masks[name]]
        assert not zeros.view(torch.int32).any()  # +0.0


@pytest.mark.parametrize("allocation", ["uniform", "erk", "lamp"])
def test_every_allocation_through_a_schedule(allocation):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = sc.cubic(0, 10, 3)
    pruner = sc.Pruner(model, 0.8, schedule=schedule, allocation=allocation)
    pruner.attach(optimizer)
    seen = [pruner.masks]

    def each(step):
        assert pruner.masks & seen[-1] == pruner.masks
        assert pruner.masks.pruned == at(schedule, step + 1, model)
        seen.append(pruner.masks)

    train(model, optimizer, range(10), each)
    assert pruner.finish().pruned == 72


def test_a_sparsity_for_each_tensor_through_a_schedule():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, {"0": 0.9, "2.weight": 0.1}, schedule=sc.linear(0, 7, 2))
    pruner.attach(optimizer)
    train(model, optimizer, range(7))
    assert pruner.finish().counts() == {"0.weight": 54, "2.weight": 3}


def test_a_sparsity_for_one_tensor_leaves_the_other_dense():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, {"0": 0.5}, schedule=sc.linear(1, 5))
    pruner.attach(optimizer)
    train(model, optimizer, range(5))
    pruner.finish()
    assert model[0].weight.count_nonzero() == 30
    assert model[2].weight.all()


def test_a_count_through_a_schedule():
    model = net()
    pruner = sc.Pruner(model, sc.Count(41), schedule=sc.geometric(0, 5, 3))
    for _ in range(5):
        pruner.step()
    assert pruner.finish().pruned == 41


def test_one_shot_prunes_when_attached():
    model = net()
    pruner = sc.Pruner(model, 0.5)
    assert model[0].weight.all()
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert pruner.finish().pruned == 45
    assert pruner.steps == 0


def test_nothing_happens_before_the_start():
    model = net()
    with_pruner, without = copy.deepcopy(model), model
    a, b = (torch.optim.Adam(m.parameters(), lr=0.1) for m in (with_pruner, without))
    sc.Pruner(with_pruner, 0.5, schedule=sc.linear(6, 9)).attach(a)
    train(with_pruner, a, range(5))
    train(without, b, range(5))
    assert same(with_pruner, without)


def test_a_function_as_schedule():
    model = net()
    pruner = sc.Pruner(model, 0.6, schedule=lambda step: min(0.2 * step, 0.6))
    counts = []
    for _ in range(4):
        pruner.step()
        counts.append(pruner.masks.pruned)
    assert counts == [18, 36, 54, 54]
    assert pruner.finish().sparsity == 0.6


def test_a_function_that_ends_elsewhere_does_not_finish():
    pruner = sc.Pruner(net(), 0.6, schedule=lambda step: 0.5)
    pruner.step()
    with pytest.raises(StateError, match="after 1 steps 45 weights are pruned, of the 54 asked for"):
        pruner.finish()


def test_a_falling_schedule_raises_and_leaves_the_masks():
    model = net()
    pruner = sc.Pruner(model, 0.5, schedule=lambda step: 0.5 if step < 3 else 0.4)
    pruner.step()
    pruner.step()
    masks, before = pruner.masks, raw(model)
    with pytest.raises(InputError, match=r"falls at step 3, from 45 pruned weights to 36.*must never fall"):
        pruner.step()
    assert pruner.masks == masks
    assert all(torch.equal(a, b) for a, b in zip(before, raw(model), strict=True))


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan, "0.5"])
def test_a_function_that_gives_no_sparsity(bad):
    with pytest.raises(InputError, match="sparsity is"):
        sc.Pruner(net(), 0.5, schedule=lambda step: bad).step()


def test_schedules_are_checked():
    with pytest.raises(InputError, match=r"needs its steps: sc\.cubic\(start=500"):
        sc.Pruner(net(), 0.5, schedule="cubic")
    with pytest.raises(InputTypeError, match="schedule is an int"):
        sc.Pruner(net(), 0.5, schedule=5)
    with pytest.raises(InputError, match="each tensor has its own"):
        sc.Pruner(net(), {"0": 0.5, "2": 0.2}, schedule=lambda step: 0.1)


# attach, detach, finish, undo


def test_attached_twice():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5)
    pruner.attach(optimizer)
    with pytest.raises(StateError, match=r"attached already.*detach\(\) first"):
        pruner.attach(optimizer)
    pruner.detach()
    pruner.attach(optimizer)
    pruner.detach()
    pruner.detach()


def test_step_while_attached():
    model = net()
    pruner = sc.Pruner(model, 0.5)
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(StateError, match=r"do not call step\(\)"):
        pruner.step()
    assert pruner.steps == 0


def test_detached_it_follows_no_longer_and_leaves_no_hook():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)
    pruner = sc.Pruner(model, 0.5)
    pruner.attach(optimizer)
    train(model, optimizer, range(2))
    pruner.detach()
    train(model, optimizer, range(2, 4))
    assert pruner.steps == 2
    assert sc.check(model, pruner.masks)
    assert (len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)) == hooks


def test_attach_wants_optimizers_that_hold_the_weights():
    model = net()
    with pytest.raises(InputError, match=r"2\.weight is in scope and trainable, but in none of these optimizers"):
        sc.Pruner(model, 0.5).attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(InputTypeError, match=r"str is not a torch\.optim\.Optimizer"):
        sc.Pruner(model, 0.5).attach("sgd")
    assert model[0].weight.all()
    assert model[2].weight.all()
    model[2].weight.requires_grad_(False)
    sc.Pruner(model, 0.5).attach(torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_finish_early():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 10))
    pruner.attach(optimizer)
    train(model, optimizer, range(4))
    with pytest.raises(StateError, match=r"after 4 steps 18 weights are pruned, of the 45.*linear\(start=0, stop=10"):
        pruner.finish()
    train(model, optimizer, range(4, 10))
    assert pruner.finish().pruned == 45
    train(model, optimizer, range(1))  # followed no longer
    assert pruner.steps == 10


def test_finish_names_tensors_whose_zeros_came_back():
    model = net()
    pruner = sc.Pruner(model, 0.5)
    pruner.step()
    with torch.no_grad():
        model[2].weight.fill_(1)
    back = pruner.masks.counts()["2.weight"]
    with pytest.raises(MaskError, match=rf"2\.weight \({back}\).*sc\.remask\(model, pruner\.masks\)"):
        pruner.finish()
    sc.remask(model, pruner.masks)
    assert pruner.finish().pruned == 45


def test_undo_is_bit_exact_and_begins_again():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before = copy.deepcopy(model)
    pruner = sc.Pruner(model, 0.5)
    pruner.snapshot()
    pruner.step()
    first = pruner.masks
    assert not same(model, before)
    pruner.undo()
    assert same(model, before)
    assert pruner.steps == 0
    assert pruner.masks.pruned == 0
    pruner.step()
    assert pruner.masks == first


def test_undo_detaches():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5)
    pruner.snapshot()
    pruner.attach(optimizer)
    pruner.undo()
    train(model, optimizer, range(1))
    assert pruner.steps == 0
    assert model[0].weight.all()


def test_undo_without_a_snapshot():
    with pytest.raises(StateError, match=r"call snapshot\(\) before pruning"):
        sc.Pruner(net(), 0.5).undo()


# what goes wrong in the middle


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_at_a_change_of_the_masks(bad):
    model = net()
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 5))
    pruner.step()
    masks = pruner.masks
    with torch.no_grad():
        model[2].weight[masks["2.weight"]] = bad
    before = raw(model)
    with pytest.raises(InputError, match=r"2\.weight holds"):
        pruner.step()
    assert pruner.masks == masks
    assert all(torch.equal(a, b) for a, b in zip(before, raw(model), strict=True))


def test_nan_under_the_mask_becomes_zero_when_the_masks_stay():
    model = net()
    pruner = sc.Pruner(model, 0.5)
    pruner.step()
    with torch.no_grad():
        model[0].weight[~pruner.masks["0.weight"]] = math.nan
    pruner.step()
    assert sc.check(model, pruner.masks) == {}


def test_a_gradient_score_without_gradients():
    pruner = sc.Pruner(net(), 0.5, score="taylor")
    with pytest.raises(StateError, match=r"seen no gradient of 0\.weight"):
        pruner.step()
    assert pruner.masks.pruned == 0


def test_observe_feeds_a_loop_without_attach():
    models = net(), net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    pruners = [sc.Pruner(m, 0.5, schedule=sc.linear(0, 6, 3), score="taylor") for m in models]
    pruners[0].attach(optimizers[0])
    train(models[0], optimizers[0], range(6))
    for step in range(6):
        x, y = batch(step)
        optimizers[1].zero_grad()
        nn.functional.cross_entropy(models[1](x), y).backward()
        pruners[1].observe()
        optimizers[1].step()
        pruners[1].step()
    assert pruners[0].finish() == pruners[1].finish()
    assert same(*models)


def test_taylor_forgets_at_a_change_and_movement_does_not():
    sums = {}
    for score in ("taylor", "movement"):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        chosen = getattr(sc.scores, score)()
        sc.Pruner(model, 0.5, schedule=sc.linear(0, 6, 3), score=chosen).attach(optimizer)
        train(model, optimizer, range(3))
        sums[score] = len(chosen.sums)
    assert sums == {"taylor": 0, "movement": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_moves_to_another_dtype_in_between(dtype):
    model = net()
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 4))
    for _ in range(2):
        pruner.step()
    before = pruner.masks
    model.to(dtype)
    for _ in range(2):
        pruner.step()
    assert pruner.masks & before == pruner.masks
    assert pruner.finish().pruned == 72
    assert model[0].weight.dtype == dtype


def test_memory_is_one_bit_a_weight():
    model = nn.Sequential(nn.Linear(1000, 333), nn.Linear(333, 77))
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 4))
    for _ in range(4):
        held = sum(pruner.masks.packed(name).untyped_storage().nbytes() for name in pruner.masks)
        assert held <= (333_000 + 77 * 333) / 8 + 2
        pruner.step()


def test_zeros_that_are_there_already_count():
    model = net()
    with torch.no_grad():
        model[0].weight[:5] = 0
    zeros = int((model[0].weight == 0).sum())
    masks = sc.prune(model, 0.5)
    assert zeros == 30
    assert masks.pruned == 45
    assert not masks["0.weight"][:5].any()
    assert sum(int((w == 0).sum()) for w in sc.weights(model).values()) == 45


def test_the_model_is_itself_before_during_and_after():
    model = net()
    keys, who = list(model.state_dict()), [id(p) for p in model.parameters()]
    where = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters())
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 3))
    pruner.attach(optimizer)
    train(model, optimizer, range(3))
    pruner.finish()
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == who
    assert [p.data_ptr() for p in model.parameters()] == where
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_zeros_beyond_what_was_asked_are_told():
    model = nn.Linear(100, 10)
    sc.prune(model, 0.9)
    with pytest.warns(SecateurWarning, match=r"the masks keep 600 weights whose value is zero.*Masks\.from_zeros"):
        masks = sc.prune(model, 0.3)
    assert masks.pruned == 300
    assert int((model.weight == 0).sum()) == 900


@pytest.mark.parametrize(
    ("pattern", "loose", "remedy"),
    [
        ("rows", 56, r"from_zeros\(.*higher sparsity"),
        ("2x2", 48, r"from_zeros\(.*higher sparsity"),
        ("2:4", 48, r"from_zeros\(sc\.weights\(model\)\)$"),  # this pattern allows no higher one
    ],
)
def test_zeros_beyond_what_a_pattern_asks_are_told(pattern, loose, remedy):
    model = nn.Linear(8, 16)
    with torch.no_grad():
        model.weight.fill_(1.0)[:, 1:] = 0.0
    with pytest.warns(SecateurWarning, match=rf"the masks keep {loose} weights whose value is zero.*{remedy}"):
        assert sc.prune(model, 0.5, pattern=pattern).pruned == 64


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": sc.allocation.global_(min_keep=0.2)},
        {"allocation": sc.allocation.uniform(min_keep=10)},
        {"pattern": "columns", "allocation": "uniform"},
    ],
)
def test_an_end_that_cannot_be_reached_is_refused_at_the_start(options):
    with pytest.raises(InputError, match=r"cannot be pruned: each tensor keeps at least .* ask for less, or allow"):
        sc.Pruner(net(), 0.95, schedule=sc.cubic(100, 1000), **options)


def test_a_schedule_that_goes_beyond_the_sparsity():
    pruner = sc.Pruner(net(), 0.5, schedule=lambda step: 0.2 * step)
    pruner.step()
    pruner.step()
    with pytest.raises(InputError, match="asked for at step 3, to 54 pruned weights in place of 45: let it end at"):
        pruner.step()
    assert pruner.steps == 2
    assert pruner.masks.pruned == 36


def test_a_step_that_fails_is_not_counted():
    failing = True

    def score(name, weight):
        if failing:
            raise ValueError("not now")
        return weight.abs()

    pruner = sc.Pruner(net(), 0.8, schedule=sc.linear(0, 4, every=2), score=score)
    pruner.step()
    with pytest.raises(ValueError, match="not now"):
        pruner.step()
    assert pruner.steps == 1
    failing = False
    pruner.step()
    assert (pruner.steps, pruner.masks.pruned) == (2, 36)


def test_a_step_whose_listener_fails_is_counted():
    pruner = sc.Pruner(net(), 0.8, schedule=sc.linear(0, 4))

    def fail(metrics):
        raise InputError("not me")

    pruner.on_update(fail)
    with pytest.raises(InputError, match="not me"):
        pruner.step()
    assert (pruner.steps, pruner.masks.pruned) == (1, 18)
