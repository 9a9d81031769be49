"""The exact k lowest scores of many tensors, in streaming passes: no concatenation, no sort of all weights.

A sample of the scores gives a bracket around the k-th lowest. One pass counts the scores below the bracket and makes a
histogram of those inside it (about 1 %), over the bits of the scores. A bin usually holds a single value; if it holds
more, another pass divides it. Ties at the threshold are broken by (tensor, row-major index). The result is that of a
stable sort of all scores, whatever the chunks, the sample or the threads. Where several processes each read a part of
the streams, the caller passes how they add up their counts (`total`); by default this process works alone, also within
a process group.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import InputError, NotFiniteError, listed
from secateur.scores import Score, evaluate, magnitude
from secateur.support import bits
from secateur.support.process_groups import ALONE, Total

_SAMPLE = 1 << 16
_BINS, _FEW_BINS = 1 << 20, 1 << 16  # of a histogram: for few weights the smaller one is quicker
_SIGMAS = 4.0  # half-width of the bracket in standard deviations of the sample's rank: it seldom misses

_Floats = npt.NDArray[Any]
_Result = TypeVar("_Result")


class Source(Protocol):
    """A tensor that is not in memory and is read in pieces."""

    dtype: torch.dtype
    device: torch.device

    def numel(self) -> int:
        """Numbers in the tensor."""

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index of the first number, flat piece)` in row-major order; a piece lasts until the next."""

    def at(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Return the numbers at some row-major indices (ascending)."""


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
        here: whether this process reads it; False only where processes work together, and another one does.
        legal: scores that are not +inf, where that is known without looking.
    """

    name: str
    values: Tensor | Source
    score: Score | None = None
    kept: Tensor | None = None
    protected: range = range(0)
    group: int = 1
    here: bool = True
    legal: int | None = None

    def pieces(self, dtype: torch.dtype, *, check: bool = False) -> Iterator[Tensor]:
        """Yield the scores in row-major order, flat, as `dtype`; -inf where pruned, +inf where protected.

        A piece lasts until the next one: they may share their memory. `check` looks for NaN and inf in magnitudes.
        """
        room = torch.empty(0, dtype=dtype, device=self.values.device)
        for start, raw in _chunks(self.values):
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
        values = self.values
        taken = values.detach().reshape(-1)[where] if isinstance(values, Tensor) else values.at(indices)
        scores = self._scored(taken)
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


def threshold(streams: Sequence[Stream], count: int, *, total: Total = ALONE.total) -> Cut:
    """Find the cut below which lie exactly the `count` lowest scores of all streams.

    Where a score stands for a group of weights, `count` is in weights and met to the nearest whole group. `total` adds
    up the counts of the processes that each read some of the streams.

    Raises:
        InputError: so many are protected (a score of +inf, a padding row) that `count` cannot be met.
    """
    dtype = torch.float64 if any(_wide(stream) for stream in streams) else torch.float32
    if count <= 0:
        return Cut(-math.inf, 0, dtype)
    if count == sum(stream.legal or 0 for stream in streams):
        return Cut(math.inf, 0, dtype)  # all that may go goes: there is nothing to rank
    if any(stream.group > 1 for stream in streams):
        cut = _grouped(streams, count, dtype, total)
    else:
        cut = _exact(streams, count, dtype, total)
    if cut.value == math.inf:
        raise InputError(
            f"{count:,} weights of {listed([stream.name for stream in streams])} were to be pruned, but too many of "
            "them are protected (a score of +inf, a padding row, a pattern): ask for less, or protect less"
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
        kept, ties = above(piece, cut.value, ties)
        pruned += piece.numel() - _count(kept)
        part = bits.pack(kept)
        packed[start : start + len(part)] = part
        start += len(part)
    return packed, pruned, replace(cut, ties=ties)


def above(scores: Tensor, value: float, ties: int) -> tuple[Tensor, int]:
    """Tell which scores stay above a cut, and how many of its ties are left for the next piece."""
    if not ties:
        return _compare(operator.ge, scores, value), 0
    kept = _compare(operator.gt, scores, value)
    equal = _positions(_compare(operator.eq, scores, value))
    kept[equal[ties:]] = True
    return kept, ties - min(ties, len(equal))


def tally(stream: Stream, cut: Cut) -> tuple[int, int, int]:
    """Count the scores of a stream below a cut, those equal to it, and those that are zero."""
    below = equal = zero = 0
    for piece in stream.pieces(cut.dtype):
        below += _count(_compare(operator.lt, piece, cut.value))
        equal += _count(_compare(operator.eq, piece, cut.value))
        zero += _count(_compare(operator.eq, piece, 0.0))
    return below, equal, zero


Applied = dict[str, tuple[_Result, int]]
"""For each stream what came of applying a cut to it, and the scores that it loses."""


def together(
    streams: Sequence[Stream],
    count: int,
    most: Mapping[str, int],
    apply: Callable[[Sequence[Stream], Cut], Applied[_Result]],
    total: Total = ALONE.total,
) -> dict[str, _Result]:
    """Rank all streams together; where one would lose more than it may, it loses that, and the others the rest.

    Args:
        streams: in the order in which ties go.
        count: weights to prune in all.
        most: weights that each stream may lose.
        apply: how to apply a cut to some streams.
        total: as for `threshold`.
    """
    done: dict[str, _Result] = {}
    while rest := [stream for stream in streams if stream.name not in done]:
        found = apply(rest, threshold(rest, count, total=total))
        full = [stream for stream in rest if found[stream.name][1] * stream.group > most[stream.name]]
        if not full:
            return {**done, **{name: result for name, (result, _) in found.items()}}
        for stream in full:
            ((done[stream.name], lost),) = apply([stream], threshold([stream], most[stream.name], total=total)).values()
            count -= lost * stream.group
    return done


def keep_all(streams: Sequence[Stream], cut: Cut) -> Applied[Tensor]:
    """Apply a cut to streams in their order: the bits of what each keeps."""
    found = {}
    for stream in streams:
        packed, lost, cut = keep(stream, cut)
        found[stream.name] = packed, lost
    return found


def zeros_first(scores: Tensor, weights: Tensor) -> Tensor:
    """Rank weights that are zero already below the others, so that they count towards the budget, unless protected."""
    return scores.masked_fill((weights == 0) & (scores < math.inf), torch.finfo(scores.dtype).min)


def require_finite(name: str, weight: Tensor | Source) -> None:
    """See that a tensor holds neither NaN nor inf.

    Raises:
        NotFiniteError: it does; the message counts them.
    """
    for _, piece in _chunks(weight):
        if not bool(torch.isfinite(piece.sum())):  # a sum may also overflow: count before judging
            tests = torch.isnan, torch.isinf
            nan, inf = (sum(int(test(part).sum()) for _, part in _chunks(weight)) for test in tests)
            if nan or inf:
                raise NotFiniteError(
                    f"{name} holds {nan:,} NaN and {inf:,} inf among {weight.numel():,} weights, so its scores mean "
                    "nothing: go back to a sound checkpoint, or repair it with torch.nan_to_num_"
                )
            return


def _exact(streams: Sequence[Stream], count: int, dtype: torch.dtype, total: Total) -> Cut:
    bottom, top = _key(-math.inf, dtype), _key(math.inf, dtype)
    low, high = (_key(end, dtype) for end in _bracket(streams, count, dtype, total))
    for _ in range(9):  # one pass nearly always, six at the very most
        below, bins, shift = _census(streams, low, high, dtype, total)
        ends = below + bins.cumsum()
        if count <= below:  # the sample has misled us: look beyond the bracket
            low, high = bottom, low - 1
        elif count > ends[-1]:
            low, high = high + 1, top
        else:
            found = int(np.searchsorted(ends, count))
            low, high = low + (found << shift), min(high, low + ((found + 1) << shift) - 1)
            if low == high:
                return Cut(_float(low, dtype), count - int(ends[found] - bins[found]), dtype)
    raise InputError(f"the score of {streams[0].name} changes from call to call: an elementwise one must not")


def _bracket(streams: Sequence[Stream], count: int, dtype: torch.dtype, total: Total) -> tuple[float, float]:
    """Two scores between which the k-th lowest lies, by a random sample (one index in each of 65,536 strata)."""
    ends = np.cumsum([stream.values.numel() for stream in streams])
    size = int(ends[-1])
    if size <= 4 * _SAMPLE:
        return -math.inf, math.inf
    strata = np.arange(_SAMPLE) + np.random.default_rng(0).random(_SAMPLE)
    indices = (strata * (size / _SAMPLE)).astype(np.int64).clip(max=size - 1)
    parts = np.split(indices, np.searchsorted(indices, ends[:-1]))
    starts = [0, *ends[:-1]]
    sample = np.zeros(_SAMPLE, _NUMPY[dtype])
    for stream, part, start in zip(streams, parts, starts, strict=True):
        if stream.here and part.size:
            first = int(np.searchsorted(indices, part[0]))
            sample[first : first + part.size] = stream.sample(part - start, dtype).numpy()
    sample = np.sort(total(sample))
    chance = count / size
    middle, margin = chance * _SAMPLE, _SIGMAS * math.sqrt(_SAMPLE * chance * (1 - chance)) + _SIGMAS
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    low = float(sample[first]) if first >= 0 else -math.inf
    high = float(sample[last]) if last < _SAMPLE else math.inf
    return low, high


def _census(
    streams: Sequence[Stream], low: int, high: int, dtype: torch.dtype, total: Total
) -> tuple[int, npt.NDArray[np.int64], int]:
    """Count the scores whose keys are below `low`, and those up to `high` in bins of 2^shift keys each."""
    size = _BINS if sum(stream.values.numel() for stream in streams) > _BINS else _FEW_BINS
    shift = max(0, (high - low).bit_length() - size.bit_length() + 1)
    counts = np.zeros(size + 1, np.int64)
    least, most = _float(low, dtype), _float(high, dtype)
    for stream in streams:
        for piece in stream.pieces(dtype, check=True) if stream.here else ():
            below, found = _between(piece, least, most)
            counts[-1] += below
            np.add.at(counts, _keys(found) - np.uint64(low % 2**64) >> np.uint64(shift), 1)
    counts = total(counts)
    return int(counts[-1]), counts[:-1], shift


def _keys(scores: _Floats) -> npt.NDArray[np.uint64]:
    """Whole numbers (modulo 2^64) in the order of the scores; those of 0.0 and -0.0 are the same."""
    signed = (scores + 0.0).view(np.int32 if scores.itemsize == 4 else np.int64)
    highest = np.iinfo(signed.dtype).max
    return np.where(signed < 0, signed ^ highest, signed).astype(np.int64).view(np.uint64)


def _key(score: float, dtype: torch.dtype) -> int:
    return int(_keys(np.array([score], _NUMPY[dtype])).view(np.int64)[0])


def _float(key: int, dtype: torch.dtype) -> float:
    signed = np.array([key], np.int32 if dtype is torch.float32 else np.int64)
    return float(np.where(signed < 0, signed ^ np.iinfo(signed.dtype).max, signed).view(_NUMPY[dtype])[0])


def _grouped(streams: Sequence[Stream], count: int, dtype: torch.dtype, total: Total) -> Cut:
    """Take whole groups, the lowest first, as long as that brings the weights pruned nearer to `count`."""
    parts = [piece.cpu() if s.here else torch.zeros_like(piece) for s in streams for piece in s.pieces(dtype)]
    scores = torch.from_numpy(total(torch.cat(parts).numpy()))
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


def _chunks(values: Tensor | Source) -> Iterator[tuple[int, Tensor]]:
    return bits.chunks(values.detach()) if isinstance(values, Tensor) else values.chunks()


def _wide(stream: Stream) -> bool:
    narrow = torch.float16, torch.bfloat16, torch.float32, torch.complex64
    return stream.values.dtype not in narrow or (stream.score not in (None, magnitude))


# numpy compares, counts and finds several times faster than torch on a CPU; elsewhere torch does the same


def _compare(compare: Callable[[Any, float], Any], piece: Tensor, value: float) -> Tensor:
    compared: Tensor = torch.from_numpy(compare(piece.numpy(), value)) if bits.on_cpu(piece) else compare(piece, value)
    return compared


def _between(piece: Tensor, low: float, high: float) -> tuple[int, _Floats]:
    """How many are below `low`, and those from there up to `high`."""
    if bits.on_cpu(piece):
        scores = piece.numpy()
        inside = np.greater_equal(scores, low)
        below = scores.size - int(np.count_nonzero(inside))
        np.logical_and(inside, np.less_equal(scores, high), out=inside)
        return below, scores[np.flatnonzero(inside)]
    found = piece[piece >= low]
    return piece.numel() - found.numel(), found[found <= high].cpu().numpy()


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
