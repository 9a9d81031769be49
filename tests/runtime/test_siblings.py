"""Q, K and V as one native call: the results of each for itself, and each for itself wherever that matters."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import StateError
from secateur.runtime import native, products, siblings
from secateur.runtime.linears import around
from secateur.runtime.siblings import SparseParent
from secateur.runtime.swapping import swap
from sparse_models import assert_alike, off, sparse, thin, without_negative_zeros

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no native library"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its calls stand"),
]

X = torch.randn(5, 24)


class Attention(nn.Module):
    def __init__(self, bias=True, narrow=24):
        super().__init__()
        self.q, self.out = nn.Linear(24, 24, bias=bias), nn.Linear(24, 24)
        self.k, self.v = nn.Linear(24, narrow), nn.Linear(24, narrow, bias=bias)
        self.heads = 2

    def forward(self, x, scale=1, **others):
        shape = (*x.shape[:-1], -1, 12)
        q = self.q(x).view(shape).transpose(0, 1)
        k = self.k(x).view(shape).transpose(0, 1)
        v = self.v(x).view(shape).transpose(0, 1)
        seen = F.scaled_dot_product_attention(q * scale, k, v, enable_gqa=True)
        return self.out(seen.transpose(0, 1).flatten(1))


class Writes(Attention):
    """Writes to its input between two layers."""

    def forward(self, x):
        q = self.q(x)
        x.mul_(2)
        return q + self.k(x) + self.v(x)


class Catches(Attention):
    """Goes on after an error between two layers, with another input in the same tensor."""

    def forward(self, x):
        for wrong in (True, False):
            try:
                q = self.q(x).view(7 if wrong else -1)
                k = self.k(x)
                return q.sum() + k
            except RuntimeError:
                x.mul_(2)
        return None


class Fails(Attention):
    def forward(self, x):
        q = self.q(x).view(7, 7)
        return q, self.k(x), self.v(x)


KINDS = [Attention, lambda: Attention(bias=False), lambda: Attention(narrow=12)]


@pytest.fixture
def together(monkeypatch):
    """How many layers each native call had that computed siblings."""
    seen, before = [], products.several

    def several(*given):
        outs = before(*given)
        seen.extend([len(outs)] if outs is not None else [])
        return outs

    monkeypatch.setattr(products, "several", several)
    return seen


def spans(module):
    return SparseParent.spans(module, SparseParent.sequence(module))


def fused(model, choices=products.ALL):
    """A copy whose layers are sparse, and whose siblings are one call."""
    fast = sparse(model)
    swap(fast, SparseParent)
    fast.fuse(dict.fromkeys(spans(fast), choices))
    return fast


def each(fast):
    """A copy in which each layer runs for itself."""
    one = copy.deepcopy(fast)
    one.restore()
    return one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3, 9, 16, 45, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_bit_for_bit_as_each_for_itself(isa, together, kind, n, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model, x = thin(kind(), 0.5), torch.randn(n, 24)
    fast = fused(model)
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            assert fast(x).equal(each(fast)(x))
            assert off(fast(x, scale=1, other=2), model(x).detach()) <= 1e-5
    assert together == [3] * 4
    assert around.call is None


@pytest.mark.parametrize("coded", [("q", "k", "v"), ("q", "v")])
@pytest.mark.parametrize("n", [11, 12, 50, 70])
def test_by_code(isa, together, coded, n):
    model, x = thin(Attention(), 0.5), torch.randn(n, 24)
    fast = fused(model)
    for name in coded:
        layer = getattr(fast, name)
        layer._codes["weight"] = native.generate(layer.packed_weight, run=1 if native.generates() else 2)
        layer.choose(products.ALL, products.ALL)
    single = each(fast)
    for name in coded:  # a copy makes its code anew, which cannot run everywhere
        getattr(single, name)._codes = getattr(fast, name)._codes
    assert fast(x).equal(single(x))
    assert off(fast(x), model(x).detach()) <= 1e-5
    assert together == [3] * 2


def test_rows_that_were_not_chosen_run_each_for_itself(isa, together):
    fast = fused(thin(Attention(), 0.5), choices=1 << products.bucket(5))
    fast(X)
    fast(torch.randn(9, 24))
    assert together == [3]


@pytest.mark.parametrize("kind", [Writes, Catches])
def test_who_writes_in_between_is_seen(isa, kind):
    model = thin(kind(), 0.5)
    fast = fused(model)
    with torch.inference_mode():
        for _ in range(2):
            given, other = X.clone(), X.clone()
            assert off(fast(given), model(other)) <= 1e-5
            assert given.equal(other)


def _writes(module, args, *_):
    args[0].mul_(2)


def _hook(fast, model):
    for one in (fast, model):
        one.k.register_forward_hook(_writes)


def _pre_hook(fast, model):
    for one in (fast, model):
        one.v.register_forward_pre_hook(_writes)


def _own_forward(fast, model):
    for one in (fast, model):
        one.k.forward = lambda x, one=one: F.linear(x.mul_(2), one.k.weight)


def _another_layer(fast, model):
    model.k = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(24, 24)).eval()
    fast.k = copy.deepcopy(model.k)


def _in_the_way(fast, model):
    for one in (fast, model):
        vars(one)["k"] = lambda x, one=one: one._modules["k"](x.mul_(2))


def _swapped(fast, model):
    for one in (fast, model):
        one.q, one.v = one.v, one.q


CHANGES = [_hook, _pre_hook, _own_forward, _another_layer, _in_the_way, _swapped]


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_write_has_each_run_for_itself(isa, together, change):
    model = thin(Attention(), 0.5)
    fast = fused(model)
    with torch.inference_mode():
        assert off(fast(X), model(X)) <= 1e-5
        assert together == [3]
        change(fast, model)
        given, other = X.clone(), X.clone()
        assert off(fast(given), model(other)) <= 1e-5
        assert given.equal(other)
    assert together == [3]


def _reads(self):
    return lambda x: self._modules["k"](x.mul_(2))


def _found(self, name):
    return _reads(self) if name == "k" else nn.Module.__getattr__(self, name)


@pytest.mark.parametrize("change", [{"k": property(_reads)}, {"__getattr__": _found}])
def test_what_comes_to_be_in_the_way_in_a_class(isa, together, monkeypatch, change):
    model = thin(Attention(), 0.5)
    fast = fused(model)
    fast(X)
    assert together == [3]
    for name, value in change.items():
        monkeypatch.setattr(Attention, name, value, raising=False)
    given, other = X.clone(), X.clone()
    with torch.inference_mode():
        assert off(fast(given), model(other)) <= 1e-5
    assert given.equal(other)
    assert together == [3]


def test_an_input_that_is_let_go_is_freed(isa, together):
    class Normed(Attention):
        def forward(self, x):
            x = x + 1
            seen.append(weakref.ref(x))
            q = self.q(x)
            k = self.k(x)
            del x
            seen.append(seen[0]())
            return q + k

    seen = []
    fused(thin(Normed(), 0.5))(X)
    assert together == [2]
    assert seen[1] is None


def test_a_number_that_is_none_any_more(isa, together):
    class Headed(Attention):
        def forward(self, x):
            return self.q(x).unflatten(-1, (self.heads, -1)), self.k(x)

    class Writer(int):
        def __index__(self):
            X_HERE.mul_(2)
            return 2

    X_HERE = X.clone()
    fast = fused(thin(Headed(), 0.5))
    fast(X_HERE)
    assert together == [2]
    fast.heads = Writer(2)
    fast(X_HERE)
    assert together == [2]


def test_another_forward_of_the_class(isa, together, monkeypatch):
    model = thin(Attention(), 0.5)
    fast = fused(model)
    monkeypatch.setattr(Attention, "forward", lambda self, x: self.k(x) + self.v(x) + self.q(x))
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert not together


def test_nothing_is_kept(isa, monkeypatch):
    fast = fused(thin(Fails(), 0.5))
    made = []

    def several(*given, before=products.several):
        outs = before(*given)
        made.extend(map(weakref.ref, outs))
        return outs

    monkeypatch.setattr(products, "several", several)
    with pytest.raises(RuntimeError, match="shape"):
        fast(X)
    gc.collect()
    assert len(made) == 3
    assert [one() for one in made] == [None] * 3
    assert around.call is None


def test_threads_share_a_model(isa, together):
    model = thin(Attention(), 0.5)
    fast = fused(model)
    inputs = [torch.randn(5, 24) for _ in range(8)]
    expected = [each(fast)(x) for x in inputs]
    wrong = []

    def run(x, right):
        for _ in range(50):
            if not fast(x).equal(right):
                wrong.append(x)

    threads = [threading.Thread(target=run, args=given) for given in zip(inputs, expected, strict=True)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
    assert together == [3] * 400


def test_modules_within_modules(isa, together):
    class Outer(Attention):
        def __init__(self):
            super().__init__()
            self.inner = Attention()

        def forward(self, x):
            q = self.q(x)
            k = self.k(self.inner(x))
            return q + k + super().forward(x)

    model = thin(Outer(), 0.5)
    fast = fused(model)
    fast.inner = fused(model.inner)
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert together == [3]  # of the inner one: that of `super` is another function


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_do_so_too(isa, together, make):
    fast = fused(thin(Attention(), 0.5))
    reference = fast(X)
    assert make(fast)(X).equal(reference)
    again = make(make(fast))
    fast.q.bias.data += 1
    assert again(X).equal(reference)
    assert together == [3] * 3
    assert list(again.state_dict()) == list(fast.state_dict())


def test_changed_weights_and_gradients_are_errors(isa):
    fast = fused(thin(Attention(), 0.5))
    with pytest.raises(StateError, match=r"fast\.eval\(\)"):
        fast(X.clone().requires_grad_())
    fast.k.weight.data *= 2
    with pytest.raises(StateError, match="weights of k have changed"):
        fast(X)


def test_modes_of_torch(isa, together):
    model = thin(Attention(), 0.5)
    fast = fused(model)
    torch._dynamo.reset()
    assert off(torch.compile(fast, backend="eager", fullgraph=True)(X), model(X).detach()) <= 1e-5
    assert off(torch.vmap(fast)(X[None]), model(X)[None].detach()) <= 1e-5
    with torch.autocast("cpu"), pytest.warns(match="autocast is on"):
        fast(X)
    assert not together


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Writes(), Attention(narrow=12)])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x.clone())
        return x


def test_accelerate_chooses_and_tells(isa, together, sparse_wins):
    model = thin(Model(), 0.5)
    fast = sc.accelerate(model, X)
    runs = [plan for plan in fast.plan.layers if plan.run]
    assert [(plan.name, plan.kind, plan.shape) for plan in runs] == [
        ("blocks.0[q, k, v]", "Attention", (24, 72)),
        ("blocks.1[k, v]", "Writes", (24, 48)),
        ("blocks.2[q, k, v]", "Attention", (24, 48)),
    ]
    assert "several layers" in str(fast.plan)
    together.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    again = sc.accelerate(model, X, plan=fast.plan.to_dict())
    assert off(again(X), model(X).detach()) <= 1e-5
    sc.runtime.trust_weights(fast)
    fast(X)
    assert together == [3, 2, 3] * 3
    assert_alike(sc.dense(fast), model)


def test_layers_without_dense_weights_are_one_call_too(isa, together, sparse_wins):
    model = without_negative_zeros(thin(Model(), 0.5))
    fast = sc.accelerate(model, X, keep_dense=False)
    together.clear()
    for one in (fast, copy.deepcopy(fast), fast):
        assert off(one(X), model(X).detach()) <= 1e-5
    assert together == [3, 2, 3] * 3


def test_only_layers_of_as_many_inputs(isa):
    model = Attention()
    model.k = nn.Linear(12, 24)
    fast = sparse(thin(model, 0.5))
    assert spans(fast) == []
    model.k = nn.Linear(24, 24)
    assert spans(sparse(thin(model, 0.5))) == [(0, 3)]
    assert spans(model) == []  # not packed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Bert", "Llama", "ViT", "DistilBert"])
def test_models_of_transformers(isa, together, sparse_wins, name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
    own = {
        "Llama": {"num_key_value_heads": 1},
        "ViT": {"image_size": 8, "patch_size": 4},
        "DistilBert": {"dim": 24, "n_heads": 2, "n_layers": 2, "hidden_dim": 40},
    }.get(name, {})
    if name != "ViT":
        own["vocab_size"] = 50
    config = getattr(transformers, f"{name}Config")(**(own if name == "DistilBert" else {**sizes, **own}))
    model = thin(getattr(transformers, f"{name}Model")(config).eval(), 0.5)
    given = {"pixel_values": torch.randn(2, 3, 8, 8)} if name == "ViT" else {"input_ids": torch.arange(18).view(2, 9)}
    fast = sc.accelerate(model, given)
    together.clear()
    with torch.inference_mode():
        assert off(fast(**given).last_hidden_state, model(**given).last_hidden_state) <= 1e-5
    assert together == [3, 3]


def test_without_the_source_there_are_none(isa, monkeypatch):
    monkeypatch.setattr(siblings, "neighbours", lambda code, names: ())
    fast = sparse(thin(Attention(), 0.5))
    assert spans(fast) == []
