"""Ints that remember what they were read from, so that a size used again is known to tie two axes.

`B, N, C = x.shape` and later `y.reshape(B, N, C)` ask that the last axis of the result has the size of the last axis of
x; `self.head_dim` in two views asks that two axes have one size. Both are plain ints to torch and to the model. For one
forward they are `Reading`s, a subclass of int, and where a function of torch is asked for such a size, the ledger notes
that two extents are equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.structure.fields import Shape, labels, support
from secateur.structure.units import Extent, Ledger

_FIXED = Extent(np.zeros(1, np.int64), (0,))  # no unit lies there, so its size never changes


class Reading(int):
    """`factor` times the size of an axis, or times an attribute.

    Attributes:
        source: the axis, or the place of the attribute.
        factor: 1/4 after `size // 4`, 3 after `3 * size`.
    """

    source: Extent | str
    factor: Fraction

    def __new__(cls, value: int, source: Extent | str, factor: Fraction = Fraction(1)) -> Reading:
        self = super().__new__(cls, value)
        self.source, self.factor = source, factor
        return self

    def __mul__(self, other: Any) -> Any:
        if type(other) is int and other > 0:
            return Reading(int(self) * other, self.source, self.factor * other)
        return int(self) * (int(other) if isinstance(other, Reading) else other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int) and other > 0 and int(self) % other == 0:
            return Reading(int(self) // other, self.source, self.factor / int(other))
        return int(self) // other

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def sizes_of(shape: Shape, fields: Sequence[Tensor]) -> torch.Size:
    """The shape of a tensor, with readings where it has units."""
    extents = [_extent(shape, fields, (d,)) for d in range(len(shape))]
    return torch.Size(n if e is None or e is _FIXED else Reading(n, e) for n, e in zip(shape, extents, strict=True))


def asked(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], outs: Sequence[Tensor]
) -> Iterator[tuple[Tensor, int, Reading]]:
    """The results of a call, their dimensions and the readings that were asked for there."""
    given = [a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
    if name in _SHAPED:
        flat = [n for a in given for n in (a if isinstance(a, tuple | list) else (a,)) if isinstance(n, int)]
        if len(flat) == outs[0].ndim:
            yield from ((outs[0], d, n) for d, n in enumerate(flat) if isinstance(n, Reading))
    elif name in _SPLIT and given and len({t.shape for t in outs}) == 1:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        parts = [given[0]] * len(outs) if isinstance(given[0], int) else given[0]
        yield from ((t, dim % t.ndim, n) for t, n in zip(outs, parts, strict=True) if isinstance(n, Reading))


_SHAPED = frozenset(["view", "reshape"])
_SPLIT = frozenset(["split", "split_with_sizes"])


class Readings:
    """The equations between sizes that one capture meets."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._first: dict[str, Extent] = {}  # attribute -> the axis that had its size first, scaled to the attribute

    def met(self, shape: Shape, fields: Sequence[Tensor], dim: int, value: Reading, why: str) -> None:
        """A result of this shape was asked to have this size along `dim`."""
        dims: tuple[int, ...] = (dim,)
        factor = value.factor
        if factor < 1:  # [.., heads, embed // heads] or [batch * heads, .., embed // heads]: together they are embed
            known = frozenset[int]().union(*map(support, fields))
            times = {d: shape[d] * factor for d in range(len(shape)) if d != dim}
            beside = [d for d, n in times.items() if n == 1 or (n.denominator == 1 and d in known)]
            if beside:
                nearest = min(beside, key=lambda d: (times[d] != 1, abs(d - dim)))
                dims, factor = tuple(sorted((nearest, dim))), times[nearest]
        here = _extent(shape, fields, dims)
        if here is None:  # a product of counts, no equation between them: the parts keep their sizes
            for f in fields:
                if own := support(f) & set(dims):
                    self._ledger.equal(Extent(labels(f), tuple(sorted(own))), _FIXED, why)
        elif isinstance(value.source, Extent):
            self._ledger.equal(value.source.times(factor), here, why)
        elif value.source in self._first:
            self._ledger.equal(self._first[value.source].times(factor), here, why)
        else:
            self._first[value.source] = here.times(1 / factor)


def _extent(shape: Shape, fields: Sequence[Tensor], dims: tuple[int, ...]) -> Extent | None:
    """The extent of a tensor along some dimensions; None where two fields share it."""
    own = [f for f in fields if support(f) & set(dims)]
    if not own:
        return _FIXED
    if len(own) > 1:
        return None
    alike = [shape[d] for d in dims if d not in support(own[0])]
    return Extent(labels(own[0]), dims, Fraction(int(np.prod(alike, dtype=np.int64))))


@contextlib.contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """For a while the int attributes of a model's own modules are readings of themselves."""
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("torch."):
            space = vars(module)
            space.update({k: Reading(v, f"{path}.{k}") for k, v in space.items() if type(v) is int and v > 1})
    try:
        yield
    finally:
        for module in model.modules():
            space = vars(module)
            space.update({k: plain for k, v in space.items() if (plain := _plain(v)) is not v})


def _plain(value: Any) -> Any:
    """A value without readings, also where a forward stored those of a shape."""
    if isinstance(value, Reading):
        return int(value)
    if type(value) in (tuple, list, torch.Size) and any(isinstance(v, Reading) for v in value):
        return type(value)([int(v) if isinstance(v, Reading) else v for v in value])
    return value
