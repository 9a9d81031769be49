"""secateur.optimizers: several, inside others, what they remember, and steps that train nothing."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from processes import in_a_group
from secateur import optimizers
from secateur.errors import InputError, InputTypeError, MaskError, SecateurWarning, StateError
from tiny import batch, net, same, train


def test_with_several_optimizers_a_step_is_one_of_each():
    model = net()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1, momentum=0.9) for i in (0, 2))
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 4))
    pruner.attach(first, second)
    for step in range(4):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        first.step()
        assert pruner.steps == step
        assert sc.check(model, pruner.masks) == {}
        second.step()
        assert pruner.steps == step + 1
    assert pruner.finish().pruned == 45


def test_attached_to_no_optimizer_it_follows_those_of_the_model_only():
    model, other = net(), net(1)
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 3))
    pruner.attach()
    try:
        foreign = torch.optim.SGD(other.parameters(), lr=0.1)
        train(other, foreign, range(3))
        assert pruner.steps == 0
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        train(model, optimizer, range(3))
        assert pruner.finish().pruned == 45
    finally:
        pruner.detach()


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, lr=0.05), lambda p: torch.optim.SGD(p, 0.1, 0.9)])
def test_what_the_optimizer_remembers_is_cleared_where_masks_change(make):
    model = net()
    optimizer = make(model.parameters())
    pruner = sc.Pruner(model, 0.6, schedule=sc.linear(4, 9, 2))
    pruner.attach(optimizer)

    def each(step):
        for name, weight in sc.weights(model).items():
            kept = pruner.masks[name]
            for key, value in optimizer.state[weight].items():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    assert value[kept].any()
                    if step + 1 in (6, 8, 9):
                        assert not value[~kept].any(), key

    train(model, optimizer, range(9), each)
    assert pruner.finish().pruned == 54


def test_prune_clears_what_optimizers_remember():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    masks = sc.prune(model, 0.5, optimizer=optimizer)
    for name, weight in sc.weights(model).items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[weight][key][~masks[name]].any()
            assert optimizer.state[weight][key][masks[name]].all()
    assert optimizer.state[model[0].bias]["exp_avg"].all()


@pytest.mark.parametrize("bad", [5, "adam", [None], [nn.Linear(1, 1)]], ids=repr)
def test_prune_checks_its_optimizers_before_anything_changes(bad):
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(InputTypeError, match="give the optimizer it wraps"):
        sc.prune(model, 0.5, optimizer=bad)
    assert same(model, before)


def test_prune_while_a_pruner_holds_the_weights_is_refused():
    """The Pruner would let the further zeros grow back."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = sc.Pruner(model, 0.3)
    for given in ((optimizer,), ()):
        first.attach(*given)
        before = copy.deepcopy(model)
        with pytest.raises(StateError, match=r"still holds 0\.weight.*call its finish\(\) or detach\(\)"):
            sc.prune(model, 0.9, optimizer=given)
        assert same(model, before)
        first.detach()
    assert sc.prune(model, 0.9, optimizer=optimizer).pruned == 81


def test_prune_with_an_optimizer_of_another_model():
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"0\.weight"):
        sc.prune(model, 0.5, optimizer=torch.optim.SGD(net().parameters(), lr=0.1))
    assert same(model, before)


def test_mask_gradients():
    model = net()
    pruner = sc.Pruner(model, 0.5)
    pruner.mask_gradients()  # no gradients yet
    pruner.step()
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    bias = model[0].bias.grad.clone()
    kept = [model[i].weight.grad[pruner.masks[f"{i}.weight"]].clone() for i in (0, 2)]
    pruner.mask_gradients()
    for i, want in zip((0, 2), kept, strict=True):
        mask = pruner.masks[f"{i}.weight"]
        assert not model[i].weight.grad[~mask].any()
        assert torch.equal(model[i].weight.grad[mask], want)
    assert torch.equal(model[0].bias.grad, bias)


# optimizers inside others


class Sam(torch.optim.Optimizer):
    """Climbs, looks, goes back, lets the base step: with a closure, or in two calls."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.01)

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss


class Lookahead:
    """No torch optimizer: takes no hooks, and moves the weights after the step of the one inside it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.slow = [p.detach().clone() for p in self._all()]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def _all(self):
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        for slow, fast in zip(self.slow, self._all(), strict=True):
            slow.lerp_(fast, 0.5)
            fast.copy_(slow)


class Again(torch.optim.Adam):
    def step(self, closure=None):  # torch calls the hooks for Adam.step too
        return super().step(closure)


class Holder:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def closures(model, optimizer, steps):
    for step in steps:
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)


