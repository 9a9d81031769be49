"""What the nodes of a graph do, of those that may be part of a network of convolutions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from secateur.runtime import activations
from secateur.runtime.attributes import packed
from secateur.runtime.convolutions import SparseConv2d, even_padding
from secateur.runtime.swapping import held_at

__all__: list[str] = []  # reached through secateur.accelerate alone

CONVOLUTION, MAXIMA, AVERAGES, NEITHER = range(4)
"""Kinds of steps, as in `native/secateur.h`."""
NORM, ADDITION, SAME, PRODUCT = 4, 5, 6, 7
"""Further kinds of operations."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """What is pooled together; a size of None is the whole image. `summed`: by a sum, which is contiguous in torch."""

    size: Pair | None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    counted: bool = True
    summed: bool = False


@dataclass(frozen=True)
class Operation:
    """What a node does to values: a kind of step, or something that may become part of one."""

    kind: int
    layer: Any = None
    window: Window | None = None
    activation: int = activations.NONE
    in_place: bool = False
    values: tuple[fx.Node, ...] = ()


def read(node: fx.Node, module: nn.Module) -> Operation | None:
    """What a node does, if it may be part of a region."""
    if node.op == "call_module":
        layer: Any = held_at(module, str(node.target))
        if node.kwargs or len(node.args) != 1:
            return None
        reader = _MODULES.get(type(layer).forward)
        found = _active(layer) if reader is None else reader(layer)
    elif node.op in ("call_function", "call_method"):
        function = _FUNCTIONS.get(node.target)
        found = None if function is None else _called(function, node)
    else:
        return None
    if found is None:
        return None
    values = tuple(value for value in node.args[: _inputs(found)] if isinstance(value, fx.Node))
    return replace(found, values=values) if len(values) == _inputs(found) else None


def _inputs(operation: Operation) -> int:
    return 2 if operation.kind in (ADDITION, PRODUCT) else 1


_Found = Operation | None


def _called(function: Callable[..., _Found], node: fx.Node) -> _Found:
    try:
        return function(*node.args, **node.kwargs)
    except TypeError:  # arguments of another form of it
        return None


def _activation(kind: int, in_place: bool = False) -> Callable[..., _Found]:
    def found(x: Any, inplace: bool = in_place) -> _Found:
        return Operation(NEITHER, activation=kind, in_place=bool(inplace))

    return found


def _active(layer: nn.Module) -> _Found:
    kind = activations.number(layer)
    if not kind:
        return None if kind is None else Operation(SAME)
    return _activation(kind, getattr(layer, "inplace", False))(None)


def _gelu(x: Any, approximate: str = "none") -> _Found:
    kind = {"none": activations.GELU, "tanh": activations.GELU_TANH}.get(approximate)
    return None if kind is None else _activation(kind)(x)


def _clip(x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> _Found:
    return _activation(activations.RELU6)(x, inplace) if (min_val, max_val) == (0, 6) else None


def _of_two(kind: int, in_place: bool = False) -> Callable[..., _Found]:
    def found(x: Any, other: Any) -> _Found:
        return Operation(kind, in_place=in_place)

    return found


def _mean(x: Any, dim: Any = None, keepdim: bool = False) -> _Found:
    axes = sorted(axis % 4 for axis in dim) if isinstance(dim, list | tuple) else None  # of images, which have four
    return Operation(AVERAGES, window=Window(None, summed=True)) if keepdim and axes == [2, 3] else None


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Found:
    return None if training else Operation(SAME)


def _max_pool(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Found:
    sizes = _pairs(kernel_size, kernel_size if stride is None else stride, padding, dilation)
    return None if ceil_mode or return_indices or sizes is None else Operation(MAXIMA, window=Window(*sizes))


def _average_pool(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> _Found:
    sizes = _pairs(kernel_size, kernel_size if stride is None else stride, padding, 1)
    if ceil_mode or divisor_override is not None or sizes is None:
        return None
    window = Window(sizes[0], sizes[1], sizes[2], counted=bool(count_include_pad))
    return Operation(AVERAGES, window=window)


def _adaptive_pool(x: Any, output_size: Any) -> _Found:
    return Operation(AVERAGES, window=Window(None)) if output_size in (1, (1, 1), [1, 1]) else None


def _pairs(*sizes: Any) -> Any:
    """Sizes, each for height and width; None if some are computed."""
    both = [tuple(one) if isinstance(one, list | tuple) else (one, one) for one in sizes]
    both = [one * 2 if len(one) == 1 else one for one in both]
    whole = all(len(one) == 2 and all(type(size) is int for size in one) for one in both)
    return tuple(both) if whole else None


def _convolution(layer: Any) -> _Found:
    plain = packed(layer) and layer.padding_mode == "zeros" and even_padding(layer)
    return Operation(CONVOLUTION, layer) if plain else None


def _norm(layer: Any) -> _Found:
    fixed = isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None
    return Operation(NORM, layer) if fixed else None


_MODULES: Mapping[Any, Callable[[Any], _Found]] = {
    SparseConv2d.forward: _convolution,
    nn.BatchNorm2d.forward: _norm,
    nn.Dropout2d.forward: lambda layer: Operation(SAME),
    nn.MaxPool2d.forward: lambda m: _max_pool(
        None, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d.forward: lambda m: _average_pool(
        None, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d.forward: lambda layer: _adaptive_pool(None, layer.output_size),
}
"""By the forward of a class, which subclasses with one of their own do not have; beside those of `activations`."""

_FUNCTIONS: Mapping[Any, Callable[..., _Found]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), _activation(activations.RELU)),
    **dict.fromkeys((torch.relu_, F.relu_, "relu_"), _activation(activations.RELU, in_place=True)),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), _activation(activations.TANH)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), _activation(activations.SIGMOID)),
    F.relu6: _activation(activations.RELU6),
    F.silu: _activation(activations.SILU),
    F.hardswish: _activation(activations.HARDSWISH),
    F.hardsigmoid: _activation(activations.HARDSIGMOID),
    F.gelu: _gelu,
    F.hardtanh: _clip,
    **dict.fromkeys((operator.add, torch.add, "add"), _of_two(ADDITION)),
    **dict.fromkeys((operator.iadd, "add_"), _of_two(ADDITION, in_place=True)),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _of_two(PRODUCT)),
    **dict.fromkeys((operator.imul, "mul_"), _of_two(PRODUCT, in_place=True)),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((F.dropout, F.dropout2d), _dropout),
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _average_pool,
    F.adaptive_avg_pool2d: _adaptive_pool,
}
