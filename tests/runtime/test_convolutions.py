"""Sparse Conv1d and Conv2d in every setting that they take; the others stay dense and say why."""

import copy
import re

import pytest
import torch
from torch import nn

from secateur.runtime import candidates
from secateur.runtime.convolutions import SparseConv1d, SparseConv2d
from sparse_models import off, sparse, thin

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")

TWO = [
    {},
    {"padding": 1, "stride": 2},
    {"padding": "same"},
    {"padding": "same", "kernel_size": 4},
    {"padding": "same", "kernel_size": (2, 5), "dilation": (3, 1)},
    {"padding": "valid", "dilation": 2},
    {"groups": 2, "padding": (0, 1), "stride": (1, 2)},
    {"groups": 4, "padding": 1, "bias": False},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("options", TWO, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 9, 11), (4, 9, 11), (0, 4, 9, 11), (1, 4, 32, 32)])
def test_conv2d(isa, options, shape):
    layer, x = thin(nn.Conv2d(4, 8, **{"kernel_size": 3, **options}), 0.7), torch.randn(shape)
    fast, reference = sparse(layer), copy.deepcopy(layer).double()(x.double())
    assert isinstance(fast, SparseConv2d)
    assert off(fast(x), reference) <= 1e-5
    if x.dim() == 4:
        got = fast(x.to(memory_format=torch.channels_last))
        assert off(got, reference) <= 1e-5
        assert got.is_contiguous()
    rows = fast.rows(x)
    assert rows == reference.numel() // 8 // (1 if x.dim() == 3 else max(len(x), 1)) * (1 if x.dim() == 3 else len(x))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1, "stride": 2}, {"padding": "same", "kernel_size": 4}, {"groups": 2, "dilation": 2}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 4, 20), (4, 20), (0, 4, 20)])
def test_conv1d(isa, options, shape):
    layer, x = thin(nn.Conv1d(4, 8, **{"kernel_size": 3, **options}), 0.7), torch.randn(shape)
    fast, reference = sparse(layer), copy.deepcopy(layer).double()(x.double())
    assert isinstance(fast, SparseConv1d)
    assert off(fast(x), reference) <= 1e-5
    assert fast.rows(x) == reference.numel() // 8


def test_channels_last_weights(isa):
    layer, x = thin(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last), torch.randn(2, 4, 8, 8)
    assert off(sparse(layer)(x), layer(x)) <= 1e-5


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (2, 4, 2, 2), (9, 9), (1, 2, 4, 9, 9)])
def test_what_torch_refuses_is_refused(isa, shape):
    layer, x = thin(nn.Conv2d(4, 8, 3)), torch.randn(shape)
    with pytest.raises(RuntimeError, match=r".+") as plain:
        layer(x)
    with pytest.raises(RuntimeError, match=re.escape(str(plain.value))) as ours:
        sparse(layer)(x)
    assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_stays_dense(isa, mode):
    layer = thin(nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode))
    (plan,) = candidates.survey(layer)
    assert plan.reason == f"padding_mode={mode!r}"


def test_without_the_library_they_stay_dense(without_native):
    (plan,) = candidates.survey(thin(nn.Conv2d(4, 8, 3)))
    assert plan.reason == "a convolution needs the native library"
