"""Which weights of a matrix may stay, as functions that solvers call with scores: by counts or laid by a pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateur.calibration.moments import Moments
from secateur.calibration.solvers.base import Select
from secateur.errors import InputError, PatternError, listed
from secateur.patterns import Joined, Pattern, Picked
from secateur.support import bits

Within = Literal["matrix", "row"]
"""Where weights are compared: in the whole matrix, with all of its groups, or for each output."""


def selector(
    moments: Moments,
    shapes: Mapping[str, Sequence[int]],
    weights: Tensor,
    zeros: int,
    *,
    pattern: Pattern | None = None,
    within: Within = "matrix",
) -> Select:
    """Make the function that chooses which weights stay.

    It leaves exactly `zeros` zeros, with a pattern to the nearest of its groups, those that are there already among
    them; where more are there already, these. Of equal scores the later ones stay.

    Args:
        moments: of the matrix.
        shapes: of its tensors, outputs first ([outputs, inputs, *kernel]).
        weights: of the matrix, [groups, rows, n]: zeros stay out.
        zeros: weights of the matrix that are zero in the end.
        pattern: laid on each tensor; then the groups of weights are compared in the whole matrix.
        within: where else; each row has as many, and a remainder goes by score.

    Raises:
        PatternError: the pattern cannot be laid on a tensor, or cannot give so many zeros.
        InputError: a count below 0 or above the size; a pattern whose groups span tensors.
    """
    if not 0 <= zeros <= weights.numel():
        raise InputError(
            f"{zeros:,} zeros were asked of {listed(moments.names)}, of {weights.numel():,} weights: ask for "
            "as many as there are, or fewer"
        )
    if pattern is None:
        return _Counted(weights != 0, zeros, within)
    return _Laid(moments, shapes, weights != 0, zeros, pattern)


class _Counted:
    """Any weights: as many in each unit (a row, or all) as is even, each no more than it has."""

    def __init__(self, alive: Tensor, zeros: int, within: Within) -> None:
        units = alive.shape[0] * alive.shape[1] if within == "row" else 1
        self._alive = None if bool(alive.all()) else alive
        has = alive.reshape(units, -1).sum(1)
        keep = min(alive.numel() - zeros, int(has.sum()))
        level = _level(has, keep)
        self._quota = has.clamp_max(level)
        self._open = has > level  # these may have one more
        self._rest = keep - int(self._quota.sum())

    def __call__(self, scores: Tensor) -> Tensor:
        if self._alive is not None:
            scores = scores.masked_fill(~self._alive, -math.inf)
        values, quota = scores.reshape(len(self._quota), -1), self._quota
        if self._rest:
            quota = quota + _highest(_ranked(values, quota + self._open).where(self._open, -math.inf), self._rest)
        return _above(values, _ranked(values, quota), quota).view(scores.shape)


class _Laid:
    """Groups of weights as a pattern says, on each tensor; the lowest groups of all go."""

    def __init__(
        self, moments: Moments, shapes: Mapping[str, Sequence[int]], alive: Tensor, zeros: int, pattern: Pattern
    ) -> None:
        if isinstance(pattern, (Joined, Picked)):
            raise InputError(f"the pattern {pattern} joins tensors: give one of single tensors, such as sc.n_m(2, 4)")
        self._moments, self._shapes, self._pattern, self._zeros = moments, shapes, pattern, zeros
        parts = moments.parts(alive, shapes)
        for piece, part in parts:
            pattern.check(piece.name, part.shape)
        self._sizes = [pattern.group(part.shape) for _, part in parts]
        self._all = zeros == (legal := sum(pattern.legal(part.shape) for _, part in parts))
        if zeros > legal:
            raise PatternError(
                f"{zeros:,} zeros were asked of {listed(moments.names)}, and the pattern {pattern} gives {legal:,} at "
                "most: ask for fewer"
            )
        self._alive = [part for _, part in parts]
        self._gone = [self._whole(~part) for part in self._alive]

    def __call__(self, scores: Tensor) -> Tensor:
        parts = [part for _, part in self._moments.parts(scores, self._shapes)]
        reduced = [self._reduced(*each) for each in zip(parts, self._alive, self._gone, self._sizes, strict=True)]
        kept = [found == math.inf for found in reduced] if self._all else self._rank(reduced)
        masks = [
            self._pattern.expand(keep.reshape(-1), alive.shape) & alive
            for keep, alive in zip(kept, self._alive, strict=True)
        ]
        return torch.cat([mask.flatten(1) for mask in masks], 1).view(scores.shape)

    def _reduced(self, scores: Tensor, alive: Tensor, gone: Tensor, size: int) -> Tensor:
        """A score for each group: -inf where nothing is left of it."""
        if size == 1:
            return self._pattern.reduce(scores.masked_fill(~alive, -math.inf), self._zeros)
        low, high = scores == -math.inf, scores == math.inf
        reduced = self._pattern.reduce(scores.masked_fill(~alive | low | high, 0.0), self._zeros)
        stay = reduced == math.inf
        for flags, value in ((low, -math.inf), (high, math.inf)):
            if bool(flags.any()):  # a solver that goes from column to column has decided these
                reduced = reduced.masked_fill(self._some(flags), value)
        return reduced.masked_fill(gone & ~stay, -math.inf)

    def _rank(self, reduced: Sequence[Tensor]) -> list[Tensor]:
        """Which groups stay: the lowest go, until the zeros are met to the nearest."""
        flat = torch.cat([found.reshape(-1) for found in reduced])
        counts = [found.numel() for found in reduced]
        sizes = torch.tensor(self._sizes, device=flat.device).repeat_interleave(
            torch.tensor(counts, device=flat.device)
        )
        order = flat.argsort(stable=True)
        ordered = sizes[order]
        go = 2 * ordered.cumsum(0) - ordered <= 2 * self._zeros
        kept = torch.empty_like(go)
        kept[order] = ~go | (flat[order] == math.inf)
        return list(torch.split(kept, counts))

    def _whole(self, flags: Tensor) -> Tensor:
        """The groups of which all weights are flagged."""
        return self._pattern.reduce((~flags).float(), self._zeros) == 0

    def _some(self, flags: Tensor) -> Tensor:
        """The groups of which some weight is flagged."""
        found = self._pattern.reduce(flags.float(), self._zeros)
        return (found > 0) & (found < math.inf)


def _level(has: Tensor, keep: int) -> int:
    """The most that every unit may have, as far as it has so many, without more than `keep` in all."""
    low, high = 0, int(has.max()) if has.numel() else 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(has.clamp_max(middle).sum()) <= keep else (low, middle - 1)
    return low


def _ranked(values: Tensor, places: Tensor) -> Tensor:
    """Of each row of values the one at a place, 1 being the highest; +inf at place 0."""
    at = (values.shape[1] - places).clamp_max(max(values.shape[1] - 1, 0))
    if not bits.on_cpu(values):
        ordered = values.sort(1).values
    else:
        wanted = np.unique(at.numpy())
        one_by_one = len(wanted) <= 4  # a partition for each of many places is slower than a sort
        array = values.contiguous().numpy()
        ordered = torch.from_numpy(np.partition(array, wanted, 1) if one_by_one else np.sort(array, 1))
    return ordered.gather(1, at[:, None])[:, 0].masked_fill(places == 0, math.inf)


def _above(values: Tensor, cut: Tensor, quota: Tensor) -> Tensor:
    """The values of each row above its cut, and of those equal to it the last ones, as many as the quota says."""
    kept = values >= cut[:, None]
    if int(kept.count_nonzero()) == int(quota.sum()):  # far quicker than a count for each row
        return kept
    over = kept.sum(1) > quota
    rows, above = values[over], values[over] > cut[over, None]
    equal = rows == cut[over, None]
    room = (quota[over] - above.sum(1))[:, None]
    kept[over] = above | (equal & (equal.flip(1).cumsum(1).flip(1) <= room))
    return kept


def _highest(values: Tensor, count: int) -> Tensor:
    """The `count` highest of some values; of equals the last ones."""
    row, quota = values[None], torch.tensor([count], device=values.device)
    return _above(row, _ranked(row, quota), quota)[0]
