"""Generated code, followed instruction by instruction: it computes the product, and touches nothing else."""

import ctypes
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from processor import R8, RCX, RDI, RDX, RSI, Processor, Region
from secateur.runtime import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")

X, WEIGHTS, SUMS, BIAS = (1 << 20, 2 << 20, 3 << 20, 4 << 20)


def matrix(rows, columns, zeros, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    return weight * (torch.rand(rows, columns, generator=draw) >= zeros), torch.randn(rows, generator=draw)


class Program:
    """What is generated for a packed matrix, to be looked at."""

    def __init__(self, blob, shape=None):
        lib = native.library()
        code = native.generate(blob, shape, run=False)
        parts = []
        for part in range(3):
            data = np.zeros(lib.secateur_generated(code.handle, part, None), np.uint8)
            lib.secateur_generated(code.handle, part, data.ctypes.data)
            parts.append(data)
        self.code, self.weights = parts[0].tobytes(), parts[1].view(np.float32)
        self.units = parts[2].view(np.int64).reshape(-1, 4).tolist()
        self.done = Counter()

    def sums(self, x, bias, tiles):
        """sums [tiles, rows, 16]; a unit may read all of x, its own weights and the bias, and write the sums."""
        found = np.full((tiles, len(bias), 16), np.nan, np.float32)
        ends = [first for _, first, *_ in self.units[1:]] + [len(self.weights)]
        for (entry, first, *_), end in zip(self.units, ends, strict=True):
            memory = [
                Region(X, x.reshape(-1)),
                Region(WEIGHTS, self.weights[first:end]),
                Region(SUMS, found.reshape(-1), True),
                Region(BIAS, bias),
            ]
            processor = Processor(memory)
            for register, value in ((RDI, X), (RSI, WEIGHTS), (RDX, SUMS), (RCX, tiles), (R8, BIAS)):
                processor.general[register] = value
            processor.call(self.code, entry)
            self.done += processor.done
        return found


def off(sums, exact):
    return np.abs(sums - exact).max() / max(1, np.abs(exact).max())


@pytest.mark.parametrize(
    ("rows", "columns", "zeros"), [(1, 1, 0), (5, 3, 0), (61, 70, 0.9), (28, 400, 0.5), (33, 40, 0.97)]
)
@pytest.mark.parametrize("tiles", [1, 3])
def test_computes_the_product(rows, columns, zeros, tiles):
    weight, bias = matrix(rows, columns, zeros)
    x = np.random.default_rng(0).normal(size=(tiles, columns, 16)).astype(np.float32)
    sums = Program(native.pack(weight)).sums(x, bias.numpy(), tiles)
    assert off(sums, weight.double().numpy() @ x.astype(np.float64) + bias.double().numpy()[:, None]) <= 1e-6


def test_fetches_ahead_where_the_code_does_not_stay_in_the_cache():
    weight, bias = matrix(420, 900, 0.8)
    program = Program(native.pack(weight))
    x = np.random.default_rng(0).normal(size=(1, 900, 16)).astype(np.float32)
    assert b"\x0f\x18\x15" in program.code
    assert b"\x41\x0f\x18\x92" in program.code
    del program.units[3:]  # the others are as these
    sums = program.sums(x, bias.numpy(), 1)[:, :28]
    assert off(sums, weight[:28].numpy() @ x + bias[:28].numpy()[:, None]) <= 1e-5


def test_nothing_but_zeros_is_the_bias():
    sums = Program(native.pack(torch.zeros(40, 30))).sums(
        np.ones((2, 30, 16), np.float32), np.arange(40, dtype="f4"), 2
    )
    assert (sums == np.arange(40)[:, None]).all()


def test_more_columns_than_a_displacement_of_a_byte_reaches():
    weight = torch.zeros(3, 384 * 2)
    weight[0, 0] = weight[1, 383] = weight[2, -1] = 1.0
    x = np.random.default_rng(0).normal(size=(1, 768, 16)).astype(np.float32)
    sums = Program(native.pack(weight)).sums(x, np.zeros(3, np.float32), 1)
    assert (sums[0] == x[0, [0, 383, 767]]).all()


SHAPES = [  # channels, height, width, kernel, stride, padding, dilation, groups
    (3, 9, 11, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 8, 8, (3, 3), (2, 2), (1, 1), (1, 1), 2),
    (2, 10, 9, (5, 3), (2, 1), (0, 2), (1, 2), 1),
    (6, 4, 5, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (3, 1, 40, (1, 7), (1, 3), (0, 3), (1, 1), 3),
]


@pytest.mark.parametrize(("channels", "height", "width", "kernel", "stride", "padding", "dilation", "groups"), SHAPES)
def test_convolves_reading_nothing_but_the_planes(channels, height, width, kernel, stride, padding, dilation, groups):
    (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
    rows = 12
    weight, bias = matrix(rows, channels // groups * kh * kw, 0.6)
    image = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(1))
    exact = F.conv2d(image, weight.view(rows, -1, kh, kw), bias, stride, padding, dilation, groups)[0].numpy()
    oh, ow = exact.shape[1:]
    pitch, lines = ow + (kw - 1) * dw // sw, oh + (kh - 1) * dh // sh
    padded = np.zeros((channels, sh * (lines + height), sw * (pitch + width)), np.float32)
    padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = image[0]
    phases = padded.reshape(channels, -1, sh, padded.shape[2] // sw, sw).transpose(0, 2, 4, 1, 3)
    planes = phases[..., :lines, :pitch].reshape(-1)
    places = (oh - 1) * pitch + ow
    tiles = (places + 15) // 16
    seen = np.append(planes, np.full(16 * tiles - places, np.nan, np.float32)).astype(np.float32)
    shape = (1, channels, height, width, *kernel, *stride, *padding, *dilation)
    sums = Program(native.pack(weight, groups), shape).sums(seen, bias.numpy(), tiles)
    found = sums.transpose(1, 0, 2).reshape(rows, -1)
    at = np.arange(oh)[:, None] * pitch + np.arange(ow)
    assert off(found[:, at], exact) <= 1e-6


SHIFTED = [(3, 5, 14, 1, 12), (4, 3, 28, 2, 34), (70, 2, 14, 1, 11), (1, 1, 42, 1, 1)]  # the last two: groups and rows


@pytest.mark.parametrize(("channels", "height", "width", "groups", "rows"), SHIFTED)
def test_sums_are_shifted_where_fourteen_divides_a_row(channels, height, width, groups, rows):
    weight, bias = matrix(rows, channels // groups * 9, 0.6)
    image = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(1))
    exact = F.conv2d(image, weight.view(rows, -1, 3, 3), bias, padding=1, groups=groups)[0]
    lines = F.pad(image[0], (1, 1, 1, 1)).unfold(2, 16, 14).contiguous().numpy()  # [channels, height + 2, across, 16]
    program = Program(native.pack(weight, groups), (1, channels, height, width, 3, 3, 1, 1, 1, 1, 1, 1))
    assert max(n for *_, n in program.units) <= 10
    sums = program.sums(lines.reshape(-1), bias.numpy(), height * width // 14)
    found = sums[..., :14].transpose(1, 0, 2).reshape(rows, height, width)
    assert off(found, exact.numpy()) <= 1e-6


def test_shifted_sums_load_a_line_once():
    weight, bias = matrix(10, 9 * 8, 0)
    program = Program(native.pack(weight), (1, 8, 2, 14, 3, 3, 1, 1, 1, 1, 1, 1))
    program.sums(np.zeros(8 * 4 * 16, np.float32), bias.numpy(), 2)
    assert (program.done["10"], program.done["b8"]) == (2 * 24, 2 * 720)  # loads, multiplications


def test_a_shape_that_the_weights_do_not_have_is_refused():
    blob = native.pack(matrix(4, 27, 0.5)[0])
    assert native.generate(blob, (1, 3, 9, 9, 3, 3, 1, 1, 1, 1, 1, 1), run=False) is not None
    for wrong in (
        (1, 3, 9, 9, 3, 4, 1, 1, 1, 1, 1, 1),
        (1, 3, 9, 9, 3, 3, 0, 1, 1, 1, 1, 1),
        (1, 3, 1, 1, 3, 3, 1, 1, 0, 0, 1, 1),
    ):
        assert native.generate(blob, wrong, run=False) is None


@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16])
def test_rounded_weights_are_widened(values):
    weight, _ = matrix(30, 400, 0.5)
    rounded = native.generate(native.pack(weight.to(values).float()), run=0)
    found = native.generate(native.pack(weight, values=values), run=0)
    lib = native.library()
    for part in (0, 1):  # code, weights
        one, other = ((ctypes.c_char * lib.secateur_generated(code.handle, part, None))() for code in (rounded, found))
        lib.secateur_generated(rounded.handle, part, one)
        lib.secateur_generated(found.handle, part, other)
        assert bytes(one) == bytes(other)


@pytest.mark.parametrize("shape", [None, (1, 6, 1, 14, 3, 3, 1, 1, 1, 1, 1, 1)], ids=["Linear", "shifted sums"])
def test_a_damaged_blob_is_refused_or_stays_in_bounds(shape):
    draw = np.random.default_rng(0)
    weight, bias = matrix(70, 54, 0.8)
    blob, refused = native.pack(weight), 0
    x = np.zeros((1, 54, 16), np.float32)  # of which lines take a third
    for _ in range(150):
        damaged = blob.clone()
        at = torch.from_numpy(draw.integers(0, 600 if draw.random() < 0.5 else len(blob), 2))
        damaged[at] = torch.from_numpy(draw.integers(0, 256, 2).astype(np.uint8))
        if native.generate(damaged, shape, run=False) is None:
            refused += 1
        else:
            Program(damaged, shape).sums(x[:, : 54 if shape is None else 18], bias.numpy(), 1)
    assert 25 < refused < 150


@pytest.mark.parametrize("bytes_", [0, 7, 199, 4096])
def test_a_blob_cut_short_is_refused(bytes_):
    blob = native.pack(matrix(70, 50, 0.5)[0])
    assert bytes_ < len(blob)
    assert native.generate(blob[:bytes_].clone(), run=False) is None
