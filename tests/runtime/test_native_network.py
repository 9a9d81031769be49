"""Networks of convolutions in one native call: what torch gives step by step, in bounds, for any shapes and order."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F

from secateur.runtime import native
from sparse_models import Guarded, off

CONVOLUTION, MAXIMA, AVERAGES, NEITHER = range(4)
ACTIVATIONS = (
    lambda x: x,
    F.relu,
    F.relu6,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.silu,
    torch.tanh,
    torch.sigmoid,
    F.hardswish,
    F.hardsigmoid,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")


@dataclass
class Network:
    """Steps, and beside them what torch makes of x in float64."""

    x: torch.Tensor
    density: float = 0.3
    code: float = 0.0  # the share of convolutions that have code
    values: list[torch.Tensor] = field(default_factory=list)
    steps: list[native.Step] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)

    def __post_init__(self):
        self.values.append(self.x.double())

    def keep(self, tensor):
        """The address of a tensor that lives as long as this."""
        if tensor is None:
            return None
        self.kept.append(tensor)
        return tensor.data_ptr()

    def step(
        self, kind, source, found, shape, add=-1, activation=0, affine=True, blob=None, code=None, counted=0, times=-1
    ):
        """Add one that gives `found` before what comes after; its number."""
        rows = found.shape[1]
        scale, shift = (torch.rand(rows) + 0.5, torch.randn(rows)) if affine else (None, None)
        if affine:
            found = found * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
        if add >= 0:
            found = found + self.values[add]
        self.values.append(ACTIVATIONS[activation](found))
        given = (kind, source, len(self.steps) + 1, add, activation, counted, times, blob, code, self.keep(scale))
        self.steps.append(native.Step(*given, self.keep(shift), (ctypes.c_int64 * 12)(*shape)))
        return len(self.steps)

    def convolution(self, source, out, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, **after):
        x = self.values[source]
        weight = torch.randn(out, x.shape[1] // groups, *kernel)
        weight *= torch.rand(weight.shape) < self.density
        weight /= max(1.0, float(weight.square().sum() / out) ** 0.5)
        found = F.conv2d(x, weight.double(), None, stride, padding, dilation, groups)
        shape = (0, *x.shape[1:], *kernel, *stride, *padding, *dilation)
        packed, code = native.pack(weight.flatten(1), groups), None
        if torch.rand(()) < self.code:
            made = native.generate(packed, shape, run=1 if native.generates() else 2)
            self.kept.append(made)
            code = made.handle
        return self.step(CONVOLUTION, source, found, shape, blob=self.keep(packed), code=code, **after)

    def pool(self, kind, source, window, stride=(1, 1), padding=(0, 0), dilation=(1, 1), counted=False, **after):
        x = self.values[source]
        if kind == MAXIMA:
            found = F.max_pool2d(x, window, stride, padding, dilation)
        else:
            found = F.avg_pool2d(x, window, stride, padding, count_include_pad=counted)
        shape = (0, *x.shape[1:], *window, *stride, *padding, *dilation)
        return self.step(kind, source, found, shape, counted=int(counted), **after)

    def pointwise(self, source, **after):
        return self.step(NEITHER, source, self.values[source], (0, *self.values[source].shape[1:], *[0] * 8), **after)

    def run(self, threads=1):
        """What the native library gives, with x and y that end where memory does."""
        x, y = Guarded(self.x.shape, self.x), Guarded(self.values[-1].shape)
        steps = (native.Step * len(self.steps))(*self.steps)
        lib, count = native.library(), len(steps)
        given = (ctypes.addressof(steps), count, len(self.x), x.tensor.data_ptr(), y.tensor.data_ptr(), threads)
        assert lib.secateur_network(*given) == 0
        assert x.tensor.equal(self.x) or not self.x.isfinite().all()
        return y.tensor.clone()

    @property
    def error(self):
        return max(off(self.run(threads), self.values[-1]) for threads in (1, 2, 3))


def drawn(seed, code=0.0):
    """A network of random steps."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    sides = (draw.randint(1, 24), draw.randint(1, 24))
    net = Network(torch.randn(draw.randint(1, 5), draw.randint(1, 9), *sides), code=code)
    for _ in range(draw.randint(1, 9)):
        source = draw.randint(max(0, len(net.values) - 3), len(net.values) - 1)
        kind = draw.choice([CONVOLUTION] * 5 + [MAXIMA, AVERAGES, NEITHER])
        attach = drawn_convolution if kind == CONVOLUTION else drawn_pool
        after = {"activation": draw.choice((0, 1, 1, draw.randrange(10))), "affine": draw.random() < 0.7}
        if kind == NEITHER:
            _attached(net, draw, lambda **given: net.pointwise(source, **given), net.values[source].shape, after)
        else:
            attach(net, draw, source, kind, after)
    return net


