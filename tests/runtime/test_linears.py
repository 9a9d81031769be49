"""Sparse Linear layers in every use: shapes, modes, copies; and transformers' Conv1D."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from secateur.runtime import linears, swapping
from sparse_models import off, sparse, thin


@pytest.fixture
def layer():
    return thin(nn.Linear(17, 33))


@pytest.mark.parametrize("shape", [(17,), (5, 17), (2, 3, 17), (2, 2, 3, 17), (0, 17)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_is_the_layer_that_it_was(backend, layer, shape, mode):
    fast, x = sparse(layer), torch.randn(shape)
    with mode():
        got = fast(x)
    assert off(got, copy.deepcopy(layer).double()(x.double())) <= 1e-5
    assert isinstance(fast, nn.Linear)
    assert isinstance(fast, linears.SparseLinear)
    assert not got.requires_grad


def test_without_bias(backend):
    layer, x = thin(nn.Linear(17, 33, bias=False)), torch.randn(4, 17)
    assert off(sparse(layer)(x), layer(x)) <= 1e-5


def test_a_bias_that_changes_counts(backend, layer):
    fast, x = sparse(layer), torch.randn(4, 17)
    before = fast(x)
    fast.bias.add_(1)
    assert off(fast(x), before + 1) <= 1e-6


def test_wrong_width_is_refused_by_torch(backend, layer):
    with pytest.raises(RuntimeError, match="shapes"):
        sparse(layer)(torch.randn(4, 16))


def test_hooks_work(backend, layer):
    fast, seen = sparse(layer), []
    fast.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    fast.register_forward_hook(lambda module, args, out: out * 0)
    assert not fast(torch.randn(4, 17)).any()
    assert seen == [(4, 17)]


class Named(nn.Linear):
    """A subclass that adds a method, not a forward."""

    def double_width(self):
        return 2 * self.in_features


def test_a_subclass_keeps_its_methods(backend):
    layer, x = thin(Named(17, 33)), torch.randn(4, 17)
    for fast in (sparse(layer), copy.deepcopy(sparse(layer)), pickle.loads(pickle.dumps(sparse(layer)))):
        assert isinstance(fast, Named)
        assert isinstance(fast, linears.SparseLinear)
        assert type(fast).__name__ == "SparseNamed"
        assert fast.double_width() == 34
        assert off(fast(x), layer(x)) <= 1e-5


def test_vmap_goes_dense(backend, layer):
    fast, x = sparse(layer), torch.randn(3, 4, 17)
    with torch.no_grad():
        assert off(torch.vmap(fast)(x), layer(x)) <= 1e-5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_goes_dense(backend, layer):
    x = torch.nested.nested_tensor([torch.randn(3, 17), torch.randn(5, 17)])
    with torch.no_grad():
        for mine, plain in zip(sparse(layer)(x).unbind(), layer(x).unbind(), strict=True):
            assert off(mine, plain) <= 1e-5
        with pytest.raises(RuntimeError, match=r"dimension|1D"):
            sparse(layer)(torch.tensor(1.0))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_trace_is_plain(backend, layer):
    x = torch.randn(4, 17)
    traced = torch.jit.trace(sparse(layer), (x,))
    assert off(traced(2 * x), layer(2 * x)) <= 1e-5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c = Conv1D(33, 17)

    def forward(self, x):
        return self.c(x)


@pytest.mark.parametrize("shape", [(5, 17), (2, 3, 17), (17,)])
def test_transposed_of_transformers(backend, shape):
    pytest.importorskip("transformers")
    model, x = thin(Block()), torch.randn(shape)
    fast = sparse(model)
    assert isinstance(fast.c, linears.SparseTransposedLinear)
    assert isinstance(fast.c, type(model.c))
    kept = io.BytesIO()
    torch.save(fast, kept)
    kept.seek(0)
    for one in (fast, copy.deepcopy(fast), torch.load(kept, weights_only=False)):
        assert off(one(x), model(x)) <= 1e-5
    fast.c.restore()
    assert type(fast.c) is type(model.c)


def test_classes_are_made_once():
    assert swapping.swapped_class(linears.SparseLinear, Named) is swapping.swapped_class(linears.SparseLinear, Named)
    assert swapping.swapped_class(linears.SparseLinear, nn.Linear) is linears.SparseLinear
