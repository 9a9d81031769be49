"""Transformer layers that do not go past their sparse layers, and whose feed-forward block is one call."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import StateError
from secateur.runtime import chains, native, products, tuning
from secateur.runtime.attention import SparseMultiheadAttention
from secateur.runtime.kernel_plans import Gain
from secateur.runtime.swapping import Swapped, swap
from secateur.runtime.transformer_layers import (
    FUSED,
    SparseTransformerDecoderLayer,
    SparseTransformerEncoder,
    SparseTransformerEncoderLayer,
)
from sparse_models import assert_alike, fake_times, off, sparse, thin

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
needs_native = pytest.mark.skipif(native.library() is None, reason="no native library")


def encoder(depth=2, norm=None, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, **options)
    return thin(nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=not options), 0.7)


PADDING = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [2]])


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_encoder(backend, options, mode):
    model, x = encoder(**options), torch.randn(3, 6, 24)
    fast = sparse(model)
    assert isinstance(fast, SparseTransformerEncoder)
    assert isinstance(fast.layers[0], SparseTransformerEncoderLayer)
    assert isinstance(fast.layers[0].self_attn, SparseMultiheadAttention)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    with mode():
        for kwargs in ({}, {"mask": causal}, {"mask": causal, "is_causal": True}, {"src_key_padding_mask": PADDING}):
            assert off(fast(x, **kwargs), model(x, **kwargs).detach()) <= 1e-5


@pytest.mark.parametrize("norm", [None, "norm"])
@pytest.mark.parametrize("kind", ["bool", "float", "not aligned", "all kept"])
def test_the_padding_is_what_it_was(backend, norm, kind):
    model, x = encoder(norm=norm and nn.LayerNorm(24)), torch.randn(3, 6, 24)
    if norm:
        nn.init.normal_(model.norm.bias)
    padding = {
        "bool": PADDING,
        "float": torch.zeros(3, 6).masked_fill(PADDING, -torch.inf),
        "not aligned": PADDING.flip(1),
        "all kept": torch.zeros(3, 6, dtype=torch.bool),
    }[kind]
    with torch.inference_mode():
        got, reference = sparse(model)(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding)
    assert off(got, reference) <= 1e-5


def test_the_fused_road_is_not_taken(backend, monkeypatch):
    fast, x = sparse(encoder()), torch.randn(3, 6, 24)
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", None)
    monkeypatch.setattr(torch, "_native_multi_head_attention", None)
    with torch.inference_mode():
        fast(x)
        fast(x, src_key_padding_mask=PADDING)


def test_decoder(backend):
    torch.manual_seed(0)
    model = thin(nn.Transformer(24, 4, 1, 2, 48, batch_first=True), 0.7)
    fast = sparse(model)
    for m in fast.modules():
        if isinstance(m, SparseMultiheadAttention):
            m._apart = True
            m.pack()
    src, tgt = torch.randn(3, 6, 24), torch.randn(3, 4, 24)
    with torch.inference_mode():
        assert off(fast(src, tgt), model(src, tgt)) <= 1e-5


def test_transformer_layers_come_back(backend):
    model, x = encoder(), torch.randn(3, 6, 24)
    fast = sparse(model)
    for module in list(fast.modules()):
        if isinstance(module, Swapped):
            module.restore()
    with torch.inference_mode():
        assert fast(x, src_key_padding_mask=PADDING).equal(model(x, src_key_padding_mask=PADDING))
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]
    assert all(sorted(vars(a)) == sorted(vars(b)) for a, b in zip(fast.modules(), model.modules(), strict=True))


def test_only_what_holds_sparse_layers_is_swapped(backend):
    model = nn.ModuleList([encoder(1), encoder(1)])
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.normal_()
    fast = sparse(model)
    assert isinstance(fast[0], Swapped)
    assert not any(isinstance(m, Swapped) for m in fast[1].modules())


# ---- the feed-forward block as one call -------------------------------------------------------------------------


def decoder(depth=2, **options):
    torch.manual_seed(0)
    return thin(nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, 48, batch_first=True, **options), depth), 0.7)


def fused(model):
    """A copy whose layers are all sparse, and whose feed-forward blocks are all fused."""
    fast = sparse(model)
    for module in list(fast.modules()):
        for kind in FUSED[1:]:
            if kind.takes(module.plain if isinstance(module, Swapped) else type(module)):
                if isinstance(module, Swapped):
                    module.restore()
                swap(module, kind)
                module.fuse({(0, 4): products.ALL})
    return fast


ACTIVATIONS = ["relu", "gelu", F.silu, nn.GELU("tanh"), nn.Hardswish()]
X, MEMORY = torch.randn(3, 6, 24), torch.randn(3, 4, 24)


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_both_layers_in_one_call(isa, calls, activation, norm_first):
    for model, given in (
        (encoder(activation=activation, norm_first=norm_first), (X,)),
        (decoder(activation=activation, norm_first=norm_first), (X, MEMORY)),
    ):
        exact = copy.deepcopy(model).double()(*(x.double() for x in given))
        for mode in (torch.inference_mode, torch.enable_grad):
            with mode():
                assert off(fused(model)(*given), exact.detach()) <= 1e-5
    assert calls == [2] * 8


@needs_native
@pytest.mark.parametrize("name", ["linear1", "activation", "dropout", "linear2"])
def test_hooks_and_other_modules_are_called(isa, calls, name):
    fast, seen = fused(encoder(1, activation=nn.GELU())).layers[0], []
    reference = fast(X)
    handle = getattr(fast, name).register_forward_hook(lambda module, *_: seen.append(module))
    assert off(fast(X), reference) <= 1e-6
    assert seen == [getattr(fast, name)]
    assert calls == [2]
    handle.remove()
    setattr(fast, name, OTHERS[name]().eval().requires_grad_(False))
    steps = (fast.linear1, fast.activation, fast.dropout, fast.linear2)
    assert off(fast._ff_block(X), nn.Sequential.forward(steps, X)) <= 1e-5
    assert calls == ([2, 2] if name == "activation" else [2])


OTHERS = {
    "linear1": lambda: nn.Linear(24, 48),
    "activation": nn.ReLU,
    "dropout": nn.ELU,
    "linear2": lambda: nn.Linear(48, 24),
}


@needs_native
def test_an_activation_that_changes_counts(isa, calls):
    fast = fused(encoder(1)).layers[0]
    for activation in (F.gelu, F.elu, torch.tanh):
        fast.activation = activation
        assert off(fast._ff_block(X), fast.linear2(activation(fast.linear1(X)))) <= 1e-5
    assert calls == [2, 2]
    del fast.activation
    with pytest.raises(AttributeError, match="activation"):
        fast(X)


@needs_native
def test_training_and_changed_weights(isa, calls):
    fast = fused(encoder(1))
    with pytest.raises(StateError, match=r"fast\.eval\(\)"):
        fast.train()(X)
    with torch.no_grad():
        assert not fast._modules["layers"][0]._ff_block(X).equal(fast._modules["layers"][0]._ff_block(X))  # dropout
    assert not calls
    fast.eval()(X)
    fast.layers[0].linear2.weight.data *= 2
    for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with pytest.raises(StateError, match=r"weights of layers\.0\.linear2 have changed"):
            one(X)


@needs_native
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_too(isa, calls, make):
    for model, given in ((encoder(), (X,)), (decoder(), (X, MEMORY))):
        fast = fused(model)
        assert make(fast)(*given).equal(fast(*given))
        assert list(make(fast).state_dict()) == list(model.state_dict())
    assert calls == [2] * 8


@needs_native
def test_graphs_are_of_the_layers(calls):
    plain, fast = encoder(1).layers[0], fused(encoder(1)).layers[0]
    torch._dynamo.reset()
    compiled = torch.compile(fast._ff_block, backend="eager", fullgraph=True)
    assert off(compiled(X), plain._ff_block(X).detach()) <= 1e-5
    assert not calls


class Twice(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


class Named(nn.TransformerEncoderLayer):
    pass


@needs_native
def test_accelerate_chooses_and_tells(isa, calls, sparse_wins):
    layers = [kind(24, 4, 48, batch_first=True) for kind in (nn.TransformerEncoderLayer, Twice, Named)]
    model = thin(nn.Sequential(*layers), 0.7)
    fast = sc.accelerate(model, X)
    found = {plan.name: plan for plan in fast.plan.layers if plan.run}
    assert list(found) == ["0[linear1:linear2]", "2[linear1:linear2]"]
    assert {plan.kind for plan in found.values()} == {"TransformerEncoderLayer"}
    assert "24-48-24" in str(fast.plan)
    calls.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert calls == [2, 2]
    again = sc.accelerate(model, X, plan=fast.plan.to_dict())
    assert off(again(X), model(X).detach()) <= 1e-5
    assert calls == [2] * 4
    assert_alike(sc.dense(fast), model)


@needs_native
def test_no_faster_as_one(isa, calls, monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: (1.0, 1.0) if name.endswith("]") else (2.0, 1.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    for model, given in ((encoder(), (X,)), (decoder(), ((X, MEMORY),))):
        fast = sc.accelerate(model, *given)
        assert {plan.reason for plan in fast.plan.layers if plan.run} == {"not faster"}
        assert fast.layers[0]._fused == {} if isinstance(fast.layers[0], chains.Fused) else True
        assert isinstance(fast.layers[0], SparseTransformerEncoderLayer) == (len(given[0]) == 3)
        assert not isinstance(fast.layers[0], SparseTransformerDecoderLayer)
    assert not calls


@needs_native
def test_layers_that_look_at_their_inputs_are_not_fused(isa, calls, sparse_wins):
    model = encoder()
    fast = sc.accelerate(model, X, check_inputs=True)
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert not calls
    assert isinstance(fast.layers[0], SparseTransformerEncoderLayer)
