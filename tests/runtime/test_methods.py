"""Methods that begin with a chain: one native call and what follows, and the method itself wherever that matters."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import StateError
from secateur.runtime import methods, native, products
from secateur.runtime.forwards import Watch
from secateur.runtime.methods import SparseMethod
from secateur.runtime.swapping import swap
from sparse_models import assert_alike, assert_copies_give_the_same, off, sparse, thin, without_negative_zeros

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")

X = torch.randn(5, 24)


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.act = nn.Linear(24, 40), nn.GELU()

    def forward(self, x):
        return self.act(self.dense(x))


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.drop, self.norm = nn.Linear(40, 24), nn.Dropout(0.5), nn.LayerNorm(24)

    def forward(self, x, residual):
        return self.norm(self.drop(self.dense(x)) + residual)


class Block(nn.Module):
    """As a layer of BERT: its forward does more than can be traced, its method does not."""

    def __init__(self):
        super().__init__()
        self.up, self.down = Up(), Down()

    def forward(self, x, mask=None, **others):
        if mask is not None and bool(mask.any()):
            x = x * mask
        return self.feed(x)

    def feed(self, x):
        hidden = self.up(x)
        return self.down(hidden, residual=x)


class Flat(nn.Module):
    """As a layer of ALBERT: its method is a run and nothing else."""

    def __init__(self):
        super().__init__()
        self.lin1, self.act, self.lin2 = nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 24)

    def forward(self, x, mask=None, **others):
        return self.feed(x if mask is None else x * mask) + x

    def feed(self, x):
        x = self.lin1(x)
        x = self.act(x)
        return self.lin2(x)


class InPlace(Down):
    """Writes to what the layer is given, behind the run."""

    def forward(self, x, residual):
        residual += self.dense(x)
        return residual


class Writes(Block):
    def __init__(self):
        super().__init__()
        self.down = InPlace()


def fused(model):
    """A copy whose layers are sparse, and whose method is one call and a rest."""
    fast = sparse(model)
    steps = SparseMethod.sequence(fast)
    swap(fast, SparseMethod)
    (chain,) = fast.fuse({(0, len(steps)): products.ALL})
    assert len(chain.layers) == 2
    return fast


@pytest.mark.parametrize("kind", [Block, Flat])
@pytest.mark.parametrize("n", [1, 3, 16, 45])
def test_is_the_method_that_it_was(isa, calls, kind, n):
    model, x = thin(kind(), 0.5), torch.randn(n, 24)
    fast = fused(model)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            assert off(fast(x, None), exact) <= 1e-5
            assert off(fast.feed(x), fast.plain.feed(fast, x)) <= 1e-5
    assert calls == [2] * 4


def test_what_is_written_behind_the_run_is_written(isa, calls):
    model = thin(Writes(), 0.5)
    fast = fused(model)
    with torch.inference_mode():
        given, other = X.clone(), X.clone()
        found = fast(given)
        assert found is given
        assert off(found, model(other)) <= 1e-5
    assert calls == [2]


def test_what_is_read():
    def read(model):
        found = methods.read(model)
        return None if found is None else found[1][:2]

    assert read(sparse(thin(Block()))) == ("feed", ("up.dense", "up.act", "down.dense", "down.drop"))
    assert read(sparse(thin(Flat()))) == ("feed", ("lin1", "act", "lin2"))
    *_, rest = methods.read(sparse(thin(Flat())))
    assert rest(1, 2) == 2
    assert read(thin(Block())) is None  # not packed
    assert read(sparse(thin(Block())).train()) is None


class Counts(Block):
    def feed(self, x):
        self.count = 1
        return super().feed(x)


class Unnamed(Block):
    def forward(self, x):
        return self.down(self.up(x), x)


class Saves(Block):
    def feed(self, x):
        hidden = self.up(x)
        torch.save(hidden, "nowhere")
        return self.down(hidden, x)


class Second(Block):
    def feed(self, x, scale=1):
        return self.down(self.up(x), x)


class Passes(Block):
    def feed(self, x):
        return self.down(self.up(x), self)


class Normed(Block):
    """The run is not what it begins with."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)

    def feed(self, x):
        return self.down(self.up(self.norm(x)), x)


