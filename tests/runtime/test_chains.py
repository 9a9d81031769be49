"""Runs of sparse Linear layers in a Sequential as one call: the same numbers, and singly wherever that matters."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import SecateurWarning, StateError
from secateur.measurement.costs import macs
from secateur.runtime import chains, native, products, swapping, tuning
from secateur.runtime.kernel_plans import Gain
from secateur.runtime.swapping import swap
from sparse_models import assert_alike, fake_times, off, sparse, thin

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")

X = torch.randn(5, 37)


def mlp(bias=True):
    return thin(
        nn.Sequential(
            nn.Linear(37, 65, bias=bias),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(65, 33, bias=bias),
            nn.Identity(),
            nn.Linear(33, 7, bias=bias),
            nn.ReLU(),
        )
    )


def fused(model):
    """A copy whose layers are all sparse, and whose runs are all fused."""
    fast = sparse(model)
    for module in list(fast.modules()):
        if isinstance(module, nn.Sequential):
            swap(module, chains.SparseSequential)
            module.fuse(dict.fromkeys(chains.runs([*module]), products.ALL))
    return fast


@pytest.mark.parametrize("n", [0, 1, 3, 5, 17, 33, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_model_that_it_was(isa, calls, n, bias):
    model, x = mlp(bias), torch.randn(n, 37)
    fast = fused(model)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            got = fast(x)
        assert off(got, copy.deepcopy(model).double()(x.double())) <= 1e-5
        assert not got.requires_grad
    assert calls == [3] * 3 if n else not calls


@pytest.mark.parametrize("widths", [(1, 1, 1), (17, 1, 31), (3, 129, 2, 64), (64, 64, 64, 64, 64), (100, 300, 10)])
@pytest.mark.parametrize("last_relu", [True, False])
def test_widths(isa, calls, widths, last_relu):
    made = [m for pair in itertools.pairwise(widths) for m in (nn.Linear(*pair), nn.ReLU())]
    model = thin(nn.Sequential(*made if last_relu else made[:-1]), 0.5, seed=1)
    for shape in ((1,), (4,), (2, 3), (16,), (2, 2, 9)):
        x = torch.randn(*shape, widths[0])
        assert off(fused(model)(x), copy.deepcopy(model).double()(x.double())) <= 1e-5
    assert len(calls) == 5


def test_one_dimension_and_strides(isa, calls):
    model, fast = mlp(), fused(mlp())
    model.load_state_dict(fast.state_dict())
    for x in (torch.randn(37), torch.randn(37, 6).t(), torch.randn(4, 40)[:, 1:38], torch.randn(1, 37).expand(3, 37)):
        assert off(fast(x), model(x).detach()) <= 1e-5
    assert calls == [3] * 4


def test_threads(isa):
    model, x = mlp(), torch.randn(200, 37)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert off(fused(model)(x), model(x).detach()) <= 1e-5
    finally:
        torch.set_num_threads(before)


def test_nan_stays(isa, calls):
    model = mlp()
    with torch.no_grad():
        model[0].bias[3] = float("nan")
        model[0].weight[3] = 0
        model[3].weight[0, 3] = 1
    x = X.clone()
    x[2, 5] = float("nan")
    x[3, 6] = float("inf")
    singly, at_once = sparse(model)(x), fused(model)(x)
    assert calls == [3]
    assert singly.isnan().any()
    torch.testing.assert_close(at_once, singly, equal_nan=True)


def test_where_runs_are():
    def spans(*modules):
        return list(chains.runs([*sparse(thin(nn.Sequential(*modules)))]))

    def linear(a=4, b=4):
        return nn.Linear(a, b)

    relu = nn.ReLU()
    assert spans(linear(), relu, linear()) == [(0, 3)]
    assert spans(linear(), linear(), nn.Dropout(), nn.Identity()) == [(0, 4)]
    assert spans(nn.Flatten(), relu, linear(), relu, linear(), relu, nn.Tanh(), relu) == [(2, 6)]
    assert spans(linear(), nn.GELU(), nn.Dropout(), linear(), nn.SiLU()) == [(0, 5)]
    assert spans(linear(), relu, nn.Identity(), relu, linear()) == []
    assert spans(relu, relu, linear(), relu, linear(), relu, relu) == [(2, 6)]
    assert spans(linear(), relu) == spans(linear(), nn.ELU(), linear()) == spans(relu, relu) == spans() == []
    assert spans(linear(), linear(), nn.LayerNorm(4), linear(), relu, linear(), linear()) == [(0, 2), (3, 7)]
    assert spans(linear(), linear(), linear(5, 4), linear()) == [(0, 2), (2, 4)]
    assert list(chains.runs([*nn.Sequential(linear(), linear())])) == []


def test_two_runs_and_what_lies_between(isa, calls):
    model = thin(
        nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 16), nn.LayerNorm(16),
            nn.Linear(16, 16), nn.Linear(16, 5), nn.Softmax(1),
        )
    )  # fmt: skip
    x = torch.randn(4, 1, 8, 8)
    assert off(fused(model)(x), model(x).detach()) <= 1e-5
    assert calls == [2, 2]


def test_nested_ones_each_on_their_own(isa, calls):
    model = thin(nn.Sequential(nn.Sequential(nn.Linear(37, 9), nn.Linear(9, 9)), nn.Linear(9, 9), nn.Linear(9, 9)))
    assert off(fused(model)(X), model(X).detach()) <= 1e-5
    assert calls == [2, 2]


@pytest.mark.parametrize("widths", [(0, 3, 3), (3, 0, 3), (3, 3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_features(isa, widths):
    model = nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:])).eval()
    x = torch.randn(4, widths[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert off(fused(model)(x), model(x)) == 0


def test_inputs_are_left_alone(isa, calls):
    model = thin(nn.Sequential(nn.Identity(), nn.Linear(37, 37), nn.ReLU(inplace=True), nn.Linear(37, 37)))
    x = X.clone()
    fused(model)(x)
    assert x.equal(X)
    assert calls == [2]


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_a_child_are_called(isa, calls, place, kind):
    fast, seen = fused(mlp()), []
    reference = fast(X)
    handle = getattr(fast[place], kind)(lambda module, *_: seen.append(module))
    assert off(fast(X), reference) <= 1e-6
    assert seen == [fast[place]]
    assert calls == [3]
    handle.remove()
    fast(X)
    assert calls == [3, 3]


def test_hooks_of_all_modules_and_of_the_sequential(isa, calls):
    fast, seen = fused(mlp()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        fast(X)
    finally:
        handle.remove()
    assert len(seen) == 8
    assert not calls
    fast.register_forward_hook(lambda module, args, out: out * 0)
    assert not fast(X).any()
    assert calls == [3]


def test_a_forward_of_its_own_is_called(isa, calls):
    fast = fused(mlp())
    fast[1].forward = torch.zeros_like
    expected = fast[3:](torch.zeros(5, 65))
    assert fast(X).equal(expected)
    assert not calls


def _doubled(self, x):
    for module in self._modules.values():
        x = module(x)
    return x * 2


def _without_last(self):
    return iter([*self._modules.values()][:-1])


@pytest.mark.parametrize(
    ("kind", "name", "new"),
    [
        ("own", "forward", _doubled),
        ("own", "__iter__", _without_last),
        (nn.Sequential, "forward", _doubled),
        (nn.ReLU, "forward", lambda self, x: x.abs()),
    ],
)
def test_what_a_class_gets_later_is_called(isa, calls, monkeypatch, kind, name, new):
    class Own(nn.Sequential):
        pass

    model = Own(*mlp())
    fast = fused(model)
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert calls == [3]
    monkeypatch.setattr(Own if kind == "own" else kind, name, new)
    for _ in range(2):
        assert off(fast(X), model(X).detach()) <= 1e-5
    assert calls == [3]


def test_one_that_is_gone_through_in_a_way_of_its_own_is_none():
    kind = type("Own", (nn.Sequential,), {"__iter__": _without_last})
    assert not chains.SparseSequential.takes(kind)
    assert chains.SparseSequential.takes(Named)


def test_training_is_the_modules_own_affair(isa, calls):
    fast = fused(mlp()).train()
    with pytest.raises(StateError, match=r"fast\.eval\(\)"):
        fast(X)
    with torch.no_grad():
        assert not fast(X).equal(fast(X))  # dropout
    assert not calls
    with pytest.raises(StateError, match="gives no gradients"):
        fast.eval()(X.clone().requires_grad_())


def test_what_is_special_goes_singly(isa, calls):
    model, fast = mlp(), fused(mlp())
    model.load_state_dict(fast.state_dict())
    with torch.no_grad():
        many = torch.randn(3, 4, 37)
        assert off(torch.vmap(fast)(many), model(many)) <= 1e-5
        assert off(copy.deepcopy(fast).double()(X.double()), copy.deepcopy(model).double()(X.double())) <= 1e-12
        with torch.autocast("cpu", torch.bfloat16), pytest.warns(SecateurWarning, match="autocast is on"):
            assert fast(X).dtype == torch.bfloat16
        assert macs(fast, ((X,), {})) == macs(model, ((X,), {}))
        with pytest.raises(RuntimeError, match="shapes"):
            fast(torch.randn(4, 36))
        fast.fuse({(0, 7): 1})  # single rows alone
        fast(X)
        assert not calls
        fast(X[:1])
        assert calls == [3]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_graphs_are_of_the_children(isa, calls):
    model, fast = mlp(), fused(mlp())
    model.load_state_dict(fast.state_dict())
    assert off(torch.jit.trace(fast, (X,), check_trace=False)(2 * X), model(2 * X).detach()) <= 1e-5
    program = torch.export.export(fast, (X,))
    assert off(program.module()(X), model(X).detach()) <= 1e-5
    assert sum("secateur.linear" in str(node.target) for node in program.graph.nodes) == 3
    torch._dynamo.reset()
    assert off(torch.compile(fast, backend="eager", fullgraph=True)(X), model(X).detach()) <= 1e-5
    assert not calls


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_too(isa, calls, make):
    fast = fused(mlp())
    reference = fast(X)
    one = make(fast)
    assert type(one) is chains.SparseSequential
    with torch.inference_mode():
        other = make(fast)  # whose parameters count no versions
        assert other(X).equal(reference)
        assert other(X).equal(reference)
    del fast
    assert one(X).equal(reference)
    assert calls == [3] * 4
    assert list(one.state_dict()) == list(mlp().state_dict())


def test_unpickled_where_the_library_is_not(monkeypatch):
    fast = fused(mlp())
    kept, reference = pickle.dumps(fast), fast(X)
    monkeypatch.setattr(native, "library", lambda: None)
    assert off(pickle.loads(kept)(X), reference) <= 1e-5


def test_moves_that_keep_the_weights_keep_the_chain(isa, calls):
    fast = fused(mlp())
    reference = fast(X)
    assert fast.to("cpu").float().share_memory()(X).equal(reference)
    assert calls == [3, 3]
    fast.to(torch.bfloat16).float()
    with pytest.raises(StateError, match="changed"):
        fast(X)


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2, requires_grad=False)),
    "loaded": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "assigned": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}, assign=True),
    "gone": lambda layer: layer._parameters.pop("weight"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("warm", [True, False])
def test_changed_weights_are_noticed(isa, change, warm):
    fast = fused(mlp())
    if warm:
        fast(X)
    CHANGES[change](fast[3])
    for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with pytest.raises(StateError, match=r"weights of 3 have(.|\n)*sc\.accelerate\(sc\.dense\(fast\)"):
            one(X)


def test_a_bias_that_changes_counts(isa, calls):
    fast = fused(thin(nn.Sequential(nn.Linear(37, 9), nn.Linear(9, 9))))
    before = fast(X)
    fast[1].bias.add_(1)
    assert off(fast(X), before + 1) <= 1e-6
    fast[1].bias = nn.Parameter(fast[1].bias + 1, requires_grad=False)
    assert off(fast(X), before + 2) <= 1e-6
    fast[1].bias.data = fast[1].bias.data + 1
    assert off(fast(X), before + 3) <= 1e-6
    old, fast[1].bias = fast[1].bias, None
    assert off(fast(X), before + 3 - old) <= 1e-5
    assert calls == [2] * 5


def test_weights_that_are_packed_anew_count(isa):
    fast = fused(mlp())
    fast(X)
    fast[0].weight.mul_(2)
    fast[0].pack()
    assert off(fast(X), sparse(fast.plain(*fast))(X)) <= 1e-6


def test_other_children_are_not_those_that_were_fused(isa, calls):
    fast = fused(mlp())
    fast(X)
    fast[1] = nn.Tanh()
    assert fast(X).equal(nn.Sequential.forward(fast, X))
    fast[1] = nn.Identity().eval()  # as good as what was there
    assert off(fast(X), nn.Sequential.forward(fast, X)) <= 1e-6
    del fast[0]
    assert fast(torch.randn(5, 65)).shape == (5, 7)
    assert calls == [3, 3]
    part = fused(mlp())[:4]
    assert part(X).shape == (5, 33)
    part.restore()
    assert type(part) is nn.Sequential


# ---- what accelerate does with them ----------------------------------------------------------------------------


@pytest.fixture
def no_clock(monkeypatch):
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    return lambda times: fake_times(monkeypatch, times)


class Owner(nn.Module):
    """A Sequential in a model."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Flatten(), *mlp())

    def forward(self, x):
        return self.head(x)