def drawn_axis(draw, size, most):
    """Window, stride, padding and dilation that give one place or more."""
    while True:
        window, spread = draw.randint(1, most), draw.choice((1, 1, 1, 2))
        padding = draw.choice((0, window // 2, window // 2))
        if size + 2 * padding >= spread * (window - 1) + 1:
            return window, draw.choice((1, 1, 1, 2, 3)), padding, spread


def drawn_convolution(net, draw, source, _kind, after):
    x = net.values[source]
    if draw.random() < 0.5:  # as large as what it sees, so that something can be added
        window = draw.choice((1, 3, 5))
        axes, out, groups = [(window, 1, window // 2, 1)] * 2, x.shape[1], 1
    else:
        axes = [drawn_axis(draw, size, 7) for size in x.shape[2:]]
        groups = draw.choice([n for n in range(1, x.shape[1] + 1) if x.shape[1] % n == 0])
        out = groups * draw.choice((1, 2, 5, draw.randint(1, 150 // groups + 1)))
    kernel, stride, padding, dilation = zip(*axes, strict=True)
    shape = F.conv2d(
        x[:1], x.new_empty(out, x.shape[1] // groups, *kernel), None, stride, padding, dilation, groups
    ).shape
    given = (source, out, kernel, stride, padding, dilation, groups)
    _attached(net, draw, lambda **more: net.convolution(*given, **more), (len(x), *shape[1:]), after)


def drawn_pool(net, draw, source, kind, after):
    x = net.values[source]
    axes = [drawn_axis(draw, size, 4) for size in x.shape[2:]]
    window, stride, padding, dilation = zip(*axes, strict=True)
    if kind == AVERAGES:
        padding, dilation = tuple(min(p, w // 2) for p, w in zip(padding, window, strict=True)), (1, 1)
    net.pool(kind, source, window, stride, padding, dilation, counted=draw.random() < 0.5, **after)


def _attached(net, draw, attach, shape, after):
    same = [i for i, value in enumerate(net.values) if value.shape == shape]
    attach(add=draw.choice(same) if same and draw.random() < 0.6 else -1, **after)


@pytest.mark.parametrize("code", [0.0, 0.6])
@pytest.mark.parametrize("part", range(4))
def test_any_steps(isa, part, code):
    for seed in range(25 * part, 25 * part + 25):
        assert drawn(seed, code).error <= 1e-5, seed


def residual(x, code=0.0, width=12):
    """A stem, blocks with and without a stride, a head."""
    net = Network(x, code=code)
    at = net.convolution(0, width, (7, 7), (2, 2), (3, 3), activation=1)
    at = net.pool(MAXIMA, at, (3, 3), (2, 2), (1, 1))
    for stride in (1, 2, 2):
        width *= stride
        short = at if stride == 1 else net.convolution(at, width, (1, 1), (stride, stride))
        inner = net.convolution(at, width, (3, 3), (stride, stride), (1, 1), activation=1)
        at = net.convolution(inner, width, (3, 3), padding=(1, 1), add=short, activation=1)
    last = tuple(net.values[at].shape[2:])
    at = net.pool(AVERAGES, at, last)
    net.convolution(at, 10, (1, 1))
    return net


@pytest.mark.parametrize("code", [0.0, 1.0])
@pytest.mark.parametrize(("batch", "side"), [(1, 64), (3, 33), (8, 32), (40, 16), (2, 52)])
def test_a_residual_network(isa, batch, side, code):
    assert residual(torch.randn(batch, 3, side, side + 4), code).error <= 1e-5


def test_shifted_sums_beside_what_reads_planes(isa):
    net = Network(torch.randn(3, 5, 6, 28), code=1.0)
    one = net.convolution(0, 11, (3, 3), padding=(1, 1), activation=3)
    two = net.convolution(one, 11, (3, 3), padding=(1, 1), add=one)
    three = net.convolution(one, 11, (5, 5), padding=(2, 2), add=two)
    net.convolution(three, 2, (3, 3), padding=(1, 1), affine=False)
    assert net.error <= 1e-5


def test_many_images_go_in_groups(isa):
    net = Network(torch.randn(9, 64, 40, 40))
    at = net.convolution(0, 64, (3, 3), padding=(1, 1), activation=1)
    net.convolution(at, 4, (5, 5), padding=(2, 2))
    assert net.error <= 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [MAXIMA, AVERAGES])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_what_is_not_finite_stays_so(isa, bad, kind, stride):
    x = torch.randn(2, 3, 13, 21)
    x.view(-1)[torch.randperm(x.numel())[:30]] = bad
    net = Network(x)
    at = net.pool(kind, 0, (3, 3), (stride, stride), (1, 1), activation=1)
    net.pointwise(at, add=at, activation=2)
    assert torch.allclose(net.run().double(), net.values[-1], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_value_that_is_read_with_other_borders(isa):
    net = Network(torch.randn(2, 6, 15, 10))
    first = net.convolution(0, 8, (3, 3), padding=(1, 1))
    one = net.convolution(first, 8, (5, 5), padding=(2, 2), add=first)
    two = net.convolution(first, 8, (1, 1), add=one)
    three = net.convolution(first, 8, (3, 3), (1, 1), (2, 2), (2, 2), add=two, activation=1)
    net.pool(MAXIMA, three, (2, 2))
    assert net.error <= 1e-5


def test_steps_in_which_values_have_other_numbers(isa):
    net = residual(torch.randn(2, 3, 32, 32))
    count = len(net.steps)
    for step in net.steps:
        step.to = count + 1 - step.to
        step.source = count + 1 - step.source if step.source else 0
        step.add = count + 1 - step.add if step.add > 0 else step.add
    assert net.error <= 1e-5


WRONG = [
    ("kind", 4),
    ("kind", -1),
    ("source", 3),  # written later
    ("source", -1),
    ("source", 99),
    ("to", 1),  # written before
    ("to", 0),
    ("to", 99),
    ("add", 3),
    ("add", 0),  # of another size
    ("add", -2),
    ("times", 1),  # of more than one pixel, and no matter of convolutions
    ("times", -2),
    ("activation", 10),
    ("activation", -1),
    ("blob", None),
    ("shape", (0, 8, 9, 7, 3, 3, 1, 1, 1, 1, 1, 1)),  # not the size of what it reads
    ("shape", (0, 8, 9, 9, 5, 3, 1, 1, 1, 1, 1, 1)),
    ("shape", (0, 8, 9, 9, 3, 3, 0, 1, 1, 1, 1, 1)),
    ("shape", (0, 8, 9, 9, 3, 3, 1, 1, -1, 1, 1, 1)),
    ("shape", (0, 8, 9, 9, 3, 3, 1, 1, 1 << 40, 1, 1, 1)),
    ("shape", (0, 8, 9, 9, 3, 3, 1, 1, 1, 1, 1 << 30, 1)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_what_makes_no_sense_is_refused(isa, name, value):
    net = Network(torch.randn(1, 4, 9, 9))
    net.convolution(0, 8, (3, 3), padding=(1, 1))
    net.convolution(1, 8, (3, 3), padding=(1, 1), add=1)
    net.convolution(2, 8, (3, 3), padding=(1, 1))
    assert net.error <= 1e-5
    setattr(net.steps[1], name, (ctypes.c_int64 * 12)(*value) if name == "shape" else value)
    steps, y = (native.Step * 3)(*net.steps), torch.zeros(1, 8, 9, 9)
    given = (ctypes.addressof(steps), 3, 1, net.x.data_ptr(), y.data_ptr(), 1)
    assert native.library().secateur_network(*given) == -1
    assert y.count_nonzero() == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_channels_are_multiplied_by_what_is_computed_of_them(isa, batch):
    net = Network(torch.randn(batch, 4, 9, 7))
    x = net.convolution(0, 8, (3, 3), padding=(1, 1), activation=5)
    whole = net.pool(AVERAGES, x, (9, 7), affine=False)
    scale = net.convolution(whole, 8, (1, 1), activation=7)
    product = net.values[x] * net.values[scale]
    at = net.step(3, x, product, (0, 8, 9, 7, *[0] * 8), add=x, activation=1, affine=False, times=scale)
    net.convolution(at, 5, (3, 3), padding=(2, 2))
    assert net.error <= 1e-5


@pytest.mark.parametrize(("name", "value"), [("times", 1), ("times", 9), ("scale", "itself")], ids=str)
def test_products_that_make_no_sense_are_refused(isa, name, value):
    net = Network(torch.randn(1, 4, 9, 7))
    x = net.convolution(0, 4, (3, 3), padding=(1, 1))
    scale = net.pool(AVERAGES, x, (9, 7))
    net.step(3, x, net.values[x] * net.values[scale], (0, 4, 9, 7, *[0] * 8), affine=False, times=scale)
    assert net.error <= 1e-5
    setattr(net.steps[2], name, net.x.data_ptr() if value == "itself" else value)
    steps, y = (native.Step * 3)(*net.steps), torch.zeros(1, 4, 9, 7)
    given = (ctypes.addressof(steps), 3, 1, net.x.data_ptr(), y.data_ptr(), 1)
    assert native.library().secateur_network(*given) == -1
    assert y.count_nonzero() == 0


@pytest.mark.parametrize("kind", [MAXIMA, AVERAGES])
def test_windows_that_see_nothing_are_refused(isa, kind):
    net = Network(torch.randn(1, 4, 9, 9))
    net.pool(kind, 0, (3, 3), padding=(1, 1))
    net.steps[0].shape[8] = 2
    steps, y = (native.Step * 1)(*net.steps), torch.zeros(1, 4, 11, 9)
    given = (ctypes.addressof(steps), 1, 1, net.x.data_ptr(), y.data_ptr(), 1)
    assert native.library().secateur_network(*given) == -1


def test_no_steps_are_refused_and_no_images_are_nothing(isa):
    net = Network(torch.randn(1, 4, 9, 9))
    net.convolution(0, 8, (3, 3))
    steps = (native.Step * 1)(*net.steps)
    call = native.library().secateur_network
    assert call(ctypes.addressof(steps), 0, 1, None, None, 1) == -1
    assert call(None, 1, 1, None, None, 1) == -1
    assert call(ctypes.addressof(steps), 1, -1, None, None, 1) == -1
    assert call(ctypes.addressof(steps), 1, 0, None, None, 1) == 0