class Seen(Up):
    """What is between the layers is used once more."""

    def forward(self, x):
        hidden = self.dense(x)
        return F.gelu(hidden) * hidden.mean()


class Uses(Block):
    def __init__(self):
        super().__init__()
        self.up = Seen()


class Earlier(Down):
    """Writes to the input before the second layer."""

    def forward(self, x, residual):
        residual.mul_(2)
        return self.dense(x) + residual


class WritesEarlier(Block):
    def __init__(self):
        super().__init__()
        self.down = Earlier()


NOT = [Counts, Unnamed, Second, Normed, Uses, WritesEarlier]


@pytest.mark.parametrize("kind", NOT)
def test_what_is_no_run_is_left_alone(calls, sparse_wins, kind):
    model = thin(kind(), 0.5)
    fast = sc.accelerate(model, X.clone())
    assert not [plan for plan in fast.plan.layers if plan.run]
    with torch.inference_mode():
        assert off(fast(X.clone()), model(X.clone())) <= 1e-5
    assert type(fast) is kind
    assert not calls


@pytest.mark.parametrize("kind", [Counts, Saves, Passes])
def test_a_method_that_does_more_is_not_called_to_be_looked_at(kind):
    fast = sparse(thin(kind(), 0.5))
    assert methods.read(fast) is None
    assert not hasattr(fast, "count")


def _another_module(fast, model):
    fast.up.act = model.up.act = nn.ReLU()


def _another_block(fast, model):
    model.down = thin(Down(), 0.5)
    fast.down = copy.deepcopy(model.down)


def _hook(fast, model):
    for one in (fast, model):
        one.up.register_forward_hook(lambda module, args, out: out + 1)


def _attribute(fast, model):
    fast.down.norm.eps = model.down.norm.eps = 1.0


def _own_forward(fast, model):
    for one in (fast, model):
        one.up.forward = one.up.dense.forward


def _class(fast, model):
    fast.up.act.__class__ = model.up.act.__class__ = nn.Tanh


def _in_the_way(fast, model):
    for one in (fast, model):
        vars(one)["up"] = lambda x, one=one: F.relu(one._modules["up"].dense(x))


CHANGES = [_another_module, _another_block, _hook, _attribute, _own_forward, _class, _in_the_way]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_noticed(isa, calls, change):
    model = thin(Block(), 0.5)
    fast = fused(model)
    with torch.inference_mode():
        assert off(fast(X), model(X)) <= 1e-5
        assert calls == [2]
        change(fast, model)
        assert off(fast(X), model(X)) <= 1e-5
    assert calls == [2]


def test_a_change_that_stays_is_looked_at_anew(isa, calls):
    model = thin(Block(), 0.5)
    fast = fused(model)
    assert off(fast(X), model(X).detach()) <= 1e-5
    _attribute(fast, model)
    for count in (1, 2, 3):
        assert off(fast(X), model(X).detach()) <= 1e-5
        assert calls == [2] * count  # one call again from the second on


def test_another_method_is_noticed(isa, calls, monkeypatch):
    model = thin(Block(), 0.5)
    fast = fused(model)
    monkeypatch.setattr(Block, "feed", lambda self, x: self.up(x).cos())
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert not calls


def _ones(x):
    return x.new_ones(len(x), 40)


def _found(self, name):
    return _ones if name == "up" else nn.Module.__getattr__(self, name)


def _always_found(self, name):
    return _ones if name == "up" else object.__getattribute__(self, name)


IN_CLASSES = {"up": staticmethod(_ones), "__getattr__": _found, "__getattribute__": _always_found}


@pytest.mark.parametrize("name", IN_CLASSES)
def test_what_stands_in_the_way_in_a_class_is_noticed(isa, calls, monkeypatch, name):
    class Own(Block):
        pass

    model = thin(Own(), 0.5)
    fast = fused(model)
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert calls == [2]
    monkeypatch.setattr(Block, name, IN_CLASSES[name], raising=False)
    for _ in range(3):
        assert off(fast(X), model(X).detach()) <= 1e-5
    assert calls == [2]


