"""Which positions of a batch are padding, as its masks tell."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.support.inputs import Arguments


def real_positions(model: nn.Module, call: Arguments) -> list[Tensor]:
    """The masks [examples, positions] among the arguments of a call, True where there is no padding.

    A mask is a two-dimensional tensor of bools or of whole numbers 0 and 1 whose name holds "mask". 1 stands for what
    is real, as in transformers; where the name says `padding_mask`, True stands for padding, as in torch.nn.

    Args:
        model: tells the names of positional arguments.
        call: its arguments.
    """
    found = []
    for name, value in _named(model, call):
        if "mask" not in name or not isinstance(value, Tensor) or value.ndim != 2 or value.is_floating_point():
            continue
        if value.dtype != torch.bool and not ((value == 0) | (value == 1)).all():
            continue
        real = value != 0
        found.append(~real if "padding_mask" in name else real)
    return [mask for mask in found if not mask.all()]


def kept(masks: Sequence[Tensor], shape: Sequence[int], time_first: bool = False) -> Tensor | None:
    """Which samples of an input are no padding, flat; None if no mask, or more than one, is of its shape.

    Args:
        masks: of the batch, from `real_positions`.
        shape: of the samples: [examples, positions, ...] or [examples * positions, ...].
        time_first: whether it is [positions, examples, ...] or the like instead.
    """
    found = []
    for mask in masks:
        turned = mask.T if time_first else mask
        if tuple(shape[:2]) == tuple(turned.shape):
            rest = shape[2:]
        elif len(shape) and shape[0] == mask.numel():
            turned, rest = turned.reshape(-1), shape[1:]
        else:
            continue
        wide = turned.reshape(*turned.shape, *[1] * len(rest)).expand(*turned.shape, *rest)
        found.append(wide.reshape(-1))
    if not found or any(not torch.equal(found[0], other) for other in found[1:]):
        return None
    return found[0]


def _named(model: nn.Module, call: Arguments) -> Iterator[tuple[str, Any]]:
    args, kwargs = call
    try:
        names = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # what it lacks the model itself says better
        names = kwargs
    for name, value in names.items():
        if isinstance(value, dict):  # **kwargs
            yield from value.items()
        else:
            yield name, value
