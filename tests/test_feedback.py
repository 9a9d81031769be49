"""secateur.feedback: the papers' steps, exact counts, and a model that is sparse at any moment."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

import secateur as sc
from models import k
from secateur.errors import InputError, InputTypeError, PatternError, StateError
from tiny import batch, interrupted, net, same, train

WAYS = {
    "dpf": {"regrow": sc.feedback.dpf(every=3)},
    "sr_ste": {"regrow": sc.feedback.sr_ste(decay=0.01), "pattern": "2:5", "scope": None},
    "soft_movement": {"regrow": "soft_movement"},
    "str": {"regrow": sc.feedback.str_(every=2)},
}
SCHEDULE = sc.cubic(2, 12, every=2)


def built(way, kind="Adam", schedule=SCHEDULE, sparsity=0.8, **more):
    model = net()
    options = {**WAYS[way], **more}
    if way == "sr_ste":
        options["scope"], schedule, sparsity = sc.weights(model, only=["2"]), "one_shot", 0.6
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, **({"momentum": 0.9} if kind == "SGD" else {}))
    return model, optimizer, sc.Pruner(model, sparsity, schedule=schedule, **options)


def test_every_method_is_tried_here():
    assert set(WAYS) == set(sc.feedback.FEEDBACKS)


# ---- the papers --------------------------------------------------------------------------------------------------


class Through(torch.autograd.Function):
    """Masks a weight; the gradient goes straight through, with the decay of what is pruned."""

    @staticmethod
    def forward(ctx, weight, mask, decay):
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, gradient):
        weight, mask = ctx.saved_tensors
        return gradient + ctx.decay * (1 - mask) * weight, None, None


def two_of_five(weight):
    lowest = weight.abs().argsort(1)[:, :3]
    return torch.ones_like(weight).scatter_(1, lowest, 0)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_sr_ste_makes_the_steps_of_the_paper(kind):
    model = net().double()
    theirs = net().double()
    scope = sc.weights(model, only=["2"])
    pruner = sc.Pruner(model, 0.6, pattern="2:5", scope=scope, regrow=sc.feedback.sr_ste(decay=0.01))
    pattern = lambda w: torch.cat([two_of_five(part) for part in w.split(5, 1)], 1)  # noqa: E731
    options = {"lr": 0.05, **({"momentum": 0.9} if kind == "SGD" else {})}
    mine, other = (getattr(torch.optim, kind)(m.parameters(), **options) for m in (model, theirs))
    pruner.attach(mine)
    moved = 0
    mask = pattern(theirs[2].weight.detach())
    for step in range(30):
        x, y = batch(step)
        mine.zero_grad()
        nn.functional.cross_entropy(model(x.double()), y).backward()
        mine.step()
        other.zero_grad()
        hidden = torch.tanh(theirs[0](x.double()))
        shown = Through.apply(theirs[2].weight, mask, 0.01)
        nn.functional.cross_entropy(nn.functional.linear(hidden, shown, theirs[2].bias), y).backward()
        other.step()
        new = pattern(theirs[2].weight.detach())
        moved += int((new != mask).sum())
        mask = new
        assert torch.equal(pruner.masks["2.weight"], mask.bool())
        torch.testing.assert_close(model[2].weight, theirs[2].weight * mask)
        torch.testing.assert_close(model[0].weight, theirs[0].weight)
    assert moved
    assert pruner.finish().counts() == {"2.weight": 18}


def test_soft_movement_ranks_what_is_pruned_too_and_gives_it_back_as_it_was():
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(2, 6), regrow="soft_movement")
    pruner.attach(optimizer)
    dense, sums, back = model.weight.detach().clone(), torch.zeros(5, 6), 0
    stepped = []  # weights after the step of the optimizer, before the pruner shows and withholds
    hook = optimizer.register_step_post_hook(lambda *_: stepped.append(model.weight.detach().clone()))
    optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
    for step in range(40):
        x = torch.randn(8, 6)
        optimizer.zero_grad()
        (model(x) - x[:, :5].flip(1)).square().sum().backward()
        sums -= model.weight.grad * dense
        before = pruner.masks["weight"]
        optimizer.step()
        kept = pruner.masks["weight"]
        dense = torch.where(before, stepped[-1], dense)
        if step >= 5:
            expected = sums.flatten().argsort(stable=True)[15:]
            assert sorted(expected.tolist()) == kept.flatten().nonzero().flatten().tolist()
        came = kept & ~before
        assert torch.equal(model.weight[came], dense[came])
        back += int(came.sum())
    assert back
    assert pruner.finish().pruned == 15


def test_str_shows_shrunk_weights_and_learns_how_thresholds_differ():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(1, 4), regrow=sc.feedback.str_(learn=0.3))
    pruner.attach(optimizer)
    names = list(sc.weights(model))
    rests = {name: weight.detach().clone() for name, weight in sc.weights(model).items()}  # the dense weights
    logs, cuts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for step in range(1, 25):
        x = torch.randn(8, 6).double()
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        for name, weight in sc.weights(model).items():
            moved = -0.02 * weight.grad * (weight != 0 if cuts[name] else 1)
            if step > 2:
                logs[name] += 0.3 * cuts[name] * float((weight.grad * weight.detach().sign()).sum())
            rests[name] = rests[name] + moved
        optimizer.step()
        count = k(0.5 * min(max(step - 1, 0) / 3, 1), 80)
        if not count:
            continue
        ranked = torch.cat([(rests[name].abs() / math.exp(logs[name])).flatten() for name in names])
        order = ranked.argsort()[:count]
        kept = torch.ones(80, dtype=torch.bool)
        kept[order] = False
        for name, part, weight in zip(names, kept.split([48, 32]), sc.weights(model).values(), strict=True):
            mask = part.view_as(weight)
            cuts[name] = float(rests[name].masked_fill(mask, 0).abs().max())
            expected = (rests[name].sign() * (rests[name].abs() - cuts[name]).clamp(min=0)).masked_fill(~mask, 0)
            assert torch.equal(pruner.masks[name], mask)
            torch.testing.assert_close(weight.detach(), expected)
    assert logs[names[0]] != logs[names[1]]


# ---- exact, sparse at any moment, the same after a resume --------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_sparse_after_each_step(way, kind):
    model, optimizer, pruner = built(way, kind)
    pruner.attach(optimizer)
    size, moved = pruner.masks.size, 0

    def look(step):
        nonlocal moved
        assert sc.check(model, pruner.masks) == {}
        assert pruner.masks.pruned == k(pruner.sparsity, size)
        moved = pruner.metrics()["pruning/grown"]

    train(model, optimizer, range(40), look)
    assert pruner.done
    assert pruner.finish().pruned == k(pruner.sparsity, size)
    assert moved or way == "str"


@pytest.mark.parametrize("way", WAYS)
def test_a_resume_is_bit_exact(way):
    (model, _, pruner), (again, _, more) = interrupted(lambda: built(way), 7, 30)
    assert same(model, again)
    assert pruner.masks == more.masks


def test_dense_weights_that_are_not_in_the_state_are_missed():
    model, optimizer, pruner = built("dpf")
    pruner.attach(optimizer)
    train(model, optimizer, range(7))
    state = pruner.state_dict()
    again, _, other = built("dpf")
    state["withheld"] = other.state_dict()["withheld"]
    before = [weight.clone() for weight in again.parameters()]
    with pytest.raises(InputError, match=r"has masks of .*, but no dense weights; load an earlier checkpoint"):
        other.load_state_dict(state)
    assert other.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))


@pytest.mark.parametrize("way", ["dpf", "sr_ste"])  # for the others attach() clears the memory of the optimizer
def test_a_loop_without_attach_makes_the_same_steps(way):
    model, optimizer, pruner = built(way)
    pruner.attach(optimizer)
    train(model, optimizer, range(25))
    other, by_hand, counted = built(way)
    for step in range(25):
        if way == "sr_ste" and step == 0:
            counted._update()  # attach prunes at once
        x, y = batch(step)
        by_hand.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        counted.observe()
        by_hand.step()
        counted.step()
    assert same(model, other)


@pytest.mark.parametrize("way", ["sr_ste", "str"])
def test_a_loop_without_attach_that_shows_no_gradients(way):
    model, _, pruner = built(way, schedule=sc.cubic(0, 1))
    pruner.step()
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(StateError, match=r"call pruner\.observe\(\) after backward"):
        pruner.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_undo_brings_the_dense_weights_back(way):
    model, optimizer, pruner = built(way)
    start = net()
    pruner.snapshot()
    pruner.attach(optimizer)
    train(model, optimizer, range(20))
    pruner.undo()
    assert all(torch.equal(sc.weights(model)[name], sc.weights(start)[name]) for name in pruner.masks)


def test_nan_leaves_the_masks_and_the_model_sparse():
    model, optimizer, pruner = built("dpf")
    pruner.attach(optimizer)
    train(model, optimizer, range(14))
    kept = pruner.masks
    with torch.no_grad():
        model[2].weight[pruner.masks["2.weight"]] = math.nan
    with pytest.warns(sc.errors.SecateurWarning, match="the masks were to change at step 15"):
        train(model, optimizer, range(14, 15))
    assert pruner.masks == kept
    assert sc.check(model, pruner.masks) == {}


def test_a_closure_is_seen():
    model, optimizer, pruner = built("sr_ste", "SGD")
    other, by_closure, same_pruner = built("sr_ste", "SGD")
    pruner.attach(optimizer)
    same_pruner.attach(by_closure)
    train(model, optimizer, range(9))
    for step in range(9):
        x, y = batch(step)

        def closure(x=x, y=y):
            by_closure.zero_grad()
            loss = nn.functional.cross_entropy(other(x), y)
            loss.backward()
            return loss

        by_closure.step(closure)
    assert same(model, other)


def test_gradients_are_unscaled_where_the_optimizer_does_it():
    found = []
    for scaled in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
        pruner = sc.Pruner(model, 0.5, regrow=sc.feedback.sr_ste(decay=0.5))
        pruner.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(5):
            x, y = batch(step)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(model[0].weight.detach().clone())
    torch.testing.assert_close(*found)


def test_masks_are_lifted_with_the_dense_weights():
    model, optimizer, pruner = built("dpf", schedule=sc.schedules.ac_dc(start=3, stop=15, every=3))
    pruner.attach(optimizer)
    train(model, optimizer, range(6))
    assert pruner.sparsity == 0
    assert all(int((weight == 0).sum()) == 0 for weight in sc.weights(model).values())
    train(model, optimizer, range(6, 20))
    assert pruner.finish().pruned == k(0.8, 90)


def test_gradients_of_pruned_weights_stay_for_it():
    model, optimizer, pruner = built("dpf")
    pruner.attach(optimizer)
    train(model, optimizer, range(14))
    x, y = batch(14)
    nn.functional.cross_entropy(model(x), y).backward()
    before = model[0].weight.grad.clone()
    pruner.mask_gradients()
    assert torch.equal(model[0].weight.grad, before)


@pytest.mark.parametrize("score", ["random", "taylor"])
@pytest.mark.parametrize("stop", range(12))
def test_a_resume_at_any_step_chooses_no_masks_a_second_time(score, stop):
    model, optimizer, pruner = built("dpf", score=score)
    pruner.attach(optimizer)
    train(model, optimizer, range(stop))
    states = copy.deepcopy([thing.state_dict() for thing in (model, optimizer, pruner)])
    train(model, optimizer, range(stop, 16))
    again, other, more = built("dpf", score=score)
    for thing, state in zip((again, other, more), states, strict=True):
        thing.load_state_dict(state)
    more.attach(other)
    train(again, other, range(stop, 16))
    assert same(model, again)
    assert pruner.masks == more.masks


@pytest.mark.parametrize("way", ["dpf", "soft_movement"])
def test_tensors_that_are_given_no_sparsity_stay_dense(way):
    model, optimizer, pruner = built(way, sparsity={"2.weight": 0.5})
    pruner.attach(optimizer)
    train(model, optimizer, range(20))
    assert pruner.finish().counts() == {"0.weight": 0, "2.weight": 15}


@pytest.mark.parametrize("way", WAYS)
def test_only_a_change_of_the_masks_is_told(way):
    model, optimizer, pruner = built(way)
    told, seen = [], []
    pruner.on_update(lambda metrics: told.append(metrics["pruning/step"]))
    before = pruner.masks
    pruner.attach(optimizer)

    def look(step):
        nonlocal before
        seen.extend([step + 1] * (pruner.masks != before))
        before = pruner.masks

    seen.extend([0] * (pruner.masks != before))
    before = pruner.masks
    train(model, optimizer, range(30), look)
    assert told == seen


class Passing(torch.optim.Optimizer):
    """A wrapper without hooks whose further methods are those of the optimizer inside it, as that of accelerate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)

    def eval(self):
        return self.optimizer.eval()