def test_chosen_and_told(isa, calls, sparse_wins):
    model, x = Owner().eval(), torch.randn(3, 37)
    fast = sc.accelerate(model, x)
    chain = fast.plan.layers[-1]
    assert (chain.name, chain.kind, chain.shape, chain.reason) == ("head[1:8]", "Sequential", (37, 65, 33, 7), "")
    assert [(t.bucket, t.sparse) for t in chain.timings] == [(2, True)]
    assert fast.plan.sparse == ("head.1", "head.4", "head.6", "head[1:8]")
    assert "37-65-33-7" in str(fast.plan)
    calls.clear()
    assert off(fast(x), model(x).detach()) <= 1e-5
    assert calls == [3]
    back = sc.dense(fast)
    assert_alike(back, model)
    assert back(x).equal(model(x))
    assert isinstance(fast.head, chains.SparseSequential)


def test_a_layer_too_small_alone_may_be_part(isa, calls, no_clock):
    no_clock(lambda name, bucket: (1.0, 2.0) if name == "5" else (2.0, 1.0))
    model = mlp()
    fast = sc.accelerate(model, X)
    assert [p.reason for p in fast.plan.layers] == ["", "", "not faster", ""]
    assert fast[5]._choices == 0
    calls.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert calls == [3]
    assert [type(m) for m in sc.dense(fast).modules()] == [type(m) for m in model.modules()]


