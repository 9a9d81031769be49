"""The products equal a float64 reference on every instruction set, for odd shapes and patterns, and without any."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from secateur.errors import StateError
from secateur.runtime import native, products
from sparse_models import Guarded, off

SIZES = st.sampled_from([1, 3, 17, 64, 1000])
ROWS = st.sampled_from([0, 1, 2, 3, 5, 8, 16, 17, 33, 130])
PATTERNS = ["free", "empty rows", "empty columns", "full", "zero", "one"]
quick = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def matrix(rows, columns, pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if pattern == "free":
        weight *= torch.rand(rows, columns, generator=generator) < 0.1
    elif pattern == "empty rows":
        weight[torch.rand(rows, generator=generator) < 0.7] = 0
    elif pattern == "empty columns":
        weight[:, torch.rand(columns, generator=generator) < 0.7] = 0
    elif pattern == "zero":
        weight.zero_()
    elif pattern == "one":
        weight = torch.zeros(rows, columns)
        weight[rows // 2, columns // 2] = 1.5
    return weight


@quick
@given(rows=SIZES, columns=SIZES, n=ROWS, pattern=st.sampled_from(PATTERNS), bias=st.booleans(), seed=st.integers(0, 9))
def test_linear(backend, rows, columns, n, pattern, bias, seed):
    weight = matrix(rows, columns, pattern, seed)
    generator = torch.Generator().manual_seed(seed + 10)
    x = torch.randn(n, columns, generator=generator)
    offset = torch.randn(rows, generator=generator) if bias else None
    got = products.linear(x, weight, products.pack(weight), offset, products.ALL)
    scale = (x.double().abs() @ weight.double().abs().t()).max() if n else torch.tensor(1.0)
    reference = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert got.shape == reference.shape
    if n:
        assert (got.double() - reference).abs().max() <= 1e-5 * max(reference.abs().max(), 1e-3 * scale, 1e-30)


@pytest.mark.parametrize("values", native.VALUES)
@pytest.mark.parametrize("density", [0.03, 0.25, 0.5, 1.0])  # each has layouts of its own
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (9, 7), (17, 3000), (130, 65), (300, 2048), (1000, 1)])
def test_one_input(isa, shape, density, values):
    weight = (torch.randn(shape) * (torch.rand(shape) <= density)).to(values).float()
    packed, bias, x = products.pack(weight, values=values), torch.randn(shape[0]), Guarded((1, shape[1]))
    x.tensor.normal_()
    for offset in (None, bias):
        got = products.linear(x.tensor, weight, packed, offset, products.ALL)
        reference = F.linear(x.tensor.double(), weight.double(), None if offset is None else offset.double())
        assert off(got, reference) <= 1e-5
    x.tensor[0, -1] = torch.nan
    assert products.linear(x.tensor, weight, packed, None, products.ALL).isnan().equal(weight[None, :, -1] != 0)


@pytest.mark.parametrize("shape", [(17,), (5, 17), (2, 3, 17), (2, 1, 3, 17), (0, 17), (2, 0, 17)])
def test_linear_takes_any_dimensions(backend, shape):
    weight, x = matrix(33, 17, "free", 0), torch.randn(shape)
    got = products.linear(x, weight, products.pack(weight), None, products.ALL)
    assert off(got, F.linear(x.double(), weight.double())) <= 1e-5
    assert got.is_contiguous()


def test_linear_takes_what_is_not_contiguous(backend):
    weight, x = matrix(33, 17, "free", 0), torch.randn(17, 5, 2)
    packed, reference = products.pack(weight), F.linear(x.transpose(0, 2).double(), weight.double())
    assert off(products.linear(x.transpose(0, 2), weight, packed, None, products.ALL), reference) <= 1e-5
    one = torch.randn(1, 17).expand(4, 17)
    assert (
        off(products.linear(one, weight, packed, None, products.ALL), F.linear(one.double(), weight.double())) <= 1e-5
    )


def test_linear_refuses_what_torch_refuses(backend):
    weight = matrix(33, 17, "free", 0)
    packed = products.pack(weight)
    for wrong in (torch.randn(4, 16), torch.randn(0, 16), torch.randn(34)):
        with pytest.raises(RuntimeError, match=r"shapes|size"):
            products.linear(wrong, weight, packed, None, products.ALL)


def test_choices_decide_by_rows(backend, monkeypatch):
    weight = matrix(33, 17, "free", 0)
    wrong = products.pack(torch.zeros(33, 17))  # shows which kernel ran
    choices = 1 << products.bucket(4) | 1 << products.bucket(1)
    ran = {n: not products.linear(torch.randn(n, 17), weight, wrong, None, choices).any() for n in (1, 2, 3, 4, 5, 8)}
    assert ran == {1: True, 2: False, 3: True, 4: True, 5: False, 8: False}


CONVOLUTIONS = [
    # channels, out, image, kernel, stride, padding, dilation, groups
    (3, 5, (7, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 6, (8, 8), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (4, 6, (9, 7), (3, 2), (2, 3), (2, 0), (2, 1), 2),
    (6, 6, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (17, 3, (1, 20), (1, 5), (1, 2), (0, 4), (1, 3), 1),
    (1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (64, 64, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 4, (4, 4), (7, 7), (1, 1), (3, 3), (1, 1), 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("pattern", ["free", "full", "zero"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_conv2d(backend, case, pattern, batch):
    channels, out, image, kernel, stride, padding, dilation, groups = case
    weight = matrix(out, channels // groups * kernel[0] * kernel[1], pattern, 1)
    packed = products.pack(weight, groups) if backend != "torch" else torch.empty(0, dtype=torch.uint8)
    weight = weight.view(out, channels // groups, *kernel)
    x, bias = torch.randn(batch, channels, *image), torch.randn(out)
    rest = (stride, padding, dilation, groups)
    got = products.conv2d(x, weight, packed, bias, *rest, products.ALL)
    assert off(got, F.conv2d(x.double(), weight.double(), bias.double(), *rest)) <= 1e-5
    flat = x.to(memory_format=torch.channels_last)
    bare = products.conv2d(flat, weight, packed, None, *rest, products.ALL)
    assert off(bare, F.conv2d(x.double(), weight.double(), None, *rest)) <= 1e-5


def test_conv2d_refuses_what_torch_refuses(isa):
    weight = matrix(4, 27, "free", 0)
    packed, rest = products.pack(weight), ((1, 1), (0, 0), (1, 1), 1, products.ALL)
    for wrong in (torch.randn(1, 2, 8, 8), torch.randn(1, 3, 2, 8)):
        with pytest.raises(RuntimeError, match=r"channels|shape|size"):
            products.conv2d(wrong, weight.view(4, 3, 3, 3), packed, None, *rest)


def test_a_blob_of_another_version_says_what_to_do(isa):
    weight, foreign = torch.zeros(4, 4), torch.zeros(4096, dtype=torch.uint8)
    with pytest.raises(StateError, match=r"sc\.accelerate\(sc\.dense\(fast\)"):
        products.linear(torch.ones(1, 4), weight, foreign, None, products.ALL)


def test_without_native_a_native_blob_is_left_aside(monkeypatch):
    if native.library() is None:
        pytest.skip("no native library")
    weight = matrix(33, 17, "free", 0)
    packed, x = products.pack(weight), torch.randn(4, 17)
    monkeypatch.setattr(native, "library", lambda: None)
    assert products.linear(x, weight, packed, None, products.ALL).equal(F.linear(x, weight))


def test_threads_give_the_same(isa):
    weight, x = matrix(1000, 512, "free", 0), torch.randn(64, 512)
    packed, before = products.pack(weight), torch.get_num_threads()
    one = products.linear(x, weight, packed, None, products.ALL)
    try:
        torch.set_num_threads(2)
        assert off(products.linear(x, weight, packed, None, products.ALL), one) <= 1e-6
    finally:
        torch.set_num_threads(before)
