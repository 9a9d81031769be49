"""Activations that a native call computes after a product, by their numbers in `native/secateur.h`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__: list[str] = []  # reached through secateur.accelerate alone

NONE, RELU, RELU6, GELU, GELU_TANH, SILU, TANH, SIGMOID, HARDSWISH, HARDSIGMOID = range(10)
GATE = 16
"""Added to the number of a layer whose result multiplies that of the next, which has the same input."""

_MODULES: dict[Any, tuple[tuple[str, ...], Mapping[tuple[Any, ...], int]]] = {
    nn.Identity.forward: ((), {(): NONE}),
    nn.Dropout.forward: ((), {(): NONE}),
    nn.ReLU.forward: ((), {(): RELU}),
    nn.Hardtanh.forward: (("min_val", "max_val"), {(0.0, 6.0): RELU6}),  # ReLU6 has this forward
    nn.GELU.forward: (("approximate",), {("none",): GELU, ("tanh",): GELU_TANH}),
    nn.SiLU.forward: ((), {(): SILU}),
    nn.Tanh.forward: ((), {(): TANH}),
    nn.Sigmoid.forward: ((), {(): SIGMOID}),
    nn.Hardswish.forward: ((), {(): HARDSWISH}),
    nn.Hardsigmoid.forward: ((), {(): HARDSIGMOID}),
}
"""By the forward of a class: the attributes that it reads, and the numbers that their values mean."""

_FUNCTIONS: tuple[tuple[Any, int], ...] = (
    (F.relu, RELU),
    (torch.relu, RELU),
    (F.relu6, RELU6),
    (F.gelu, GELU),
    (F.silu, SILU),
    (F.tanh, TANH),
    (torch.tanh, TANH),
    (F.sigmoid, SIGMOID),
    (torch.sigmoid, SIGMOID),
    (F.hardswish, HARDSWISH),
    (F.hardsigmoid, HARDSIGMOID),
)


def number(step: nn.Module | Callable[..., Any] | None) -> int | None:
    """The number of a module or function, of a module in evaluation; None if it is something else.

    >>> [number(step) for step in (nn.Dropout(), nn.ReLU(), F.gelu, nn.GELU("tanh"), nn.Hardtanh(), nn.Linear(2, 2))]
    [0, 1, 3, 4, None, None]
    """
    if not isinstance(step, nn.Module):
        return next((found for function, found in _FUNCTIONS if function is step), None)
    known = _MODULES.get(getattr(type(step), "forward", None))
    return None if known is None else known[1].get(tuple(step.__dict__.get(name) for name in known[0]))


def settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its number goes by.

    >>> settings(nn.GELU())
    {'approximate': 'none'}
    """
    names, _ = _MODULES.get(getattr(type(module), "forward", None), ((), {}))
    return {name: module.__dict__.get(name) for name in names}
