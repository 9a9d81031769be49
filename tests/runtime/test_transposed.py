"""Sparse ConvTranspose1d and ConvTranspose2d in every setting that they take."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.runtime import candidates, products, transposed
from sparse_models import off, sparse, thin

TWO = [
    {},
    {"stride": 2},
    {"stride": 2, "padding": 1, "kernel_size": 4},
    {"stride": (2, 3), "padding": (1, 0), "kernel_size": (4, 2)},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": 2, "output_padding": 1, "bias": False},
    {"stride": 3, "kernel_size": 2, "output_padding": (2, 0)},
    {"dilation": 2, "padding": 2},
    {"dilation": (1, 3), "stride": 2, "output_padding": (0, 2)},
    {"groups": 2, "stride": 2, "padding": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (7, 5), "padding": (5, 4)},
]
ONE = [{}, {"stride": 4, "padding": 2, "kernel_size": 8}, {"groups": 4, "stride": 2, "output_padding": 1}]


def check(kind, channels, options, x):
    layer = thin(kind(channels, 8, **{"kernel_size": 3, **options}), 0.7)
    fast, reference = sparse(layer), copy.deepcopy(layer).double()(x.double())
    assert type(fast).__name__ == f"Sparse{kind.__name__}"
    assert off(fast(x), reference) <= 1e-5
    assert fast(x).is_contiguous()


@pytest.mark.parametrize("options", TWO, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (4, 5, 7), (1, 4, 20, 20)], ids=str)
def test_conv_transpose2d(isa, options, shape):
    check(nn.ConvTranspose2d, 4, options, torch.randn(shape))


@pytest.mark.parametrize("options", ONE, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 9), (4, 9), (1, 4, 50)], ids=str)
def test_conv_transpose1d(isa, options, shape):
    check(nn.ConvTranspose1d, 4, options, torch.randn(shape))


@pytest.mark.parametrize("padding", [0, 1])
def test_strides_along_sizes_of_one(isa, padding):
    layer = thin(nn.ConvTranspose2d(2, 1, 1 + 2 * padding, padding=padding), 0.5)
    for shape in ((2, 2, 3, 1), (1, 2, 1, 1), (2, 2, 1, 4)):
        x = torch.randn(shape)
        assert sparse(layer)(x).stride() == layer(x).stride()


def test_channels_last(isa):
    layer, x = thin(nn.ConvTranspose2d(4, 8, 3)), torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    assert off(sparse(layer.to(memory_format=torch.channels_last))(x), layer(x)) <= 1e-5


@pytest.mark.parametrize("options", TWO, ids=str)
def test_the_phases_are_a_convolution_of_stride_1(options):
    layer = nn.ConvTranspose2d(4, 8, **{"kernel_size": 3, **options}).double().requires_grad_(False)
    steps = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    kernel, x = transposed.phases(layer.weight, steps), torch.randn(2, 4, 5, 7).double()
    apart = F.conv2d(x, kernel, padding=[size - 1 for size in kernel.shape[2:]], groups=layer.groups)
    high, wide = layer.stride
    whole = apart.view(2, 8, high, wide, *apart.shape[2:]).permute(0, 1, 4, 2, 5, 3)
    whole = whole.reshape(2, 8, apart.shape[2] * high, apart.shape[3] * wide)
    exact = F.conv_transpose2d(x, layer.weight, None, *steps)
    top, left = layer.padding
    torch.testing.assert_close(whole[:, :, top:, left:][:, :, : exact.shape[2], : exact.shape[3]], exact)


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (9, 9), (1, 2, 4, 9, 9)], ids=str)
def test_what_torch_refuses_is_refused(isa, shape):
    layer, x = thin(nn.ConvTranspose2d(4, 8, 3)), torch.randn(shape)
    with pytest.raises((RuntimeError, ValueError), match=r".+") as plain:
        layer(x)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(str(plain.value))):
        sparse(layer)(x)


def test_an_output_without_places_is_refused(isa):
    layer, x = thin(nn.ConvTranspose2d(4, 8, 3, padding=3)), torch.randn(1, 4, 2, 2)
    with pytest.raises(RuntimeError, match="too small") as plain:
        layer(x)
    with pytest.raises(RuntimeError, match=re.escape(str(plain.value))):
        sparse(layer)(x)


@pytest.mark.parametrize("sides", [(0, 3), (3, 0), (0, 0), (0,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}], ids=str)
def test_an_input_without_places_is_for_torch(isa, options, sides):
    kind = nn.ConvTranspose2d if len(sides) == 2 else nn.ConvTranspose1d
    layer = thin(kind(4, 8, 3, **options))
    fast = sparse(layer)
    for x in (torch.randn(2, 4, *sides), torch.randn(4, *sides)):
        with pytest.raises(RuntimeError, match=r".+") as plain:
            layer(x)
        with pytest.raises(RuntimeError, match=re.escape(str(plain.value))):
            fast(x)


def marked(layer):
    """A sparse copy whose packed weights are zeros, which show which kernel ran."""
    fast = sparse(layer)
    fast.packed_weight = products.pack(torch.zeros_like(transposed.phases(fast.weight, fast._steps()).flatten(1)))
    return fast


def test_choices_go_by_the_places_of_the_convolution(isa):
    layer, x = thin(nn.ConvTranspose2d(4, 8, 4, stride=2)), torch.randn(2, 4, 5, 7)
    fast = marked(layer)
    assert fast.rows(x) == 2 * 6 * 8
    assert fast.rows(x[0]) == 6 * 8
    assert not torch.allclose(fast(x), layer(x))
    fast.choose(products.ALL & ~(1 << products.bucket(96)))
    assert fast(x).equal(layer(x))


def test_an_output_size_or_another_stride_is_dense(isa):
    layer, x = thin(nn.ConvTranspose2d(4, 8, 3, stride=2)), torch.randn(2, 4, 5, 7)
    fast = marked(layer)
    assert fast(x, output_size=(12, 15)).equal(layer(x, output_size=(12, 15)))
    for stride in ((1, 2), [1, 2], 1):
        layer.stride = fast.stride = stride
        assert fast(x).equal(layer(x))


def test_under_vmap_it_is_dense(isa):
    layer, x = thin(nn.ConvTranspose2d(4, 8, 3, stride=2)), torch.randn(3, 2, 4, 5, 7)
    with torch.no_grad():
        assert off(torch.vmap(sparse(layer))(x), layer(x.flatten(0, 1)).unflatten(0, (3, 2))) <= 1e-5


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Conv3d])
def test_compiled_and_exported(isa, kind):
    torch._dynamo.reset()
    model = thin(nn.Sequential(kind(4, 8, 3, stride=2)), 0.6)
    sides = {nn.ConvTranspose1d: (9,), nn.ConvTranspose2d: (9, 7), nn.Conv3d: (5, 9, 7)}[kind]
    x, more, fast = torch.randn(2, 4, *sides), torch.randn(5, 4, *sides), sparse(model)
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert any("secateur.conv" in str(node.target) for node in program.graph.nodes)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for one in (program.module(), compiled):
            assert off(one(x), model(x)) <= 1e-5
            assert off(one(more), model(more)) <= 1e-5


@pytest.mark.parametrize("choices", [0, products.ALL])
def test_opcheck(isa, choices):
    layer = thin(nn.ConvTranspose2d(4, 8, 3, stride=2)).requires_grad_(False)
    steps = (2, 2), (1, 0), (0, 1), 1, (1, 1)
    packed = products.pack(transposed.phases(layer.weight, steps).flatten(1))
    given = (torch.randn(2, 4, 5, 7), layer.weight, packed, layer.bias, *steps, choices)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.secateur.conv_transpose2d, given, test_utils=checks)


def test_the_verb(isa, sparse_wins):
    model, x = thin(nn.Sequential(nn.ConvTranspose1d(4, 8, 4, stride=2))), torch.randn(2, 4, 9)
    fast = sc.accelerate(model, x)
    assert fast.plan.sparse == ("0",)
    with torch.inference_mode():
        assert off(fast(x), model(x)) <= 1e-5
    plain = sc.dense(fast)
    assert type(plain[0]) is nn.ConvTranspose1d
    assert sorted(vars(plain[0])) == sorted(vars(model[0]))


def test_without_the_library_they_stay_dense(without_native):
    (plan,) = candidates.survey(thin(nn.ConvTranspose2d(4, 8, 3)))
    assert plan.reason == "a convolution needs the native library"