def test_no_faster_as_one(isa, calls, no_clock):
    no_clock(lambda name, bucket: (1.0, 1.0) if name in ("5", "[0:7]") else (2.0, 1.0))
    fast = sc.accelerate(mlp(), X)
    assert [p.reason for p in fast.plan.layers] == ["", "", "not faster", "not faster"]
    assert type(fast) is nn.Sequential
    assert type(fast[5]) is nn.Linear
    assert "packed_weight" not in fast[5]._buffers


def test_by_row_class_and_by_the_whole_model(isa, no_clock, monkeypatch):
    no_clock(lambda name, bucket: (2.0, 1.0) if bucket or name != "[0:7]" else (1.0, 1.0))
    fast = sc.accelerate(mlp(), [X[:1], X])
    assert [t.sparse for t in fast.plan.layers[-1].timings] == [False, True]
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(1.0, 0.9, 1.1))
    fast = sc.accelerate(mlp(), X)
    assert {p.reason for p in fast.plan.layers} == {"the whole model was not faster"}
    assert not any(isinstance(m, swapping.Swapped) for m in fast.modules())


def test_dense_layers_are_in_no_chain(isa, sparse_wins):
    model = thin(nn.Sequential(*(nn.Linear(9, 9) for _ in range(5))))
    nn.init.ones_(model[2].weight)
    assert [p.name for p in sc.accelerate(model, torch.randn(4, 9)).plan.layers[5:]] == ["[0:2]", "[3:5]"]


