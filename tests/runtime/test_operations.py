"""Nodes of a graph, and what they do; those that do something else are refused."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.runtime import graphs, operations
from secateur.runtime.activations import GELU, GELU_TANH, HARDSIGMOID, HARDSWISH, NONE, RELU, RELU6, SIGMOID, SILU, TANH
from secateur.runtime.operations import (
    ADDITION,
    AVERAGES,
    CONVOLUTION,
    MAXIMA,
    NEITHER,
    NORM,
    PRODUCT,
    SAME,
    Window,
)
from sparse_models import sparse, thin


class One(nn.Module):
    """Does one thing, with a module or without."""

    def __init__(self, does, module=None):
        super().__init__()
        self.module, self.does = module, does
        self.eval()

    def forward(self, x):
        return self.does(x) if self.module is None else self.does(self.module, x)


def read(does, module=None):
    """The operation of the last node before the output."""
    made = One(does, module)
    graph = graphs.trace(made)
    return operations.read([*graph.nodes][-2], made)


def read_module(module):
    return read(lambda m, x: m(x), module)


def what(operation):
    return operation.kind, operation.activation, operation.in_place


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        (F.relu, (NEITHER, RELU, False)),
        (torch.relu, (NEITHER, RELU, False)),
        (lambda x: x.relu(), (NEITHER, RELU, False)),
        (lambda x: F.relu(x, inplace=True), (NEITHER, RELU, True)),
        (lambda x: F.relu(x, True), (NEITHER, RELU, True)),
        (F.relu_, (NEITHER, RELU, True)),
        (torch.relu_, (NEITHER, RELU, True)),
        (lambda x: x.relu_(), (NEITHER, RELU, True)),
        (F.relu6, (NEITHER, RELU6, False)),
        (lambda x: x * x, (PRODUCT, NONE, False)),
        (lambda x: x.mul_(x), (PRODUCT, NONE, True)),
        (lambda x: x * 2.0, None),
        (F.silu, (NEITHER, SILU, False)),
        (lambda x: F.silu(x, inplace=True), (NEITHER, SILU, True)),
        (lambda x: F.hardswish(x, True), (NEITHER, HARDSWISH, True)),
        (F.gelu, (NEITHER, GELU, False)),
        (lambda x: F.gelu(x, approximate="tanh"), (NEITHER, GELU_TANH, False)),
        (torch.sigmoid, (NEITHER, SIGMOID, False)),
        (lambda x: x.tanh(), (NEITHER, TANH, False)),
        (lambda x: F.hardtanh(x, 0.0, 6.0), (NEITHER, RELU6, False)),
        (lambda x: x + x, (ADDITION, 0, False)),
        (torch.add, None),
        (lambda x: torch.add(x, x), (ADDITION, 0, False)),
        (lambda x: x.add(x), (ADDITION, 0, False)),
        (lambda x: x.add_(x), (ADDITION, 0, True)),
        (lambda x: operator.iadd(x, x), (ADDITION, 0, True)),
        (lambda x: F.dropout(x, 0.5, False), (SAME, 0, False)),
        (lambda x: F.dropout2d(x, training=False), (SAME, 0, False)),
        (F.dropout, None),
        (lambda x: x + 1, None),
        (lambda x: torch.add(x, x, alpha=2), None),
        (lambda x: torch.add(x, other=x), None),  # whose second value is no positional argument
        (lambda x: x.add(other=x), None),
        (lambda x: F.hardtanh(x), None),
        (F.elu, None),
        (lambda x: x.flatten(1), None),
    ],
)
def test_functions(does, expected):
    if does is torch.add:  # one argument: no call of it
        assert graphs.trace(One(does)) is None
        return
    found = read(does)
    assert (found if found is None else what(found)) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(), (NEITHER, RELU, False)),
        (nn.ReLU(inplace=True), (NEITHER, RELU, True)),
        (nn.ReLU6(), (NEITHER, RELU6, False)),
        (nn.SiLU(inplace=True), (NEITHER, SILU, True)),
        (nn.Hardswish(), (NEITHER, HARDSWISH, False)),
        (nn.Hardsigmoid(True), (NEITHER, HARDSIGMOID, True)),
        (nn.GELU("tanh"), (NEITHER, GELU_TANH, False)),
        (nn.Sigmoid(), (NEITHER, SIGMOID, False)),
        (nn.ReLU6(inplace=True), (NEITHER, RELU6, True)),
        (nn.Hardtanh(), None),
        (nn.Identity(), (SAME, 0, False)),
        (nn.Dropout(), (SAME, 0, False)),
        (nn.Dropout2d(), (SAME, 0, False)),
        (nn.BatchNorm2d(3), (NORM, 0, False)),
        (nn.BatchNorm2d(3, affine=False), (NORM, 0, False)),
        (nn.BatchNorm2d(3, track_running_stats=False), None),
        (nn.BatchNorm3d(3), None),
        (nn.ELU(), None),
        (nn.GroupNorm(1, 3), None),
        (nn.Conv2d(3, 3, 1), None),  # not packed
    ],
)
def test_modules(module, expected):
    found = read_module(module)
    assert (found if found is None else what(found)) == expected


@pytest.mark.parametrize(
    ("module", "does", "window"),
    [
        (nn.MaxPool2d(2), lambda x: F.max_pool2d(x, 2), Window((2, 2), (2, 2))),
        (
            nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2)),
            lambda x: F.max_pool2d(x, (3, 2), (2, 1), padding=(1, 0), dilation=[1, 2]),
            Window((3, 2), (2, 1), (1, 0), (1, 2)),
        ),
        (nn.MaxPool2d(2, ceil_mode=True), lambda x: F.max_pool2d(x, 2, ceil_mode=True), None),
        (nn.MaxPool2d(2, return_indices=True), lambda x: F.max_pool2d(x, x.shape[2]), None),
    ],
)
def test_maxima(module, does, window):
    for found in (read_module(module), read(does)):
        assert (found if window is None else (found.kind, found.window)) == (window and (MAXIMA, window))


@pytest.mark.parametrize(
    ("module", "does", "window"),
    [
        (nn.AvgPool2d(2), lambda x: F.avg_pool2d(x, 2), Window((2, 2), (2, 2))),
        (
            nn.AvgPool2d(3, 1, (1, 0), count_include_pad=False),
            lambda x: F.avg_pool2d(x, (3, 3), (1, 1), (1, 0), count_include_pad=False),
            Window((3, 3), (1, 1), (1, 0), counted=False),
        ),
        (nn.AvgPool2d(2, ceil_mode=True), lambda x: F.avg_pool2d(x, 2, ceil_mode=True), None),
        (nn.AvgPool2d(2, divisor_override=3), lambda x: F.avg_pool2d(x, 2, divisor_override=3), None),
        (nn.AdaptiveAvgPool2d(1), lambda x: F.adaptive_avg_pool2d(x, 1), Window(None)),
        (nn.AdaptiveAvgPool2d((1, 1)), lambda x: F.adaptive_avg_pool2d(x, (1, 1)), Window(None)),
        (nn.AdaptiveAvgPool2d((1, None)), lambda x: F.adaptive_avg_pool2d(x, 2), None),
    ],
)
def test_averages(module, does, window):
    for found in (read_module(module), read(does)):
        assert (found if window is None else (found.kind, found.window)) == (window and (AVERAGES, window))


class Mine(nn.ReLU):
    def forward(self, input):
        return -super().forward(input)


def test_a_forward_of_its_own_is_followed():
    found = read_module(Mine())
    assert found is None


@pytest.mark.parametrize(
    ("settings", "taken"),
    [({}, True), ({"stride": 2, "padding": 1, "dilation": 2}, True), ({"groups": 2}, True), ({"padding": "same"}, True),
     ({"padding": "same", "dilation": (2, 1)}, True), ({"padding_mode": "reflect"}, False)],
)  # fmt: skip
def test_convolutions_that_are_packed(settings, taken):
    module = sparse(thin(nn.Sequential(nn.Conv2d(4, 4, 3, **settings))))[0]
    found = read_module(module)
    assert (found is not None) == taken
    if taken:
        assert (found.kind, found.layer) == (CONVOLUTION, module)


def test_padding_that_is_uneven_is_left_alone():
    module = sparse(thin(nn.Sequential(nn.Conv2d(4, 4, (2, 3), padding="same"))))[0]
    assert read_module(module) is None
    module = sparse(thin(nn.Sequential(nn.Conv2d(4, 4, 3))))[0]
    module.stride = (0, 0)
    assert read_module(module) is None


def test_calls_in_another_way_are_left_alone():
    assert read(lambda m, x: m(input=x), nn.ReLU()) is None
    assert read(lambda x: torch.add(1, x)) is None