def calls(model, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        for call in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            call()


def made(kind, model):
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    if kind.startswith("sam"):
        sam = Sam(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        return sam, closures if kind == "sam" else calls, sam
    if kind == "lookahead":
        look = Lookahead(adam)
        return look, train, look
    if kind == "again":
        again = Again(model.parameters(), lr=0.05)
        return again, train, again
    return Holder(Holder(adam)), train, adam


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", ["sam", "sam in two calls", "lookahead", "again", "holder"])
def test_a_step_inside_a_step_counts_once(kind, given):
    model = net()
    attached, loop, stepped = made(kind, model)
    own = vars(attached).copy()
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 10, 3))
    pruner.attach(*[attached] * given)
    try:
        for step in range(12):
            loop(model, stepped, range(step, step + 1))
            assert pruner.steps == step + 1
            if given or kind != "lookahead":
                assert sc.check(model, pruner.masks) == {}
        if kind == "lookahead" and not given:  # nothing shows that it moves weights
            with pytest.raises(MaskError, match=r"an optimizer it does not follow.*attach\(\) that optimizer"):
                pruner.finish()
            return
        assert pruner.finish().pruned == 72
        assert vars(attached) == own
    finally:
        pruner.detach()


@pytest.mark.parametrize("kind", ["sam", "sam in two calls", "lookahead", "holder"])
def test_what_an_optimizer_inside_another_remembers_is_cleared(kind):
    model = net()
    attached, loop, stepped = made(kind, model)
    loop(model, stepped, range(3))
    masks = sc.prune(model, 0.5, optimizer=attached)
    inner = next(one for one in optimizers.family(attached) if type(one) in (torch.optim.SGD, torch.optim.Adam))
    for name, weight in sc.weights(model).items():
        for key in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & inner.state[weight].keys():
            assert inner.state[weight][key][masks[name]].all()
            assert not inner.state[weight][key][~masks[name]].any()


def test_a_step_that_ended_in_an_error_does_not_upset_the_count():
    model = net()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.1)
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 10))
    pruner.attach(optimizer)

    def closure():
        raise RuntimeError("out of memory")

    closures(model, optimizer, range(2))
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    closures(model, optimizer, range(2, 5))
    assert pruner.steps == 5


def test_gradients_of_a_step_inside_a_step_are_seen_once():
    sums = []
    for inside in (False, True):
        model = net()
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        pruner = sc.Pruner(model, 0.8, schedule=sc.linear(5, 10), score="taylor")
        optimizer = Passing(adam) if inside else adam
        pruner.attach(optimizer)
        train(model, optimizer, range(3))
        sums.append(pruner.state_dict()["sums"])
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in sums[0])


class Passing(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


def test_frozen_weights_count_a_step_inside_a_step_once_too():
    model = net()
    sc.weights(model)["0.weight"].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    optimizer = Passing(torch.optim.SGD([model[0].bias, model[2].bias], lr=0.1))
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 4))
    pruner.attach(optimizer)
    train(model, optimizer, range(4))
    assert pruner.steps == 4
    assert pruner.finish().pruned == 72


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_the_step_that_makes_a_state_to_save_is_no_step(kind, score):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    before = copy.deepcopy(model)
    optimizer = kind(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 4), score=score)
    pruner.attach(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert pruner.steps == 0
    assert same(model, before)
    train(model, optimizer, range(4))
    assert pruner.finish().pruned == 72


def test_a_warm_up_from_a_rate_of_zero_counts():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 4))
    pruner.attach(optimizer)
    train(model, optimizer, range(4))
    assert pruner.steps == 4


# weights moved outside step()


