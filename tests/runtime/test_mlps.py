"""Modules of any class whose forward is a chain: one native call, and their own forward wherever that matters."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import StateError
from secateur.runtime import mlps, native, products
from secateur.runtime.forwards import Watch
from secateur.runtime.mlps import SparseMlp
from secateur.runtime.swapping import swap
from sparse_models import assert_alike, assert_copies_give_the_same, off, sparse, thin, without_negative_zeros

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")

X = torch.randn(5, 24)


class Act(nn.Module):
    """As transformers has its activations."""

    def __init__(self):
        super().__init__()
        self.act = F.gelu

    def forward(self, x):
        return self.act(x)


class Mlp(nn.Module):
    scale = 1

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = nn.Linear(24, 40), Act(), nn.Linear(40, 24), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Functions(Mlp):
    def forward(self, x):
        hidden = F.dropout(F.silu(self.fc1(x)), 0.5, training=self.training)
        return torch.tanh(self.fc2(hidden.relu()))


class Called(Mlp):
    def forward(self, x):
        return self.fc2(F.dropout(F.gelu(self.fc1(x), approximate="tanh"), p=0.5, training=self.training)).sigmoid()


class Gated(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.gate, self.up = nn.Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
        self.down, self.act = nn.Linear(40, 24, bias=bias), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Swapped(Gated):
    def forward(self, hidden_states):
        return self.down(torch.mul(self.up(hidden_states), F.gelu(self.gate(hidden_states))))


class Behind(Gated):
    """An activation of the product, not of one of its factors."""

    def forward(self, x):
        return self.down(F.dropout(F.relu(self.act(self.gate(x)) * self.up(x)), training=self.training))


class Again(Gated):
    """The gate is one more layer behind."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(24, 24), nn.Linear(24, 24)
        self.down = nn.Linear(24, 24)

    def forward(self, x):
        return self.down(F.relu(self.gate(torch.tanh(self.act(self.gate(x)) * self.up(x)))))


class Upwards(Again):
    """What was multiplied is one more layer behind."""

    def forward(self, x):
        return self.up(self.act(self.gate(x)) * self.up(x))


MODULES = [Mlp, Called, Gated, Swapped, lambda: Gated(bias=True), Behind, Again, Upwards]


