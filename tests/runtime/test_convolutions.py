"""Sparse Conv1d, Conv2d and Conv3d in every setting that they take; the others stay dense and say why."""

import copy
import re

import pytest
import torch
from torch import nn

from secateur.runtime import candidates, products
from secateur.runtime.convolutions import SparseConv1d, SparseConv2d, SparseConv3d
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
        assert got.stride() == layer(x.to(memory_format=torch.channels_last)).stride()
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


THREE = [
    {},
    {"padding": 1, "stride": 2},
    {"padding": (2, 1, 0), "stride": (3, 1, 2), "kernel_size": (3, 2, 1)},
    {"padding": "same", "kernel_size": (4, 3, 2)},
    {"padding": "same", "dilation": (2, 1, 1)},
    {"padding": "valid", "dilation": 2},
    {"groups": 2, "padding": 1, "bias": False},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("options", THREE, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 6, 9, 7), (4, 6, 9, 7), (0, 4, 6, 9, 7)], ids=str)
def test_conv3d(isa, options, shape):
    layer, x = thin(nn.Conv3d(4, 8, **{"kernel_size": 3, **options}), 0.7), torch.randn(shape)
    fast, reference = sparse(layer), copy.deepcopy(layer).double()(x.double())
    assert isinstance(fast, SparseConv3d)
    assert off(fast(x), reference) <= 1e-5
    assert fast(x).is_contiguous()
    assert fast.rows(x) == reference.numel() // 8
    if x.dim() == 5:
        assert off(fast(x.to(memory_format=torch.channels_last_3d)), reference) <= 1e-5


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


@pytest.mark.parametrize(
    "shape", [(2, 3, 9, 9, 9), (2, 4, 2, 9, 9), (2, 4, 9, 2, 9), (9, 9), (1, 2, 4, 9, 9, 9)], ids=str
)
def test_what_torch_refuses_of_a_volume_is_refused(isa, shape):
    layer, x = thin(nn.Conv3d(4, 8, 3)), torch.randn(shape)
    with pytest.raises(RuntimeError, match=r".+"):
        layer(x)
    with pytest.raises(RuntimeError, match=r"[Cc]alculated padded input size|Kernel size|channels|Expected"):
        sparse(layer)(x)


def same_as(layer, fast, x):
    """Both give the same, or the same error."""
    try:
        plain = layer(x)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            fast(x)
    else:
        assert off(fast(x), plain) <= 1e-5


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 2), ("stride", 0), ("stride", -1), ("dilation", 2), ("dilation", 0), ("padding", -1)],
)
def test_what_was_set_since_is_as_torch_has_it(isa, dims, padding, name, value):
    layer = thin((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 8, 3, padding=padding))
    fast, x = sparse(layer), torch.randn(2, 4, *[9] * dims)
    for form in ((value,) * dims, [value] * dims, value):
        for one in (layer, fast):
            setattr(one, name, form)
        same_as(layer, fast, x)


def test_a_padding_mode_that_was_set_since_is_as_torch_has_it(isa):
    layer = thin(nn.Conv2d(4, 8, 3, padding=1))
    fast = sparse(layer)
    layer.padding_mode = fast.padding_mode = "circular"
    same_as(layer, fast, torch.randn(2, 4, 9, 9))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", 1, 2])
@pytest.mark.parametrize("batch", [(2,), ()], ids=str)
def test_images_without_places_are_for_torch(isa, dims, padding, batch):
    layer = thin((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 8, 3, padding=padding))
    fast = sparse(layer)
    for empty in range(dims):
        sides = [9] * dims
        sides[empty] = 0
        same_as(layer, fast, torch.randn(*batch, 4, *sides))


def test_volumes_go_by_the_places_of_their_output(isa):
    layer, x = thin(nn.Conv3d(4, 8, 3)), torch.randn(2, 4, 6, 9, 7)
    fast = sparse(layer)
    fast.packed_weight = products.pack(torch.zeros(8, 4 * 27))  # shows which kernel ran
    assert fast(x).equal(layer.bias.view(8, 1, 1, 1).expand_as(fast(x)))
    fast.choose(products.ALL & ~(1 << products.bucket(fast.rows(x))))
    assert off(fast(x), layer(x)) <= 1e-5


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_stays_dense(isa, mode):
    layer = thin(nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode))
    (plan,) = candidates.survey(layer)
    assert plan.reason == f"padding_mode={mode!r}"


def test_without_the_library_they_stay_dense(without_native):
    (plan,) = candidates.survey(thin(nn.Conv2d(4, 8, 3)))
    assert plan.reason == "a convolution needs the native library"
