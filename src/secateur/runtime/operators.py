"""The sparse products as registered operators, `torch.ops.secateur.*`: what `torch.compile` and `torch.export` see.

Eager calls go straight to `secateur.runtime.products`, as an operator costs microseconds. The fake implementations
know shapes only, so batch sizes may be symbols. There are no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import InputTypeError, StateError
from secateur.runtime import products, recurrent_products

_LINEAR = "(Tensor x, Tensor weight, Tensor packed, Tensor? bias, int choices) -> Tensor"
_PACKED_LINEAR = "(Tensor x, Tensor packed, Tensor? bias, int rows, int columns, int choices) -> Tensor"
_CONV2D = (
    "(Tensor x, Tensor weight, Tensor packed, Tensor? bias, int[] stride, SymInt[] padding, int[] dilation, "
    "int groups, int choices) -> Tensor"
)
_RECURRENT = (
    "(Tensor x, Tensor? sizes, Tensor h, Tensor? c, Tensor[] weights, Tensor[] packed, bool bidirectional, "
    "int kind, int choices) -> (Tensor, Tensor, Tensor)"
)
_CELL = (
    "(int kind, Tensor x, Tensor h, Tensor? c, Tensor?[] weights, Tensor?[] packed, int choices) -> (Tensor, Tensor)"
)


def _linear_shape(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, choices: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _packed_linear_shape(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, columns: int, choices: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _conv2d_shape(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    choices: int,
) -> Tensor:
    size = products.conv_size(x.shape[-2:], weight.shape[-2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *size))


def _recurrent_shape(
    x: Tensor,
    sizes: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    bidirectional: bool,
    kind: int,
    choices: int,
) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty((*x.shape[:-1], h.shape[-1] * (2 if bidirectional else 1)))
    return out, *_states_shape(h, c)


def _cell_shape(
    kind: int,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    packed: Sequence[Tensor | None],
    choices: int,
) -> tuple[Tensor, Tensor]:
    return _states_shape(h, c)


def _states_shape(h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(0) if c is None else c.new_empty(c.shape)


def _linear(x: Tensor, *rest: Any) -> Tensor:
    require_float(x)
    return products.linear(x, *rest)


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, columns: int, choices: int) -> Tensor:
    require_float(x)
    return products.linear(x, torch.empty(rows, columns, device="meta"), packed, bias, choices)


def _conv2d(x: Tensor, *rest: Any) -> Tensor:
    require_float(x)
    given: Any = (tuple(one) if isinstance(one, list) else one for one in rest)
    return products.conv2d(x, *given).contiguous()  # the dense one may give channels_last, the fake one does not


def _recurrent(x: Tensor, sizes: Tensor | None, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    require_float(*(tensor for tensor in (x, h, c) if tensor is not None))
    return tuple(tensor.contiguous() for tensor in recurrent_products.recurrent(x, sizes, h, c, *rest))


def _cell(
    kind: int, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor | None], *rest: Any
) -> tuple[Tensor, Tensor]:
    require_float(*(tensor for tensor in (x, h, c) if tensor is not None))
    found: Any = recurrent_products.cell(kind, x, h, c, weights, *rest)
    if found is None:
        found = recurrent_products.dense_cell(kind, x, h, c, weights)
    next_h, next_c = found if isinstance(found, tuple) else (found, None)
    return next_h, h.new_empty(0) if next_c is None else next_c


def require_float(*inputs: Tensor) -> None:
    """Raise an InputTypeError for an input of a graph that is not float32."""
    for tensor in inputs:
        if tensor.dtype is not torch.float32:
            raise InputTypeError(
                f"a sparse layer in a graph takes float32, and got {tensor.dtype}: convert it, or retrace"
            )


def _refuse(context: Any, *gradients: Any) -> None:
    raise StateError(
        "a sparse layer is for inference and has no gradients. "
        "Train the model you gave to accelerate, or sc.dense(fast)."
    )


def register(name: str, schema: str, kernel: Callable[..., Any], shape: Callable[..., Any]) -> None:
    """Make `torch.ops.secateur.<name>`: the product, and `shape`, which gives empty tensors like its results."""
    full = f"secateur::{name}"
    torch.library.define(full, schema)
    torch.library.impl(full, "CPU", kernel)
    torch.library.register_fake(full, shape)
    torch.library.register_autograd(full, _refuse)


register("linear", _LINEAR, _linear, _linear_shape)
register("packed_linear", _PACKED_LINEAR, _packed_linear, _packed_linear_shape)
register(
    "unpack",
    "(Tensor packed, int rows, int columns) -> Tensor",
    products.unpack,
    lambda packed, rows, columns: packed.new_empty((rows, columns), dtype=torch.float32),
)
register("conv2d", _CONV2D, _conv2d, _conv2d_shape)
register("recurrent", _RECURRENT, _recurrent, _recurrent_shape)
register("cell", _CELL, _cell, _cell_shape)