class Averaging(torch.optim.Optimizer):
    """The model holds y while training; eval() puts x, an average, in its place."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.clone())
            z.add_(p.grad, alpha=-0.1)
            p.lerp_(z, 0.1)

    @torch.no_grad()
    def eval(self):
        for p in self.param_groups[0]["params"]:
            p.lerp_(self.state[p]["z"], 1 - 1 / 0.9)


def test_zeros_stay_where_an_optimizer_averages_outside_its_steps():
    model = net()
    optimizer = Averaging(model.parameters())
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 6))
    pruner.attach(optimizer)
    train(model, optimizer, range(20))
    masks = pruner.finish()
    optimizer.eval()
    assert sc.check(model, masks) == {}


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "wrapper"])
def test_schedule_free(kind):
    schedulefree = pytest.importorskip("schedulefree")
    model = net()
    if kind == "wrapper":
        optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.05), momentum=0.9)
    else:
        optimizer = getattr(schedulefree, kind)(model.parameters(), lr=0.05, warmup_steps=2)
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 12, 3))
    pruner.attach(optimizer)
    for start in range(0, 20, 5):
        optimizer.train()
        train(model, optimizer, range(start, start + 5))
        optimizer.eval()
        assert sc.check(model, pruner.masks) == {}
    assert pruner.finish().pruned == 72


# low-bit states


class Coded(torch.optim.Optimizer):
    """SGD with momentum in whole numbers: signed, places in a table, shifted, packed, or a tensor of its own kind."""

    def __init__(self, params, kind):
        super().__init__(params, {"lr": 0.1})
        self._kind = kind

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            value = self.read(p) * 0.9 + p.grad if state else p.grad
            scale = value.abs().max() / 100 + 1e-12
            whole = (value / scale).round()
            if self._kind == "signed":
                state.update(momentum=whole.to(torch.int8), scale=scale)
            elif self._kind == "table":
                table = torch.arange(-127, 129) / 1.0
                state.update(state1=(whole + 127).to(torch.uint8), qmap1=table, absmax1=scale)
            elif self._kind == "shifted":
                state.update(momentum=(whole + 128).to(torch.uint8), scale=scale)
            elif self._kind == "sparse":
                state.update(momentum=value.to_sparse())
            elif self._kind == "packed":
                state.update(momentum=torch.zeros(-(-p.numel() // 2), dtype=torch.uint8))
            else:
                state.update(momentum=torch.quantize_per_tensor(value, float(scale), 3, torch.qint8))
            p.sub_(value, alpha=0.1)

    def read(self, p):
        state = self.state[p]
        if self._kind == "signed":
            return state["momentum"] * state["scale"]
        if self._kind == "table":
            return state["qmap1"][state["state1"].int()] * state["absmax1"]
        return state["momentum"].dequantize() if self._kind == "own" else 0 * p


@pytest.mark.parametrize("kind", ["signed", "table", "own"])
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_low_bit_states_are_zeroed_by_value(kind):
    model = net()
    optimizer = Coded(model.parameters(), kind)
    train(model, optimizer, range(3))
    before = {name: optimizer.read(weight) for name, weight in sc.weights(model).items()}
    masks = sc.prune(model, 0.5, optimizer=optimizer)
    for name, weight in sc.weights(model).items():
        after = optimizer.read(weight)
        assert not after[~masks[name]].any()
        assert torch.equal(after[masks[name]], before[name][masks[name]])
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 3))
    pruner.attach(optimizer)
    with pytest.warns(SecateurWarning, match="grow back"):
        train(model, optimizer, range(4))
    assert pruner.finish().pruned == 72


@pytest.mark.parametrize("kind", ["shifted", "packed", "sparse"])
def test_low_bit_states_of_an_unknown_code_are_refused_before_anything_is_written(kind):
    model = net()
    optimizer = Coded(model.parameters(), kind)
    train(model, optimizer, range(3))
    before = copy.deepcopy(model)
    remedy = r"momentum of 0\.weight as a Tensor of torch\.\w+.*make a new optimizer after the pruning"
    with pytest.raises(InputError, match=remedy):
        sc.prune(model, 0.5, optimizer=optimizer)
    pruner = sc.Pruner(model, 0.5)
    with pytest.raises(InputError, match=remedy):
        pruner.attach(optimizer)
    assert same(model, before)
    assert pruner.masks.pruned == 0


def test_states_of_other_shapes():
    """Flat momenta are cleared; factored ones, counters and masks are left."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = optimizer.state[model[0].weight]
    state.update(flat=torch.ones(60), rows=torch.ones(10, 1), step=torch.tensor(3), seen=torch.ones(10, 6).bool())
    state.update(one_more_dimension=torch.ones(1, 10, 6))
    state.update(inside={"more": torch.ones(10, 6)}, complex=torch.ones(10, 6, dtype=torch.complex64))
    masks = sc.prune(model, 0.5, optimizer=optimizer)
    pruned = masks.counts()["0.weight"]
    assert (state["flat"] == 0).sum() == pruned
    assert (state["one_more_dimension"][0] == 0).equal(~masks["0.weight"])
    assert (state["inside"]["more"] == 0).sum() == pruned
    assert (state["complex"] == 0).sum() == pruned
    assert state["rows"].all()
    assert state["seen"].all()
    assert state["step"] == 3


# ZeRO-1 on two processes


def zero_redundancy(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for given in (True, False):
        model = nn.parallel.DistributedDataParallel(net())
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=0.01)
        pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 8, 3))
        pruner.attach(*[optimizer] * given)
        train(model, optimizer, range(8))
        assert pruner.steps == 8
        masks = pruner.finish()
        assert masks.pruned == 72
        weights = dict(sc.weights(model))
        for weight, state in optimizer.optim.state.items():
            for name in [name for name, mine in weights.items() if mine is weight]:
                assert not state["exp_avg"][~masks[name]].any()
        both = [None, None]
        torch.distributed.all_gather_object(both, {name: w.tolist() for name, w in weights.items()})
        assert both[0] == both[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_zero_redundancy_on_two_processes():
    in_a_group(2, zero_redundancy)


def test_tensors_that_stay_dense_keep_their_momentum():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    sc.prune(model, {"0.weight": 0.5}, optimizer=optimizer)
    assert int((optimizer.state[model[0].weight]["momentum_buffer"] == 0).sum()) == 8
    assert int((optimizer.state[model[1].weight]["momentum_buffer"] == 0).sum()) == 0
