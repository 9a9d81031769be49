"""The exact k lowest scores of many tensors, in streaming passes: no concatenation, no sort of all weights.

A threshold is found in two steps. A sample of the scores gives a bracket around the k-th lowest; one pass counts
what lies below the bracket and gathers what lies inside (about 1 %), which is then searched exactly. Ties at the
threshold go in order of (tensor, row-major index). The result is that of a stable sort of all scores, whatever the
chunks, the sample or the threads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur import bits
from secateur.errors import InputError
from secateur.scores import Score, evaluate, magnitude

_SAMPLE = 1 << 16
_SIGMAS = 4.0  # half-width of the bracket in standard deviations of the sample's rank: it seldom misses

_Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Stream:
    """The scores of one tensor, read in pieces.

    Attributes:
        name: of the tensor, for messages.
        values: the scores, or the weights if `score` is given.
        score: an elementwise score of the weights, called on flat pieces.
        kept: bits of the weights kept so far; those pruned already rank below all others.
        protected: row-major indices that are never pruned; they rank above all others.
        group: weights that stand behind each score (more than 1 where a pattern prunes them together).
    """

    name: str
    values: Tensor
    score: Score | None = None
    kept: Tensor | None = None
    protected: range = range(0)
    group: int = 1

    def pieces(self, dtype: torch.dtype, *, check: bool = False) -> Iterator[Tensor]:
        """Yield the scores in row-major order, flat, as `dtype`; -inf where pruned, +inf where protected.

        A piece lasts until the next one: they may share their memory. `check` looks for NaN and inf in magnitudes.
        """
        room = torch.empty(0, dtype=dtype, device=self.values.device)
        for start, raw in bits.chunks(self.values.detach()):
            if self.score is magnitude and raw.dtype.to_real() == dtype:
                room = room if room.numel() >= raw.numel() else room.new_empty(raw.numel())
                scores = torch.abs(raw, out=room[: raw.numel()])
            else:
                scores = self._scored(raw)
            if check and self.score is magnitude and not math.isfinite(_highest(scores)):
                require_finite(self.name, self.values)
            yield self._ranked(scores, start).to(dtype)

    def sample(self, indices: npt.NDArray[np.int64], dtype: torch.dtype) -> Tensor:
        """Return the scores at some row-major indices (a protected one may show its own score)."""
        where = torch.from_numpy(indices).to(self.values.device)
        scores = self._scored(self.values.detach().reshape(-1)[where])
        if self.kept is not None:
            kept = (self.kept[where // 8] >> (where % 8).to(torch.uint8)) & 1
            scores = scores.masked_fill(kept == 0, -math.inf)
        return scores.to("cpu", dtype)

    def _scored(self, raw: Tensor) -> Tensor:
        if self.score is None:
            return raw
        if self.score is magnitude:
            return raw.abs()
        return zeros_first(evaluate(self.score, self.name, raw), raw)

    def _ranked(self, scores: Tensor, start: int) -> Tensor:
        stop = start + scores.numel()
        if self.kept is not None:
            kept = bits.unpack(self.kept, scores.numel(), start)
            scores = scores.masked_fill(~kept, -math.inf)
        first, last = max(self.protected.start, start), min(self.protected.stop, stop)
        if first < last:
            scores = scores.clone()
            scores[first - start : last - start] = math.inf
        return scores


@dataclass(frozen=True)
class Cut:
    """Prune each score below `value`, and the first `ties` of those equal to it; compared as `dtype`."""

    value: float
    ties: int
    dtype: torch.dtype


def threshold(streams: Sequence[Stream], count: int) -> Cut:
    """Find the cut below which lie exactly the `count` lowest scores of all streams.

    Where a score stands for a group of weights, `count` is in weights and met to the nearest whole group.

    Raises:
        InputError: so many are protected (a score of +inf, a padding row) that `count` cannot be met.
    """
    dtype = torch.float64 if any(_wide(stream) for stream in streams) else torch.float32
    if count <= 0:
        return Cut(-math.inf, 0, dtype)
    if any(stream.group > 1 for stream in streams):
        cut = _grouped(streams, count, dtype)
    else:
        cut = _exact(streams, count, dtype)
    if cut.value == math.inf:
        names = ", ".join(stream.name for stream in streams[:3]) + (", ..." if len(streams) > 3 else "")
        raise InputError(
            f"{count:,} weights of {names} were to be pruned, but too many of them are protected "
            "(a score of +inf, a padding row, a pattern): ask for less, or protect less"
        )
    return cut


def keep(stream: Stream, cut: Cut) -> tuple[Tensor, int, Cut]:
    """Apply a cut to one stream.

    Returns:
        The bits of the kept scores, the number of pruned ones, and the cut for the next stream (fewer ties).
    """
    packed = torch.empty(-(-stream.values.numel() // 8), dtype=torch.uint8, device=stream.values.device)
    pruned, ties, start = 0, cut.ties, 0
    for piece in stream.pieces(cut.dtype):
        if ties:
            kept = _compare(operator.gt, piece, cut.value)
            equal = _positions(_compare(operator.eq, piece, cut.value))
            kept[equal[ties:]] = True
            ties -= min(ties, len(equal))
        else:
            kept = _compare(operator.ge, piece, cut.value)
        pruned += piece.numel() - _count(kept)
        part = bits.pack(kept)
        packed[start : start + len(part)] = part
        start += len(part)
    return packed, pruned, replace(cut, ties=ties)


def zeros_first(scores: Tensor, weights: Tensor) -> Tensor:
    """Rank weights that are zero already below the others, so that they count towards the budget, unless protected."""
    return scores.masked_fill((weights == 0) & (scores < math.inf), torch.finfo(scores.dtype).min)


def require_finite(name: str, weight: Tensor) -> None:
    """See that a tensor holds neither NaN nor inf.

    Raises:
        InputError: it does; the message counts them.
    """
    for _, piece in bits.chunks(weight.detach()):
        if not bool(torch.isfinite(piece.sum())):  # a sum may also overflow: count before judging
            nan, inf = (int(test(weight.detach()).sum()) for test in (torch.isnan, torch.isinf))
            if nan or inf:
                raise InputError(
                    f"{name} holds {nan:,} NaN and {inf:,} inf among {weight.numel():,} weights, so its scores mean "
                    "nothing: go back to a sound checkpoint, or repair it with torch.nan_to_num_"
                )
            return


def _exact(streams: Sequence[Stream], count: int, dtype: torch.dtype) -> Cut:
    low, high = _bracket(streams, count, dtype)
    for _ in range(9):  # one pass nearly always, three at the very most
        below, inside = _census(streams, low, high, dtype)
        if below < count <= below + inside.size:
            rank = count - below - 1
            inside.partition(rank)
            value = inside[rank]
            return Cut(float(value), rank + 1 - int(np.count_nonzero(inside < value)), dtype)
        # the cut is at an end of the bracket (many ties there), or else the sample has misled us: look beyond
        end, low, high = (low, -math.inf, low) if count <= below else (high, high, math.inf)
        less, equal = _rank(streams, end, dtype)
        if less < count <= less + equal:
            return Cut(end, count - less, dtype)
    raise InputError(f"the score of {streams[0].name} changes from call to call: an elementwise one must not")


def _bracket(streams: Sequence[Stream], count: int, dtype: torch.dtype) -> tuple[float, float]:
    """Two scores between which the k-th lowest lies, by a random sample (one index in each of 65,536 strata)."""
    ends = np.cumsum([stream.values.numel() for stream in streams])
    total = int(ends[-1])
    if total <= 4 * _SAMPLE:
        return -math.inf, math.inf
    strata = np.arange(_SAMPLE) + np.random.default_rng(0).random(_SAMPLE)
    indices = (strata * (total / _SAMPLE)).astype(np.int64).clip(max=total - 1)
    parts = np.split(indices, np.searchsorted(indices, ends[:-1]))
    starts = [0, *ends[:-1]]
    taken = [s.sample(part - start, dtype) for s, part, start in zip(streams, parts, starts, strict=True)]
    sample = torch.cat(taken).sort().values
    chance = count / total
    middle, margin = chance * _SAMPLE, _SIGMAS * math.sqrt(_SAMPLE * chance * (1 - chance)) + _SIGMAS
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    low = float(sample[first]) if first >= 0 else -math.inf
    high = float(sample[last]) if last < _SAMPLE else math.inf
    return low, high


def _census(streams: Sequence[Stream], low: float, high: float, dtype: torch.dtype) -> tuple[int, _Floats]:
    """Count the scores at or below `low`, and gather those strictly between `low` and `high`."""
    below = filled = 0
    # one array that grows: thousands of small ones would leave holes in the heap, several times their own size
    inside = np.empty(_SAMPLE, _NUMPY[dtype])
    for stream in streams:
        for piece in stream.pieces(dtype, check=True):
            above, found = _between(piece, low, high)
            below += piece.numel() - above
            if filled + found.size > inside.size:
                inside = np.concatenate((inside, np.empty(inside.size + found.size, inside.dtype)))
            inside[filled : filled + found.size] = found
            filled += found.size
    return below, inside[:filled]


def _rank(streams: Sequence[Stream], value: float, dtype: torch.dtype) -> tuple[int, int]:
    """Count the scores below `value`, and those equal to it."""
    less = equal = 0
    for stream in streams:
        for piece in stream.pieces(dtype):
            less += _count(_compare(operator.lt, piece, value))
            equal += _count(_compare(operator.eq, piece, value))
    return less, equal


def _grouped(streams: Sequence[Stream], count: int, dtype: torch.dtype) -> Cut:
    """Take whole groups, the lowest first, as long as that brings the weights pruned nearer to `count`."""
    scores = torch.cat([piece.cpu() for stream in streams for piece in stream.pieces(dtype)])
    groups = torch.cat([torch.full((s.values.numel(),), s.group, dtype=torch.int64) for s in streams])
    scores, order = scores.sort(stable=True)
    weights = groups[order].cumsum(0)
    taken = int(torch.searchsorted(weights, count))  # groups that together stay below `count`
    before = int(weights[taken - 1]) if taken else 0
    if taken < len(weights) and int(weights[taken]) - count <= count - before:
        taken += 1
    if not taken:
        return Cut(-math.inf, 0, dtype)
    value = scores[taken - 1]
    return Cut(float(value), taken - int((scores[:taken] < value).sum()), dtype)


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def _wide(stream: Stream) -> bool:
    narrow = torch.float16, torch.bfloat16, torch.float32, torch.complex64
    return stream.values.dtype not in narrow or (stream.score not in (None, magnitude))


# numpy compares, counts and finds several times faster than torch on a CPU; elsewhere torch does the same


def _compare(compare: Callable[[Any, float], Any], piece: Tensor, value: float) -> Tensor:
    compared: Tensor = torch.from_numpy(compare(piece.numpy(), value)) if bits.on_cpu(piece) else compare(piece, value)
    return compared


def _between(piece: Tensor, low: float, high: float) -> tuple[int, _Floats]:
    """How many are above `low`, and those of them below `high`."""
    if bits.on_cpu(piece):
        scores = piece.numpy()
        above = np.greater(scores, low)
        count = int(np.count_nonzero(above))
        np.logical_and(above, np.less(scores, high), out=above)
        return count, scores[np.flatnonzero(above)]
    found = piece[piece > low]
    return found.numel(), found[found < high].cpu().numpy()


def _highest(scores: Tensor) -> float:
    """The highest score; NaN if there is one."""
    narrow = scores.dtype == torch.bfloat16 or not bits.on_cpu(scores)
    return float(scores.max() if narrow else scores.numpy().max())


def _count(flags: Tensor) -> int:
    return int(np.count_nonzero(flags.numpy())) if bits.on_cpu(flags) else int(torch.count_nonzero(flags))


def _positions(flags: Tensor) -> Tensor:
    if bits.on_cpu(flags):
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero().view(-1)