class Around(nn.Module):
    """Calls the children of a Sequential, not it."""

    def __init__(self):
        super().__init__()
        self.head = mlp()

    def forward(self, x):
        for module in self.head:
            x = module(x)
        return x


def test_a_sequential_that_is_not_called(isa, sparse_wins):
    fast = sc.accelerate(Around().eval(), X)
    assert fast.plan.layers[-1].reason == "the example does not reach it"
    assert type(fast.head) is nn.Sequential
    assert fast.plan.sparse == ("head.0", "head.3", "head.5")


class Named(nn.Sequential):
    def width(self):
        return self[0].in_features


class Mine(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


def test_subclasses(isa, sparse_wins):
    fast = pickle.loads(pickle.dumps(sc.accelerate(Named(*mlp()), X)))
    assert isinstance(fast, chains.SparseSequential)
    assert (type(fast).__name__, fast.width()) == ("SparseNamed", 37)
    assert type(sc.dense(fast)) is Named
    assert type(sc.accelerate(Mine(*mlp()), X)) is Mine


def test_plans_are_used_again(isa, calls, no_clock, monkeypatch):
    no_clock(lambda name, bucket: (1.0, 2.0) if name == "5" else (2.0, 1.0))
    model = mlp()
    fast = sc.accelerate(model, X)
    monkeypatch.setattr(tuning, "times", None)
    monkeypatch.setattr(tuning, "gain", None)
    for plan in (fast.plan, json.loads(json.dumps(fast.plan.to_dict()))):
        again = sc.accelerate(model, X, plan=plan)
        calls.clear()
        assert again(X).equal(fast(X))
        assert calls == [3, 3]
        assert again.plan == fast.plan


def test_without_the_library_nothing_is_fused(without_native, sparse_wins):
    assert all(p.kind == "Linear" for p in sc.accelerate(mlp(), X).plan.layers)


def test_the_real_clock(isa, monkeypatch):
    for name, value in (("_CACHE_BYTES", 1 << 20), ("_SECONDS", 0.01), ("_GAIN", ((0.01, 6),))):
        monkeypatch.setattr(tuning, name, value)
    model = mlp()
    fast = sc.accelerate(model, [X[:1], X])
    assert all(len(p.timings) == 2 for p in fast.plan.layers)
    assert off(fast(X), model(X).detach()) <= 1e-5
