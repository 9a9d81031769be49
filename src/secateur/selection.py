"""The exact k lowest scores of many tensors, in streaming passes: no concatenation, no sort of all weights.

A sample of the scores gives a bracket around the k-th lowest. One pass counts the scores below the bracket and makes a
histogram of those inside it (about 1 %), over the bits of the scores. A bin usually holds a single value; if it holds
more, another pass divides it. Ties at the threshold are broken by (tensor, row-major index). The result is that of a
stable sort of all scores, whatever the chunks, the sample or the threads. Where several processes each read a part of
the streams, or a shard of each, the caller passes how they add up their counts (`total`): about 80 KB a selection,
whatever its size. By default this process works alone, also within a process group.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import InputError, NotFiniteError, listed
from secateur.scores import Score, evaluate, magnitude
from secateur.sharding import Indices, Place
from secateur.support import bits
from secateur.support.process_groups import ALONE, Total

_SAMPLE = 1 << 14
_BINS, _FEW_BINS = 1 << 20, 1 << 16  # of a histogram: for few weights the smaller one is quicker
_TIE_BITS = 10  # of an index, looked at in one round to find where the ties that go end
_TEXT = 4096  # bytes of the words of an error
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
        protected: row-major indices of `values` that are never pruned; they rank above all others.
        group: weights that stand behind each score (more than 1 where a pattern prunes them together).
        here: whether this process counts it; False only where processes work together, and another one does.
        legal: scores that are not +inf, where that is known without looking.
        place: where `values` lie in the whole tensor, if they are a shard of it.
    """

    name: str
    values: Tensor | Source
    score: Score | None = None
    kept: Tensor | None = None
    protected: range = range(0)
    group: int = 1
    here: bool = True
    legal: int | None = None
    place: Place | None = None

    @property
    def size(self) -> int:
        """Scores of the whole tensor."""
        return self.values.numel() if self.place is None else self.place.numel

    def pieces(
        self, dtype: torch.dtype, *, check: bool = False, within: range | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index of the first, scores)` in row-major order, flat, as `dtype`.

        -inf where pruned, +inf where protected. A piece lasts until the next one: they may share their memory.

        Args:
            dtype: of the scores.
            check: look for NaN and inf in magnitudes.
            within: of the whole tensor; pieces that hold none of these indices are left out.
        """
        room = torch.empty(0, dtype=dtype, device=self.values.device)
        for start, raw in _chunks(self.values):
            if within is not None:
                first, last = self.ends(start, raw.numel())
                if last < within.start or first >= within.stop:
                    continue
            if self.score is magnitude and not raw.is_complex():
                room = room if room.numel() >= raw.numel() else room.new_empty(raw.numel())
                scores = room[: raw.numel()]
                scores = torch.abs(raw, out=scores) if raw.dtype == dtype else scores.copy_(raw).abs_()
            else:
                scores = self._scored(raw)
            if check and self.score is magnitude and not math.isfinite(_highest(scores)):
                require_finite(self.name, self.values)
            yield start, self._ranked(scores.to(dtype), start)

    def whole(self, indices: Indices) -> Indices:
        """The row-major indices in the whole tensor of some in `values`; both ascend."""
        return indices if self.place is None else self.place.to_whole(indices)

    def ends(self, start: int, count: int) -> tuple[int, int]:
        """The first and the last index in the whole tensor of a piece of `values`, which is not empty."""
        first, last = self.whole(np.array([start, start + count - 1])).tolist()
        return first, last

    def sample(self, indices: Indices, dtype: torch.dtype) -> Tensor:
        """Return the scores at some row-major indices of `values` (a protected one may show its own score)."""
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
            scores = bits.floor(scores, self.kept, start)
        first, last = max(self.protected.start, start), min(self.protected.stop, stop)
        if first < last:
            scores = scores.clone()
            scores[first - start : last - start] = math.inf
        return scores


@dataclass(frozen=True)
class Cut:
    """Prune each score below `value`, and of those equal to it the first ones; compared as `dtype`.

    Attributes:
        until: by the names of streams, the row-major index in the whole tensor below which those that are equal go;
            of a stream that is not named all go.
    """

    value: float
    dtype: torch.dtype
    until: Mapping[str, int] = field(default_factory=dict)


def threshold(streams: Sequence[Stream], count: int, *, total: Total = ALONE.total) -> Cut:
    """Find the cut below which lie exactly the `count` lowest scores of all streams.

    Where a score stands for a group of weights, `count` is in weights and met to the nearest whole group. `total` adds
    up the counts of the processes that each read some of the streams.

    Raises:
        InputError: so many are protected (a score of +inf, a padding row) that `count` cannot be met.
    """
    dtype = torch.float64 if any(_wide(stream) for stream in streams) else torch.float32
    no_ties = dict.fromkeys((stream.name for stream in streams), 0)
    if count <= 0:
        return Cut(-math.inf, dtype, no_ties)
    if count == sum(stream.legal or 0 for stream in streams):  # all that may go goes: there is nothing to rank
        return Cut(math.inf, dtype, no_ties)
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


def keep(stream: Stream, cut: Cut) -> tuple[Tensor, int]:
    """Apply a cut to one stream: the bits of the kept scores, and the number of pruned ones."""
    packed = torch.empty(-(-stream.values.numel() // 8), dtype=torch.uint8, device=stream.values.device)
    pruned = 0
    for start, piece in stream.pieces(cut.dtype):
        kept = above(piece, stream, cut, start)
        pruned += piece.numel() - _count(kept)
        part = bits.pack(kept)
        packed[start // 8 : start // 8 + len(part)] = part
    return packed, pruned


def above(scores: Tensor, stream: Stream, cut: Cut, start: int) -> Tensor:
    """Tell which scores of a piece of a stream, which begins at index `start`, stay above a cut."""
    until = cut.until.get(stream.name, stream.size)
    if not scores.numel() or until == 0:
        return _compare(operator.ge, scores, cut.value)
    first, last = stream.ends(start, scores.numel())
    if until <= first:
        return _compare(operator.ge, scores, cut.value)
    kept = _compare(operator.gt, scores, cut.value)
    if until <= last:
        equal = _positions(_compare(operator.eq, scores, cut.value)).cpu().numpy()
        kept[torch.from_numpy(equal[stream.whole(equal + start) >= until]).to(kept.device)] = True
    return kept


def tally(stream: Stream, cut: Cut) -> tuple[int, int]:
    """Count the scores of a stream that a cut prunes, and those that are zero."""
    pruned = zero = 0
    for start, piece in stream.pieces(cut.dtype):
        pruned += piece.numel() - _count(above(piece, stream, cut, start))
        zero += _count(_compare(operator.eq, piece, 0.0))
    return pruned, zero


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
    """Apply a cut to streams: the bits of what each keeps."""
    return {stream.name: keep(stream, cut) for stream in streams}


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
        before, (low, high), inside = _census(streams, low, high, count, dtype, total)
        if count <= before:  # the sample has misled us: look beyond the bracket
            low, high = bottom, low - 1
        elif count > before + inside:
            low, high = high + 1, top
        elif low == high:
            value, ties = _float(low, dtype), count - before
            return Cut(value, dtype, _until(streams, value, ties, dtype, total) if ties < inside else {})
    raise InputError(f"the score of {streams[0].name} changes from call to call: an elementwise one must not")


def _bracket(streams: Sequence[Stream], count: int, dtype: torch.dtype, total: Total) -> tuple[float, float]:
    """Two scores between which the k-th lowest lies, by a random sample (one index in each of 16,384 strata)."""
    ends = np.cumsum([stream.size for stream in streams])
    size = int(ends[-1])
    if size <= 4 * _SAMPLE:
        return -math.inf, math.inf
    strata = np.arange(_SAMPLE) + np.random.default_rng(0).random(_SAMPLE)
    indices = (strata * (size / _SAMPLE)).astype(np.int64).clip(max=size - 1)
    cuts = np.searchsorted(indices, [0, *ends])

    def fill(sample: _Floats) -> None:
        for stream, first, last, start in zip(streams, cuts, cuts[1:], [0, *ends], strict=False):
            if stream.here and first < last:
                wanted = indices[first:last] - start
                here, local = (slice(None), wanted) if stream.place is None else stream.place.locate(wanted)
                sample[first:last][here] = stream.sample(local, dtype).numpy()

    # single precision suffices for a bracket that is a step wider
    sample = np.sort(_summed(total, _SAMPLE, np.float32, fill))
    chance = count / size
    middle, margin = chance * _SAMPLE, _SIGMAS * math.sqrt(_SAMPLE * chance * (1 - chance)) + _SIGMAS
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    low = float(np.nextafter(sample[first], np.float32(-math.inf))) if first >= 0 else -math.inf
    high = float(np.nextafter(sample[last], np.float32(math.inf))) if last < _SAMPLE else math.inf
    return low, high


def _summed(
    total: Total, size: int, dtype: npt.DTypeLike, fill: Callable[[npt.NDArray[Any]], None]
) -> npt.NDArray[Any]:
    """Add up what `fill` writes into zeros, over the processes; if it raises in one of them, each one raises.

    Raises:
        InputError, NotFiniteError: it raised in another process.
    """
    array = np.zeros(size + 2, dtype)
    trouble: Exception | None = None
    try:
        fill(array[:-2])
    except Exception as error:  # told to the others first, which else would wait for this process
        array[:], trouble = 0, error
        array[-2:] = 1, isinstance(error, NotFiniteError)
    array = total(array)
    failed, not_finite = array[-2:].tolist()
    if not failed:
        return array[:-2]
    words = _said(trouble, total) if failed == 1 else "see their errors"
    kind = NotFiniteError if failed == not_finite else InputError  # a Pruner goes on after the former: all must
    if trouble is not None and isinstance(trouble, NotFiniteError) <= (kind is NotFiniteError):
        raise trouble
    raise kind(f"another of the processes that prune together has stopped ({words}); nothing is changed") from trouble


def _said(trouble: Exception | None, total: Total) -> str:
    """What the error of one process says, in all of them."""
    said = f"{type(trouble).__name__}: {trouble}".encode()[:_TEXT] if trouble is not None else b""
    box = np.zeros(_TEXT, np.uint8)
    box[: len(said)] = np.frombuffer(said, np.uint8)
    return bytes(total(box)).rstrip(b"\0").decode(errors="replace")


def agreed(call: Callable[[], _Result], total: Total) -> _Result:
    """What a function returns that each process calls; if it raises in one of them, each one raises.

    Raises:
        InputError: it raised in another process.
    """
    found: list[_Result] = []

    def fill(_: object) -> None:
        found.append(call())

    _summed(total, 0, np.int64, fill)
    return found[0]


def _census(
    streams: Sequence[Stream], low: int, high: int, count: int, dtype: torch.dtype, total: Total
) -> tuple[int, tuple[int, int], int]:
    """Find where, among the keys from `low` to `high`, the count falls.

    Bins of equally many keys are filled here, and their sums are added up over the processes: those of blocks of bins
    first, then of the bins of one block.

    Returns:
        The scores below some keys, these keys (a bin, or all from `low` to `high` if the count lies outside them), and
        the scores in there.
    """
    size = _BINS if sum(stream.size for stream in streams) > _BINS else _FEW_BINS
    blocks = 1 << (size.bit_length() // 2)
    shift = max(0, (high - low).bit_length() - size.bit_length() + 1)
    least, most = _float(low, dtype), _float(high, dtype)
    bins = np.zeros((blocks, size // blocks), np.int64)

    def fill(sums: npt.NDArray[np.int64]) -> None:
        for stream in streams:
            for _, piece in stream.pieces(dtype, check=True) if stream.here else ():
                below, found = _between(piece, least, most)
                sums[-1] += below
                np.add.at(bins.reshape(-1), _keys(found) - np.uint64(low % 2**64) >> np.uint64(shift), 1)
        sums[:-1] = bins.sum(1)

    *sums, below = _summed(total, blocks + 1, np.int64, fill).tolist()
    ends = below + np.cumsum(sums)
    if not below < count <= ends[-1]:
        return below, (low, high), int(ends[-1]) - below
    block = int(np.searchsorted(ends, count))
    inside = total(bins[block].copy())
    ends = int(ends[block]) - sums[block] + inside.cumsum()
    found = int(np.searchsorted(ends, count))
    first = low + (block * bins.shape[1] + found << shift)
    return int(ends[found] - inside[found]), (first, min(high, first + (1 << shift) - 1)), int(inside[found])


def _until(streams: Sequence[Stream], value: float, ties: int, dtype: torch.dtype, total: Total) -> dict[str, int]:
    """Say for each stream up to which index its scores equal to `value` go, where of all of them `ties` go.

    Streams in their order: of the first ones all go, and are left out; of one some, found digit by digit of the index.
    """
    spans = [range(stream.size) for stream in streams]
    counts = [_ties(stream, value, span, dtype) for stream, span in zip(streams, spans, strict=True)]
    equal = total(np.array([int(each.sum()) for each in counts]))
    ends = equal.cumsum()
    split = int(np.searchsorted(ends, ties))
    found = dict.fromkeys((stream.name for stream in streams[split + 1 :]), 0)
    left = ties - int(ends[split] - equal[split])
    if left == equal[split]:
        return found
    span, digit = spans[split], total(counts[split])
    while True:
        ends = digit.cumsum()
        at = int(np.searchsorted(ends, left))
        left -= int(ends[at] - digit[at])
        step = 1 << _shift(span)
        span = range(span.start + at * step, min(span.stop, span.start + (at + 1) * step))
        if left == digit[at] or step == 1:
            return {**found, streams[split].name: span.stop}
        digit = total(_ties(streams[split], value, span, dtype))


def _ties(stream: Stream, value: float, span: range, dtype: torch.dtype) -> Indices:
    """Count the scores equal to `value` in equal parts of a span of the whole tensor, those of this process."""
    counts = np.zeros(1 << _TIE_BITS, np.int64)
    for start, piece in stream.pieces(dtype, within=span) if stream.here else ():
        found = stream.whole(_positions(_compare(operator.eq, piece, value)).cpu().numpy() + start)
        inside = found[np.searchsorted(found, span.start) : np.searchsorted(found, span.stop)] - span.start
        counts += np.bincount(inside >> _shift(span), minlength=len(counts))
    return counts


def _shift(span: range) -> int:
    return max(0, (len(span) - 1).bit_length() - _TIE_BITS)


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
    parts = [piece.cpu() if s.here else torch.zeros_like(piece) for s in streams for _, piece in s.pieces(dtype)]
    scores = torch.from_numpy(total(torch.cat(parts).numpy()))
    groups = torch.cat([torch.full((s.values.numel(),), s.group, dtype=torch.int64) for s in streams])
    scores, order = scores.sort(stable=True)
    weights = groups[order].cumsum(0)
    taken = int(torch.searchsorted(weights, count))  # groups that together stay below `count`
    before = int(weights[taken - 1]) if taken else 0
    if taken < len(weights) and int(weights[taken]) - count <= count - before:
        taken += 1
    value, end = (float(scores[taken - 1]), int(order[taken - 1]) + 1) if taken else (-math.inf, 0)
    starts = np.cumsum([0, *(stream.size for stream in streams[:-1])]).tolist()  # equals go in their order, up to `end`
    return Cut(value, dtype, {s.name: max(end - at, 0) for s, at in zip(streams, starts, strict=True)})


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