def trained_in(way, wrapper):
    """A model trained by an optimizer, and one by the same inside a wrapper; the Pruners of both."""
    model, optimizer, pruner = built(way)
    other, inner, same_pruner = built(way)
    pruner.attach(optimizer)
    wrapped = wrapper(inner)
    same_pruner.attach(wrapped)
    train(model, optimizer, range(20))
    train(other, wrapped, range(20))
    return model, pruner, other, same_pruner


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapper_that_passes_all_on(way):
    model, pruner, other, same_pruner = trained_in(way, Passing)
    assert pruner.finish() == same_pruner.finish()
    assert same(model, other)


class Ahead(torch.optim.Optimizer):
    """Lookahead: its weights are the mean of those of the optimizer inside it and of what it remembers."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {})
        self.state |= {p: {"slow": p.detach().clone()} for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        for p, memory in self.state.items():
            p.copy_(memory["slow"].lerp_(p, 0.5))


class Plain:
    """The same, no torch optimizer."""

    def __init__(self, optimizer):
        self.optimizer, self.ahead = optimizer, Ahead(optimizer)
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad
        del self.ahead.optimizer

    @torch.no_grad()
    def step(self, closure=None):
        self.ahead.optimizer = self.optimizer
        type(self.ahead).step.__wrapped__(self.ahead, closure)


@pytest.mark.parametrize("kind", [Ahead, Plain])
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_moves_weights_after_the_one_inside_it(way, kind):
    model, inner, pruner = built(way)
    optimizer = kind(inner)
    pruner.attach(optimizer)
    with pytest.raises(InputError, match="train with the optimizer inside it alone, or leave regrow out"):
        train(model, optimizer, range(20))
    assert sc.check(model, pruner.masks) == {}
    pruner.detach()


class Around(torch.optim.Optimizer):
    """Moves nothing after the optimizer inside it, as SAM does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {})

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_around_another_makes_the_same_steps(way):
    model, pruner, other, same_pruner = trained_in(way, Around)
    assert pruner.masks == same_pruner.masks
    if way != "str":  # whose sums of shown and withheld are rounded
        assert same(model, other)


