"""What remains of the results of a captured forward when units go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.structure.calls import Call, Run
from secateur.structure.fields import Labelled, Shape, labels, support

Sizes = list[list[Shape] | None]
"""For each call the shapes of its results; None where any will do, -1 for a size that depends on data."""


class Part(NamedTuple):
    """What remains of a tensor.

    Attributes:
        shape: of what remains.
        lines: for each dimension the positions at which something stays; None where all do.
        inner: of what these leave, the numbers that stay, with size 1 where all are alike; None where all do. So it is
            where lines keep different positions ([layers, hidden]).
    """

    shape: Shape
    lines: list[Tensor | None]
    inner: Tensor | None

    def cut(self, t: Tensor) -> Tensor:
        """What remains of a tensor, close together; flat where lines keep different positions."""
        t = self.box(t)
        return t if self.inner is None else t[self.inner.to(t.device).expand(t.shape)]

    def box(self, t: Tensor) -> Tensor:
        """A tensor without the lines of which nothing remains."""
        return _at(t, self.lines)


def part(shape: Shape, fields: Sequence[Tensor], kept: Tensor) -> Part:
    """What remains of a tensor.

    Args:
        shape: of the tensor.
        fields: of the tensor.
        kept: for each label, whether it stays.
    """
    own = kept.numpy()
    stays = [s for f in fields if not (s := own[labels(f)]).all()]
    masks: list[NDArray[np.bool_] | None] = [None] * len(shape)
    joint = []
    for s in stays:
        varies = [d for d, n in enumerate(s.shape) if n > 1]
        joint += [s] if len(varies) > 1 else []
        for d in varies:
            some = s.any(tuple(k for k in varies if k != d)).ravel()
            old = masks[d]
            masks[d] = some if old is None else old & some
    lines = [None if mask is None else torch.from_numpy(np.flatnonzero(mask)) for mask in masks]
    inner: Tensor | None = None
    for s in joint:
        rest = _at(torch.from_numpy(s), [line if n > 1 else None for line, n in zip(lines, s.shape, strict=True)])
        if not bool(rest.all()):
            inner = rest if inner is None else inner & rest
    sizes = [n if line is None else len(line) for n, line in zip(shape, lines, strict=True)]
    if inner is not None:
        box = _extents(inner)
        sizes = [m if inner.shape[d] > 1 else n for d, (n, m) in enumerate(zip(sizes, box, strict=True))]
    return Part(tuple(sizes), lines, inner)


def size(shape: Shape, fields: Sequence[Tensor], kept: Tensor) -> Shape:
    """The shape of what remains of a tensor; arguments as of `part`."""
    return part(shape, fields, kept).shape


def _at(t: Tensor, lines: Sequence[Tensor | None]) -> Tensor:
    for d, line in enumerate(lines):
        if line is not None:
            t = pick(t, d, line)
    return t


def pick(t: Tensor, dim: int, at: Tensor) -> Tensor:
    """Some positions of a tensor along one dimension."""
    at = at.to(t.device)
    if 0 < dim == t.ndim - 1:  # there torch's index_select is slow
        return t.gather(dim, at.expand(*t.shape[:-1], -1))
    return t.index_select(dim, at)


def _extents(stays: Tensor) -> Shape:
    """The sizes of the box that the kept positions fill when they close ranks.

    Along each dimension either whole slices go, so that those which stay are counted, or as many positions of every
    line. They differ where lines keep different positions ([layers, hidden]): the box with the right number is it.
    """
    lines = [int(stays.sum(d).max()) for d in range(stays.ndim)]
    slices = [int(stays.movedim(d, 0).reshape(stays.shape[d], -1).any(1).sum()) for d in range(stays.ndim)]
    boxes = itertools.product(*({a: 0, b: 0} for a, b in zip(slices, lines, strict=True)))
    total = int(stays.sum())
    return next((box for box in boxes if math.prod(box) == total), tuple(lines))


class Remains:
    """What remains of the results of one forward."""

    def __init__(self, run: Run, kept: Tensor) -> None:
        self.run, self.kept = run, kept
        self._parts: dict[tuple[Shape, tuple[int, ...]], Part] = {}

    def _part(self, known: Labelled) -> Part:
        shape, fields = known
        at = shape, tuple(map(id, fields))  # the run keeps its fields
        if at not in self._parts:
            self._parts[at] = part(shape, fields, self.kept)
        return self._parts[at]

    @cached_property
    def outs(self) -> list[list[Part]]:
        """What remains of the results of each call."""
        return [[*map(self._part, call.outs)] for call in self.run.calls]

    def ins(self, call: Call) -> list[Part]:
        """What remains of the operands of a call."""
        return [*map(self._part, call.ins)]

    @cached_property
    def sizes(self) -> Sizes:
        """The shapes that are to be expected."""
        return [
            None if call.elastic else [_expected(call, *one) for one in zip(call.outs, parts, strict=True)]
            for call, parts in zip(self.run.calls, self.outs, strict=True)
        ]


def _expected(call: Call, known: tuple[Shape, list[Tensor]], left: Part) -> Shape:
    """The shape of a result; -1 along dimensions where it depends on data."""
    if not call.loose:
        return left.shape
    labelled = {d for f in known[1] for d in support(f)}
    return tuple(n if d in labelled else -1 for d, n in enumerate(left.shape))