def test_changed_weights_and_training_are_errors(isa):
    fast = fused(thin(Block(), 0.5))
    with pytest.raises(StateError, match=r"fast\.eval\(\)"):
        fast.train()(X)
    assert fast.eval()(X).isfinite().all()
    fast.down.dense.weight.data *= 2
    with pytest.raises(StateError, match=r"weights of down\.dense have changed"):
        fast(X)


@pytest.mark.parametrize("kind", [Block, Flat])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_anew(isa, calls, kind, make):
    model = thin(kind(), 0.5)
    fast = fused(model)
    assert_copies_give_the_same(make, fast, X)
    assert len(calls) == 3
    changed = make(fast)
    layer = (model.up, changed.up) if kind is Block else (model, changed)
    for one in layer:
        one.act = nn.ELU().eval()
    assert off(changed(X), model(X).detach()) <= 1e-5
    assert len(calls) == 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Flat()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, mask=None, others=1)
        return x


def test_accelerate_chooses_and_tells(isa, calls, sparse_wins):
    model = thin(Model(), 0.5)
    fast = sc.accelerate(model, X)
    runs = [plan for plan in fast.plan.layers if plan.run]
    assert [(plan.name, plan.kind, plan.shape) for plan in runs] == [
        ("blocks.0[feed]", "Block", (24, 40, 24)),
        ("blocks.1[feed]", "Flat", (24, 40, 24)),
    ]
    calls.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    again = sc.accelerate(model, X, plan=fast.plan.to_dict())
    assert off(again(X), model(X).detach()) <= 1e-5
    sc.runtime.trust_weights(fast)
    fast(X)
    assert calls == [2] * 6
    assert_alike(sc.dense(fast), model)


def test_layers_without_dense_weights_are_one_call_too(isa, calls, sparse_wins):
    model = without_negative_zeros(thin(Model(), 0.5))
    fast = sc.accelerate(model, X, keep_dense=False)
    calls.clear()
    for one in (fast, copy.deepcopy(fast), fast):
        assert off(one(X), model(X).detach()) <= 1e-5
    assert calls == [2] * 6


def test_other_calls_are_its_own(isa, calls):
    model = thin(Block(), 0.5)
    fast = fused(model)
    assert off(fast.feed(x=X), model(X).detach()) <= 1e-5
    with pytest.raises(TypeError, match="positional"):
        fast.feed(X, X)
    torch._dynamo.reset()
    assert off(torch.compile(fast, backend="eager", fullgraph=True)(X), model(X).detach()) <= 1e-5
    assert off(torch.vmap(fast)(X[None]), model(X)[None].detach()) <= 1e-5
    assert not calls


def test_what_computes_something_else_is_given_up(isa, calls, sparse_wins, monkeypatch):
    class Clamps(Up):
        def forward(self, x):
            return super().forward(x.clamp(0, 1) if torch.is_tensor(x) else x)

    monkeypatch.setattr(Watch, "_code_is_fine", lambda *_: True)  # as if nothing were seen in its code
    model = Block()
    model.up = Clamps()
    fast = sc.accelerate(thin(model, 0.5), X * 3)
    (run,) = [plan for plan in fast.plan.layers if plan.run]
    assert run.reason == "as one call it computes something else"
    assert off(fast(X * 3), model(X * 3).detach()) <= 1e-5
    assert type(fast) is Block


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_bert(isa, calls, sparse_wins):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    thin(model.encoder, 0.5)
    words = torch.randint(0, 50, (2, 9))
    fast = sc.accelerate(model, {"input_ids": words})
    assert [plan.name for plan in fast.plan.layers if plan.run and plan.name.endswith("chunk]")] == [
        "encoder.layer.0[feed_forward_chunk]",
        "encoder.layer.1[feed_forward_chunk]",
    ]
    calls.clear()
    with torch.inference_mode():
        assert off(fast(words).last_hidden_state, model(words).last_hidden_state) <= 1e-5
    assert calls == [2, 2]