def fused(model):
    """A copy whose layers are sparse, and that is one chain."""
    fast = sparse(model)
    steps = SparseMlp.sequence(fast)
    swap(fast, SparseMlp)
    (chain,) = fast.fuse({(0, len(steps)): products.ALL})
    assert len(steps) >= 2
    assert len(chain.layers) >= 2
    return fast


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("n", [1, 3, 9, 16, 45, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_is_the_module_that_it_was(isa, calls, kind, n, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model, x = thin(kind(), 0.5), torch.randn(n, 24)
    fast = fused(model)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            assert off(fast(x), exact) <= 1e-5
    assert calls == [{Mlp: 2, Called: 2, Again: 4}.get(type(model), 3)] * 2


@pytest.mark.parametrize("kind", MODULES)
def test_by_code(isa, calls, kind):
    model, x = thin(kind(), 0.5), torch.randn(50, 24)
    fast = sparse(model)
    for layer in (m for m in fast.modules() if isinstance(m, nn.Linear)):
        layer._codes["weight"] = native.generate(layer.packed_weight, run=1 if native.generates() else 2)
        layer.choose(products.ALL, products.ALL)
    steps = SparseMlp.sequence(fast)
    swap(fast, SparseMlp)
    fast.fuse({(0, len(steps)): products.ALL})
    assert off(fast(x), copy.deepcopy(model).double()(x.double()).detach()) <= 1e-5
    assert len(calls) == 1


def test_what_is_read():
    assert mlps.read(sparse(thin(Mlp()))) == ("fc1", 3, "fc2", "drop")
    assert mlps.read(sparse(thin(Called()))) == ("fc1", 4, 0, "fc2", 7)
    assert mlps.read(sparse(thin(Gated()))) == (("gate", "act", "up"), "down")
    assert mlps.read(sparse(thin(Swapped()))) == (("gate", 3, "up"), "down")
    assert mlps.read(thin(Mlp())) == ()  # not packed
    assert mlps.read(sparse(thin(Mlp())).train()) is None


class Twice(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) * 2


class Residual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class Square(Gated):
    def forward(self, x):
        return self.down(self.gate(x) * self.gate(x))


class Self(Gated):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.gate(x))


class Both(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.act(self.up(x)))


class Branches(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) if x.sum() > 0 else self.fc2(self.fc1(x))


class Counts(Mlp):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class InPlace(Mlp):
    def forward(self, x):
        return self.fc2(self.fc1(F.relu(x, inplace=True)))


class Far(nn.Module):
    """Its layers are those of another."""

    def __init__(self):
        super().__init__()
        self.inner, self.a, self.b = Mlp(), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", [Twice, Residual, Square, Self, Both, Branches, Counts, InPlace, Far])
def test_what_is_more_than_a_chain_is_none(kind):
    assert mlps.read(sparse(thin(kind(), 0.5))) == ()


def test_what_changes_goes_its_own_way(isa, calls):
    model = thin(Mlp(), 0.5)
    changes = {
        "a hook": lambda m: m.act.register_forward_hook(lambda *_: seen.append(1)),
        "an attribute": lambda m: setattr(m.act, "act", F.elu),
        "a module": lambda m: setattr(m, "act", nn.ELU().eval()),
        "a new name": lambda m: setattr(m, "other", 3),
        "a forward": lambda m: setattr(m.fc1, "forward", lambda x: torch.ones(len(x), 40)),
    }
    for name, change in changes.items():
        seen, fast, plain = [], fused(model), sparse(model)
        fast(X)
        for one in (fast, plain):
            change(one)
        assert off(fast(X), plain(X)) <= 1e-6, name
        assert len(seen) == (2 if name == "a hook" else 0)
    assert calls == [2] * 5


def test_another_class_or_forward_is_noticed(isa, calls, monkeypatch):
    model = thin(nn.Sequential(Called(), Gated()), 0.5)
    block, gated = fused(model[0]), fused(model[1])
    assert off(block(X), model[0](X).detach()) <= 1e-5
    assert off(gated(X), model[1](X).detach()) <= 1e-5
    assert len(calls) == 2
    monkeypatch.setattr(Called, "forward", lambda self, x: self.fc1(x).cos())
    gated.act.__class__ = model[1].act.__class__ = nn.Tanh
    assert off(block(X), model[0](X).detach()) <= 1e-5
    assert off(gated(X), model[1](X).detach()) <= 1e-5
    assert len(calls) == 2


def test_what_stands_in_the_way_in_its_class_is_noticed(isa, calls, monkeypatch):
    model = thin(Gated(), 0.5)
    fast = fused(model)
    assert off(fast(X), model(X).detach()) <= 1e-5
    monkeypatch.setattr(Gated, "act", staticmethod(torch.tanh), raising=False)
    for _ in range(3):  # the second is looked at
        assert off(fast(X), model(X).detach()) <= 1e-5
    assert calls == [3]


def test_as_it_was_again_it_is_one_call_again(isa, calls):
    fast = fused(thin(Mlp(), 0.5))
    reference = fast(X)
    fast.train()
    with pytest.raises(StateError, match=r"fast\.eval\(\)"):
        fast(X)
    assert fast.eval()(X).equal(reference)
    handle = fast.fc1.register_forward_pre_hook(lambda *_: None)
    fast(X)
    handle.remove()
    assert fast(X).equal(reference)
    assert calls == [2] * 3
    fast.fc2.weight.data *= 2
    with pytest.raises(StateError, match="weights of fc2 have changed"):
        fast(X)


@pytest.mark.parametrize("kind", [Mlp, Gated])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_anew(isa, calls, kind, make):
    model = thin(kind(), 0.5)
    fast = fused(model)
    assert_copies_give_the_same(make, fast, X)
    assert len(calls) == 3
    changed = make(fast)
    changed.act = nn.ELU().eval()
    model.act = nn.ELU()
    assert off(changed(X), model(X).detach()) <= 1e-5
    assert off(changed(X), model(X).detach()) <= 1e-5
    assert len(calls) == 3
    assert list(changed.state_dict()) == list(model.state_dict())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Gated(), Twice()])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_accelerate_chooses_and_tells(isa, calls, sparse_wins):
    model = thin(Model(), 0.5)
    fast = sc.accelerate(model, X)
    runs = [plan for plan in fast.plan.layers if plan.run]
    assert [(plan.name, plan.kind, plan.shape) for plan in runs] == [
        ("blocks.0[:]", "Mlp", (24, 40, 24)),
        ("blocks.1[:]", "Gated", (24, 40, 24)),
    ]
    calls.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert calls == [2, 3]
    again = sc.accelerate(model, X, plan=fast.plan.to_dict())
    assert off(again(X), model(X).detach()) <= 1e-5
    sc.runtime.trust_weights(fast)
    fast(X)
    assert calls == [2, 3] * 3
    assert_alike(sc.dense(fast), model)


