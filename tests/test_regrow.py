"""secateur.regrow: exact counts at every update, what grows begins at zero, all else as without it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import secateur as sc
from models import k
from processes import in_a_group
from secateur.errors import InputError, InputTypeError, PatternError, SecateurWarning, StateError
from tiny import batch, interrupted, net, same, train

pytestmark = pytest.mark.filterwarnings("ignore:.*they grew where no gradient comes")  # the model is tiny

WAYS = {"rigl": sc.regrow.rigl, "set": sc.regrow.set_}
SPARSE = {"score": "random", "allocation": "erk"}


def built(regrow, kind="Adam", **options):
    model = net()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, **({"momentum": 0.9} if kind == "SGD" else {}))
    return model, optimizer, sc.Pruner(model, 0.8, regrow=regrow, **{**SPARSE, **options})


def backward(model, step):
    x, y = batch(step)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


# what moves, and by how much


def by_hand(kind, weight, mask, gradient, count, generator):
    """Algorithm 1 with whole sorts: the mask after dropping and growing `count` weights."""
    magnitude = weight.abs().masked_fill(~mask, math.inf).flatten()
    kept = mask.flatten().clone()
    kept[magnitude.argsort(stable=True)[:count]] = False
    found = gradient.abs() if kind == "rigl" else torch.rand(weight.shape, generator=generator)
    order = found.flatten().masked_fill(kept, -math.inf).argsort(descending=True, stable=True)
    kept[order[:count]] = True
    return kept.view(mask.shape)


@pytest.mark.parametrize("kind", WAYS)
def test_an_update_is_that_of_the_paper(kind):
    model, optimizer, pruner = built(WAYS[kind](every=3, drop=0.9, stop=10, seed=7))
    pruner.attach(optimizer)
    generator = pruner._regrow.generator()
    for step in range(1, 13):
        before = dict(pruner.masks)
        values = {}

        def seen(optimizer, args, kwargs):  # after the step, before the pruner
            values.update({name: weight.detach().clone() for name, weight in sc.weights(model).items()})

        backward(model, step)
        gradients = {name: weight.grad.clone() for name, weight in sc.weights(model).items()}
        hook = optimizer.register_step_post_hook(seen)
        optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
        optimizer.step()
        hook.remove()
        for name, weight in sc.weights(model).items():
            expected = before[name]
            if step in (3, 6, 9):
                count = int(int(expected.sum()) * 0.9 / 2 * (1 + math.cos(math.pi * step / 10)))
                expected = by_hand(kind, values[name], expected, gradients[name], count, generator)
            assert torch.equal(pruner.masks[name], expected)
            always = expected & before[name]
            # what is dropped and grows at once keeps its value
            assert torch.equal(weight, values[name].masked_fill(~always, 0))
            if step in (3, 6, 9):
                for memory in ("exp_avg", "exp_avg_sq"):
                    assert not optimizer.state[weight][memory][~always].any()
                    assert optimizer.state[weight][memory][always].any()
    pruner.finish()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(2, 9), st.integers(0, 80), st.floats(0.01, 1), st.booleans(), st.integers(0, 9))
def test_counts_are_exact_whatever_the_numbers_are(rows, columns, percent, drop, ties, seed):
    torch.manual_seed(seed)
    model = nn.Linear(columns, rows)
    with torch.no_grad():
        model.weight.copy_(model.weight.sign() if ties else model.weight)
    pruner = sc.Pruner(model, percent / 100, score="random", regrow=sc.regrow.rigl(every=1, drop=drop, stop=5))
    for _ in range(5):
        model(torch.ones(2, columns)).sum().backward()  # equal gradients
        pruner.observe()
        pruner.step()
        assert pruner.masks.pruned == k(percent / 100, rows * columns)
        assert sc.check(model, pruner.masks) == {}


def test_ties_go_by_their_index():
    model = nn.Linear(6, 1, bias=False)
    nn.init.ones_(model.weight)
    pruner = sc.Pruner(model, 0.5, regrow=sc.regrow.rigl(every=2, drop=0.7, stop=1000))
    pruner.step()
    assert pruner.masks["weight"].tolist() == [[False, False, False, True, True, True]]
    model(torch.ones(1, 6)).sum().backward()
    pruner.observe()
    pruner.step()
    assert pruner.masks["weight"].tolist() == [[True, True, False, False, False, True]]
    assert model.weight.tolist() == [[0, 0, 0, 0, 0, 1]]


def test_the_padding_row_stays_and_frozen_tensors_stay():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4, padding_idx=0), "head": nn.Linear(4, 4)})
    model["head"].requires_grad_(False)
    scope = sc.weights(model, also=nn.Embedding)
    pruner = sc.Pruner(model, 0.5, scope=scope, score="random", allocation="uniform", regrow=WAYS["set"](1, 1.0, 9))
    optimizer = torch.optim.Adam(model["embed"].parameters(), lr=0.1)
    pruner.attach(optimizer)
    head = pruner.masks["head.weight"]
    for step in range(8):
        optimizer.zero_grad()
        model["head"](model["embed"](torch.arange(8))).square().sum().backward()
        before = pruner.masks["embed.weight"]
        optimizer.step()
        assert pruner.masks["embed.weight"][0].all()
        assert torch.equal(pruner.masks["head.weight"], head)
        assert step > 3 or not torch.equal(pruner.masks["embed.weight"], before)
    assert pruner.finish().pruned == 22


def test_it_goes_together_with_a_schedule():
    model, optimizer, pruner = built(
        WAYS["rigl"](every=2, stop=16), score="magnitude", schedule=sc.cubic(0, 12, every=4)
    )
    pruner.attach(optimizer)
    told = []
    pruner.on_update(told.append)
    train(model, optimizer, range(20), lambda step: sc.check(model, pruner.masks) == {} or pytest.fail("zeros"))
    assert [entry["pruning/step"] for entry in told if entry["pruning/step"] % 4 == 0] == [4, 8, 12]
    assert told[-1]["pruning/grown"] == pruner.metrics()["pruning/grown"] > 0
    assert pruner.finish().pruned == 72


def test_a_way_of_ones_own():
    @sc.regrow.regrowth("first", source="nobody 2026")
    def first(name, weight, gradient, generator):
        """The first ones."""
        return -torch.arange(weight.numel()).view(weight.shape)

    model, optimizer, pruner = built(first(every=1, drop=1.0, stop=100))
    pruner.attach(optimizer)
    count = int(pruner.masks["0.weight"].sum())
    train(model, optimizer, range(1))
    assert pruner.masks["0.weight"].flatten()[: count - 1].all()
    model, optimizer, pruner = built("first")
    assert pruner._regrow == sc.regrow.Regrowth("first")


# when, and which gradients


@pytest.mark.parametrize("kind", WAYS)
def test_a55_the_gradient_is_looked_at_on_update_steps_only(kind, monkeypatch):
    model, optimizer, pruner = built(WAYS[kind](every=5, drop=0.8, stop=12))
    pruner.attach(optimizer)
    looked = []
    gradients = sc.regrow.gradients
    monkeypatch.setattr(sc.regrow, "gradients", lambda seen: looked.append(pruner.steps + 1) or gradients(seen))
    train(model, optimizer, range(20), lambda step: pruner._gradients and pytest.fail("they are kept"))
    assert looked == [5, 10]
    pruner.finish()


@pytest.mark.parametrize("kind", ["SGD", "Adam", "LBFGS"])
def test_masked_gradients_and_closures(kind):
    """Masks of the gradients leave those of the update, and an optimizer that writes into them changes nothing."""
    found = []
    for masked in (False, True):
        model, _, pruner = built(WAYS["rigl"](every=2, stop=9))
        options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "foreach": True} if kind == "SGD" else {"lr": 0.05}
        optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
        pruner.attach(optimizer)
        for step in range(10):

            def closure(step=step, model=model, pruner=pruner, masked=masked):
                backward(model, step)
                if masked:
                    pruner.mask_gradients()
                return nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1])

            if kind != "LBFGS":
                closure()
            optimizer.step(*[closure] * (kind == "LBFGS"))
        assert pruner.metrics()["pruning/grown"] > 0
        found.append(pruner.finish())
    assert kind == "LBFGS" or found[0] == found[1]  # LBFGS itself goes another way without them


def test_a21_several_optimizers_that_are_cleared_one_by_one():
    model, optimizer, pruner = built(WAYS["rigl"](every=2, stop=9))
    pruner.attach(optimizer)
    again, _, other = built(WAYS["rigl"](every=2, stop=9))
    parts = [torch.optim.Adam(again[at].parameters(), lr=0.05) for at in (0, 2)]
    other.attach(*parts)
    for step in range(10):
        backward(model, step)
        optimizer.step()
        backward(again, step)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=step % 2 == 0)
    assert pruner.finish() == other.finish()
    assert same(model, again)


def test_a21_in_backward_and_by_hand():
    model, optimizer, pruner = built(WAYS["rigl"](every=2, stop=9))
    pruner.attach(optimizer)
    train(model, optimizer, range(10))

    again, _, inside = built(WAYS["rigl"](every=2, stop=9))
    each = {p: torch.optim.Adam([p], lr=0.05) for p in again.parameters()}
    for p in again.parameters():
        p.register_post_accumulate_grad_hook(lambda p: each[p].step() or each[p].zero_grad())
    inside.attach()
    for step in range(10):
        x, y = batch(step)
        nn.functional.cross_entropy(again(x), y).backward()
    assert inside.finish() == pruner.finish()
    assert same(model, again)

    third, its, by_hand = built(WAYS["rigl"](every=2, stop=9), kind="SGD")
    by_hand.step()
    for step in range(9):
        backward(third, step)
        by_hand.observe()
        its.step()
        by_hand.step()
    assert by_hand.metrics()["pruning/grown"] > 0
    by_hand.finish()


def test_by_hand_without_gradients():
    model, _, pruner = built(WAYS["rigl"](every=2, stop=9))
    pruner.step()
    masks = pruner.masks
    with pytest.raises(StateError, match=r"no gradient was seen at step 2.*call pruner\.observe\(\) after backward"):
        pruner.step()
    assert (pruner.steps, pruner.masks) == (1, masks)
    backward(model, 0)
    pruner.observe()
    pruner.step()
    assert pruner.masks != masks


def test_steps_that_grad_scaler_skips():
    model, optimizer, pruner = built(WAYS["rigl"](every=3, stop=10))
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    masks = []
    for step in range(12):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (math.inf if step == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        masks.append(pruner.masks)
    assert pruner.steps == 11
    assert masks[2] == masks[1] == masks[0] != masks[3]
    pruner.finish()


def test_a_fraction_of_the_training():
    _, optimizer, pruner = built(WAYS["rigl"](every=2))
    masks = pruner.masks
    with pytest.raises(InputError, match=r"stop=0\.75\) ends after a fraction.*call over\(total_steps\)"):
        pruner.attach(optimizer)
    with pytest.raises(InputError, match="call over"):
        pruner.step()
    assert (pruner.masks, pruner.steps) == (masks, 0)
    pruner.over(40)
    assert pruner._regrow == sc.regrow.rigl(every=2, stop=30)
    assert [step for step in range(40) if pruner._regrow.due(step)] == list(range(2, 30, 2))
    assert sc.regrow.rigl(every=2, stop=30).over(10**6).stop == 30


def test_a_training_that_ends_before_anything_moved():
    model, optimizer, pruner = built(WAYS["rigl"](every=50, stop=100))
    pruner.attach(optimizer)
    train(model, optimizer, range(10))
    with pytest.raises(StateError, match=r"after 10 steps no weight has grown.*train longer, give a smaller every"):
        pruner.finish()
    with pytest.raises(InputError, match=r"never moves a mask: give an every that is less than stop"):
        sc.regrow.rigl(every=50).over(60)


# NaN


@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_nan_at_an_update_skips_it_until_the_next(where):
    model, optimizer, pruner = built(WAYS["rigl"](every=2, drop=1.0, stop=9), kind="SGD")
    pruner.attach(optimizer)
    train(model, optimizer, range(2))
    masks = pruner.masks
    train(model, optimizer, range(1))
    backward(model, 3)
    active = pruner.masks["0.weight"].nonzero()[0]
    with torch.no_grad():
        (model[0].weight.grad if where == "gradient" else model[0].weight)[tuple(active)] = math.nan
    with pytest.warns(SecateurWarning, match=r"the masks were to change at step 4, and stay as they are: .*0\.weight"):
        optimizer.step()
    assert pruner.masks == masks
    assert pruner.steps == 4
    assert bool((model[0].weight[~masks["0.weight"]] == 0).all())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_()
            optimizer.state[parameter]["momentum_buffer"].nan_to_num_()
    train(model, optimizer, range(2))
    assert pruner.masks != masks
    pruner.finish()


def test_nan_by_hand_is_an_error():
    model, _, pruner = built(WAYS["rigl"](every=1, stop=9))
    pruner._regrow = sc.regrow.rigl(every=2, stop=9)
    pruner.step()
    backward(model, 0)
    model[2].weight.grad[0, 0] = math.inf
    pruner.observe()
    masks = pruner.masks
    with pytest.raises(InputError, match=r"the gradient of 2\.weight holds 0 NaN and 1 inf.*sound checkpoint"):
        pruner.step()
    assert (pruner.masks, pruner.steps) == (masks, 1)


# states


@pytest.mark.parametrize("stop", [2, 6, 11])
@pytest.mark.parametrize("kind", WAYS)
def test_a9_resume_is_bit_exact(kind, stop):
    def build():
        return built(WAYS[kind](every=3, stop=16), schedule=sc.linear(0, 10, every=2), score="taylor")

    model, optimizer, pruner = build()
    pruner.attach(optimizer)
    train(model, optimizer, range(20))
    (_, _, before), (second, two, after) = interrupted(build, stop, 20)
    assert after.finish() == pruner.finish() == before.finish()
    assert same(second, model)
    assert after.metrics() == pruner.metrics()
    for one, other in zip(model.parameters(), second.parameters(), strict=True):  # A8
        assert torch.equal(optimizer.state[one]["exp_avg"], two.state[other]["exp_avg"])


@pytest.mark.parametrize("kind", WAYS)
def test_undo_goes_back_and_the_same_comes_again(kind):
    model, _, pruner = built(WAYS[kind](every=2, stop=9))
    pruner.snapshot()
    start = model.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    found = []
    for _ in range(2):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner.attach(optimizer)
        train(model, optimizer, range(10))
        found.append((pruner.masks, pruner.metrics()))
        pruner.undo()
    assert found[0] == found[1]
    assert pruner.metrics()["pruning/grown"] == 0


def test_a_state_of_another_regrowth():
    _, _, pruner = built(WAYS["rigl"](every=2, stop=9))
    state = pruner.state_dict()
    for other in (None, WAYS["rigl"](every=3, stop=9), WAYS["set"](every=2, stop=9)):
        with pytest.raises(InputError, match=r"settings: regrow.* in the saved one, .*build this one with the same"):
            built(other)[2].load_state_dict(state)
    with pytest.raises(InputError, match=r"regrow .*build this one with the same"):
        pruner.load_state_dict(built(None)[2].state_dict())


@pytest.mark.parametrize(
    "bad", [None, 3, {}, {"grown": -1}, {"grown": True}, {"grown": 3}, {"grown": 3, "generator": 5}]
)
def test_a_damaged_state(bad):
    _, _, pruner = built(WAYS["set"](every=2, stop=9))
    before = pruner.state_dict()
    with pytest.raises(InputError, match=r"the saved pruner is damaged.*load an earlier checkpoint"):
        pruner.load_state_dict({**before, "steps": 3, "regrow": bad})
    assert repr(pruner.state_dict()) == repr(before)


# several processes, and the state of the process


def moves_alike(rank, expected):
    for kind, want in expected.items():
        model = net()
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.Adam(ddp.parameters(), lr=0.05)
        pruner = sc.Pruner(ddp, 0.8, regrow=WAYS[kind](every=2, stop=9), **SPARSE)
        pruner.attach(optimizer)
        for step in range(10):
            x, y = batch(2 * step + rank)
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x), y).backward()
            optimizer.step()
        masks = pruner.finish()
        assert masks.counts() == want
        packed = torch.cat([masks.packed(name) for name in masks])
        both = [torch.empty_like(packed) for _ in range(2)]
        torch.distributed.all_gather(both, packed)
        assert torch.equal(*both)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_the_masks_of_two_ranks_are_equal():
    in_a_group(2, moves_alike, {kind: sc.prune(net(), 0.8, **SPARSE).counts() for kind in WAYS})


@pytest.mark.parametrize("kind", WAYS)
def test_the_random_state_of_the_process_stays(kind):
    model, optimizer, pruner = built(WAYS[kind](every=1, stop=9))
    pruner.attach(optimizer)
    before = torch.get_rng_state()
    train(model, optimizer, range(9))
    assert torch.equal(torch.get_rng_state(), before)


# what is refused


def test_what_cannot_move():
    model = nn.Linear(8, 8)
    with pytest.raises(PatternError, match=r"would break the pattern n_m\(.*\): leave regrow out, or the pattern"):
        sc.Pruner(model, 0.5, pattern="2:4", regrow="rigl")
    with pytest.raises(InputError, match="held as they are: leave regrow out, or give a sparsity"):
        sc.Pruner(model, {"weight": torch.ones(8, 8, dtype=torch.bool)}, regrow="rigl")
    with pytest.raises(InputError, match=r"no regrowth named 'rig': choose set, rigl, .*@sc\.regrow\.regrowth"):
        sc.Pruner(model, 0.5, regrow="rig")
    with pytest.raises(InputTypeError, match=r"regrow is 3: give sc\.regrow\.rigl\(every=100\)"):
        sc.Pruner(model, 0.5, regrow=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 0.0}, "drop is 0.0: give a share of the active weights, above 0"),
        ({"drop": 1.5}, "drop is 1.5: give a share"),
        ({"drop": math.nan}, "drop is nan: give a share"),
        ({"stop": 1.5}, "stop is 1.5: give a fraction of the training, up to 1.0, or steps without a point"),
        ({"stop": 0.0}, "stop is 0.0: give a fraction"),
        ({"stop": 100}, r"rigl\(every=100, drop=0.3, stop=100\) never moves a mask: give an every"),
        ({"every": 0}, "every is 0: give a number of steps, 1 or more"),
        ({"seed": -1}, r"seed is -1: give a whole number below 2\*\*32, 0 or more"),
        ({"seed": 2**32}, r"seed is 4294967296: give a whole number below 2\*\*32"),
    ],
)
def test_numbers_that_mean_nothing(options, message):
    with pytest.raises(InputError, match=message):
        sc.regrow.rigl(**options)
