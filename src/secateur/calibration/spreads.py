"""How far the numbers at each place of a model lie apart, over several batches: what an error there is measured by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEAST = 1e-2  # of the mean square: nearer together, numbers are taken for one constant
_FAINT = 1e-3  # of the median mean square of all places: what varies less is as good as a constant


@dataclass
class _Moments:
    """Of rows of one width: how many, their mean, and the sum of their squared distances from it."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    apart: float = 0.0


class Spreads:
    """The variance of a number at each place, from all batches that were noted: one batch may be a single row.

    Where all rows are the same it is a hundredth of their mean square, so that a constant weighs little.

    Args:
        alike: places are compared: what is next to nothing beside the others, such as a closed ReLU, weighs little too.
    """

    def __init__(self, alike: bool) -> None:
        self._alike = alike
        self._noted: dict[Hashable, dict[int, _Moments]] = {}
        self._found: dict[Hashable, float] = {}
        self._typical: float | None = None

    @torch.no_grad()
    def note(self, place: Hashable, rows: Tensor) -> None:
        """Take in rows [samples, numbers], in float32; the width may differ from batch to batch."""
        widths = self._noted.setdefault(place, {})
        count, width = rows.shape
        if not rows.numel():
            return
        old = widths.setdefault(width, _Moments())
        mean = rows.mean(0)
        apart, mean = float((rows - mean).square().sum()), mean.cpu().double()
        step, total = mean - old.mean, old.count + count
        old.apart += apart + float(step.square().sum()) * old.count * count / total
        old.mean, old.count = old.mean + step * (count / total), total

    def of(self, place: Hashable, rows: Tensor) -> float:
        """The variance at a place; of one that was not noted, that of these rows. 0 where all is zero."""
        if place not in self._noted:
            self.note(place, rows)
        if place not in self._found:
            self._found[place] = self._spread(self._noted[place])
        return self._found[place]

    def _spread(self, widths: dict[int, _Moments]) -> float:
        if self._alike and self._typical is None:
            self._typical = statistics.median(map(_square, self._noted.values()))
        variance, square, typical = _variance(widths), _square(widths), self._typical or 0.0
        if variance <= _LEAST * square:
            return _LEAST * max(square, typical)
        return variance if math.isnan(variance) else max(variance, _FAINT * typical)


def _square(widths: dict[int, _Moments]) -> float:
    """The mean square."""
    numbers = sum(width * one.count for width, one in widths.items())
    squares = sum(one.apart + one.count * float(one.mean.square().sum()) for one in widths.values())
    return squares / max(numbers, 1)


def _variance(widths: dict[int, _Moments]) -> float:
    """About the mean of each width; the mean square where each was seen but once, as there is no telling."""
    free = sum(width * (one.count - 1) for width, one in widths.items())
    return sum(one.apart for one in widths.values()) / free if free else _square(widths)