def test_layers_without_dense_weights_are_one_call_too(isa, calls, sparse_wins):
    model = without_negative_zeros(thin(Model(), 0.5))
    fast = sc.accelerate(model, X, keep_dense=False)
    calls.clear()
    for one in (fast, copy.deepcopy(fast), fast):
        assert off(one(X), model(X).detach()) <= 1e-5
    assert calls == [2, 3] * 3
    assert all(weight.equal(model.state_dict()[name]) for name, weight in fast.state_dict().items())


def test_the_whole_model_may_be_one(isa, calls, sparse_wins):
    model = thin(Gated(), 0.5)
    fast = sc.accelerate(model, X)
    assert [plan.name for plan in fast.plan.layers if plan.run] == ["[:]"]
    calls.clear()
    for one in (fast, pickle.loads(pickle.dumps(fast))):
        assert off(one(X), model(X).detach()) <= 1e-5
        assert one(X).equal(fast(X))
    assert calls == [3] * 6


def test_other_calls_are_its_own(isa, calls):
    model = thin(Mlp(), 0.5)
    fast = fused(model)
    assert off(fast(x=X), model(X).detach()) <= 1e-5
    assert not calls
    with pytest.raises(TypeError, match="positional"):
        fast(X, X)
    torch._dynamo.reset()
    assert off(torch.compile(fast, backend="eager", fullgraph=True)(X), model(X).detach()) <= 1e-5
    assert off(torch.vmap(fast)(X[None]), model(X)[None].detach()) <= 1e-5
    assert not calls


class Clamps(Mlp):
    """Does something else where it is traced."""

    def forward(self, x):
        return super().forward(x.clamp(0, 1) if torch.is_tensor(x) else x)


def test_what_computes_something_else_is_given_up(isa, calls, sparse_wins, monkeypatch):
    monkeypatch.setattr(Watch, "_code_is_fine", lambda *_: True)  # as if nothing were seen in its code
    model = thin(nn.Sequential(Mlp(), Clamps()), 0.5)
    inside, outside = X.sigmoid(), X * 3
    for examples in (outside, [inside, outside]):  # of inputs below 1 both do the same
        fast = sc.accelerate(model[1], examples)
        (run,) = [plan for plan in fast.plan.layers if plan.run]
        assert run.reason == "as one call it computes something else"
        assert type(fast) is Clamps
        assert off(fast(outside), model[1](outside).detach()) <= 1e-5
    plan = sc.accelerate(model[1], inside).plan
    assert [run.choices > 0 for run in plan.layers if run.run] == [True]
    fast = sc.accelerate(model[1], outside, plan=plan)
    assert [run.reason for run in fast.plan.layers if run.run] == ["as one call it computes something else"]
    assert off(fast(outside), model[1](outside).detach()) <= 1e-5
    fast = sc.accelerate(model, outside)
    assert [plan.name for plan in fast.plan.layers if plan.run and plan.choices] == ["0[:]"]
    calls.clear()
    assert off(fast(outside), model(outside).detach()) <= 1e-5
    assert calls == [2]
