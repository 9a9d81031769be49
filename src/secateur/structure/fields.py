"""Fields: tensors of labels that ride along with a tensor.

A field has as many dimensions as its tensor, and size 1 along those where its labels do not vary. Labels are float64,
exact to 2^53, because torch moves floats in every way and integers in some. A number of the tensor goes when the label
of any of its fields goes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from secateur.structure.units import Labels

Shape = tuple[int, ...]
Labelled = tuple[Shape, list[Tensor]]
"""The shape of a tensor, and its fields."""


def measured(tensor: Tensor) -> bool:
    """Whether a tensor has labels: one of real or complex numbers, none of indices or flags."""
    return tensor.is_floating_point() or tensor.is_complex()


def labels(field: Tensor) -> Labels:
    """The labels of a field as integers of the same shape."""
    found: Labels = field.to(torch.int64).numpy()
    return found


def support(field: Tensor) -> frozenset[int]:
    """The dimensions along which a field varies."""
    return _varying(field.shape)


@functools.lru_cache(1 << 14)
def _varying(shape: Shape) -> frozenset[int]:
    return frozenset(d for d, n in enumerate(shape) if n > 1)


def squeeze(field: Tensor) -> Tensor | None:
    """Give a field size 1 along each dimension where its labels do not vary; None if nothing is labelled."""
    own = field.numpy()
    for d, n in enumerate(own.shape):
        if n > 1:
            first = own[(slice(None),) * d + (slice(1),)]
            if own.strides[d] == 0 or bool((own == first).all()):
                own = first
    return torch.from_numpy(own.copy()) if own.any() else None


def lead(field: Tensor, ndim: int) -> Tensor:
    """The same field for a tensor with more dimensions in front."""
    return field.reshape((1,) * (ndim - field.ndim) + tuple(field.shape))


def along(values: Labels | Tensor, ndim: int, dim: int) -> Tensor:
    """A field that varies along one dimension only."""
    shape = [-1 if d == dim else 1 for d in range(ndim)]
    return torch.as_tensor(values, dtype=torch.float64).reshape(shape)


def blend(fields: Iterable[Tensor]) -> list[Tensor]:
    """Join the fields that never label the same element: the parts of a concatenation are one field."""
    out: list[Tensor] = []
    for f in fields:
        for i, g in enumerate(out):
            if support(f) == support(g) and not bool(((f != 0) & (g != 0)).any()):
                out[i] = f + g
                break
        else:
            out.append(f)
    return out


def variation(field: Tensor, dims: Iterable[int]) -> float:
    """How much labels vary along some dimensions: 0 not at all, 1 at every step."""
    return max((float((field.diff(dim=d) != 0).double().mean()) for d in dims), default=0.0)


def misfit(f: Tensor, g: Tensor) -> float:
    """How badly two fields fit: how much one varies where the other does not."""
    return variation(f, support(f) - support(g)) + variation(g, support(g) - support(f))