def test_sparse_gradients_decay_where_there_are_some():
    def table(sparse):
        torch.manual_seed(0)
        model = nn.Embedding(20, 8, sparse=sparse)
        scope = sc.weights(model, also=nn.Embedding)
        return model, sc.Pruner(model, 0.5, scope=scope, regrow=sc.feedback.sr_ste(decay=0.5))

    found = []
    for sparse in (True, False):
        model, pruner = table(sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(20).repeat(2)).square().sum().backward()
            optimizer.step()
        found.append(pruner._withheld.dense(sc.weights(model, also=nn.Embedding))["weight"])
    torch.testing.assert_close(*found)


def test_weights_that_are_kept_at_the_threshold_are_no_zeros():
    torch.manual_seed(0)
    model = nn.Linear(100, 200).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = sc.Pruner(model, 0.5, schedule=sc.cubic(1, 6), regrow="str")
    pruner.attach(optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.ones(4, 100, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
    assert pruner.finish().pruned == 10_000 == int((model.weight == 0).sum())


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_what_does_not_go_together():
    model = net()
    with pytest.raises(PatternError, match=r"would break the pattern lines\(along=0\): leave regrow out"):
        sc.Pruner(model, 0.6, pattern="rows", regrow="str")
    with pytest.raises(InputError, match='leave allocation at "global"'):
        sc.Pruner(model, 0.6, allocation="erk", regrow="str")
    for way in ("str", "soft_movement"):
        with pytest.raises(InputError, match="ranks the weights itself: leave score out"):
            sc.Pruner(model, 0.6, score="random", regrow=way)
    with pytest.raises(InputError, match="leave regrow out, or give a sparsity"):
        sc.Pruner(model, sc.Masks.from_zeros(model), regrow="dpf")
    with pytest.raises(InputError, match=r"no regrowth named 'dpx': choose set, rigl, or a method of sc\.feedback"):
        sc.Pruner(model, 0.6, regrow="dpx")
    with pytest.raises(InputError, match="leave it out, or give straight=True"):
        sc.feedback.Feedback("mine", straight=False, decay=0.1)
    with pytest.raises(InputError, match="decay is -1: give a number, 0 or more"):
        sc.feedback.sr_ste(decay=-1)
    with pytest.raises(InputTypeError, match="kind is 3: give a name"):
        sc.feedback.Feedback(3)
    assert same(model, net())


def test_an_optimizer_that_moves_weights_between_its_steps():
    class Averaging(torch.optim.SGD):
        def eval(self):
            """Put an average in the place of the weights."""

    model, _, pruner = built("dpf")
    optimizer = Averaging(model.parameters(), lr=0.1)
    inside = Accelerator(cpu=True).prepare(optimizer)
    for attach in (
        lambda: pruner.attach(optimizer),
        lambda: pruner.attach(inside),
        lambda: pruner.attach() or train(model, optimizer, range(1)),
    ):
        with pytest.raises(
            InputError, match=r"Averaging may, in eval\(\).*Take another optimizer, or leave regrow out"
        ):
            attach()
    pruner.detach()
    with pytest.raises(
        InputError, match=r"LBFGS takes the curvature from .*: take another optimizer, or leave regrow out"
    ):
        pruner.attach(torch.optim.LBFGS(model.parameters()))


def by_accelerate(module, optimizer):
    return Accelerator(cpu=True).prepare(optimizer)


def by_fabric(module, optimizer):
    return Fabric(accelerator="cpu").setup(module, optimizer)[1]


def by_lightning(module, optimizer):
    return LightningOptimizer(optimizer)


def of_bitsandbytes(module, optimizer):
    class Coded(type(optimizer)):
        def update_step(self): ...

        update_step.__module__ = "bitsandbytes.optim.adam"

    Coded.__module__ = "bitsandbytes.optim.adam"
    return Coded(module.parameters(), lr=0.1)


@pytest.mark.parametrize("wrapped", [by_accelerate, by_fabric, by_lightning, of_bitsandbytes])
def test_wrappers_that_pass_on_what_is_asked(wrapped):
    """They have methods of their own, such as eval(), and move no weights by them."""
    model, optimizer, pruner = built("dpf")
    pruner.attach(wrapped(model, optimizer))
    pruner.detach()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("withheld"), "its dense weights are missing"),
        (lambda state: state["withheld"].pop("cuts"), "its dense weights are"),
        (lambda state: state["withheld"]["hidden"].update({"0.weight": torch.zeros(3)}), r"hidden of 0\.weight is"),
        (lambda state: state["withheld"]["hidden"].update(other=torch.zeros(3)), "of other names"),
        (lambda state: state["regrow"].update(grown=-1), "its regrowth is"),
        (lambda state: state["settings"]["regrow"].update(every=5), r"regrow\.every 5 in the saved one, 3"),
    ],
)
def test_a_damaged_state_changes_nothing(damage, message):
    model, optimizer, pruner = built("dpf")
    pruner.attach(optimizer)
    train(model, optimizer, range(14))
    state = pruner.state_dict()
    hidden = {name: value.clone() for name, value in state["withheld"]["hidden"].items()}
    state["settings"] = {**state["settings"], "regrow": dict(state["settings"]["regrow"])}
    damage(state)
    with pytest.raises(InputError, match=message):
        pruner.load_state_dict(state)
    assert all(torch.equal(hidden[name], value) for name, value in pruner._withheld.hidden.items())
