"""The exact k lowest scores of many tensors, in streaming passes: no concatenation, no sort of all weights.

A sample of the scores gives a bracket around the k-th lowest. One pass counts the scores below the bracket and makes a
histogram of those inside it (about 1 %), over the bits of the scores. A bin usually holds a single value; if it holds
more, another pass divides it. Ties at the threshold are broken by (tensor, row-major index). The result is that of a
stable sort of all scores, whatever the chunks, the sample or the threads. Where several processes each read a part of
the streams, or a shard of each, the caller names them (`processes`). They add up counts: about 40 KB a selection,
whatever its size, or 2 KB each where many are made at once (`run`). By default this process works alone, also within a
process group.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import InputError, listed
from secateur.streams import Stream
from secateur.support import bits
from secateur.support.bits import Indices
from secateur.support.process_groups import ALONE, Processes, stop

_SAMPLE = 1 << 14
_CELLS, _SAMPLE_CELLS = 1 << 20, 1 << 18  # of equally many keys, in which scores are counted
_FEW = 1 << 20  # keys that are held one by one, and not counted by cells
WIDE, NARROW = 10, 4
"""Bits of a number that are found in one round, by counts of 2^10 or 2^4 parts: of one selection, of many at once."""
_SIGMAS = 4.0  # half-width of the bracket in standard deviations of the sample's rank: it seldom misses

_Floats = npt.NDArray[Any]
_Result = TypeVar("_Result")


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


def threshold(streams: Sequence[Stream], count: int, *, processes: Processes = ALONE) -> Cut:
    """Find the cut below which lie exactly the `count` lowest scores of all streams.

    Where a score stands for a group of weights, `count` is in weights and met to the nearest whole group.
    `processes` are those that each read some of the streams, or a shard of each.

    Raises:
        InputError: so many are protected (a score of +inf, a padding row) that `count` cannot be met.
        Exception: what reading raises; if it raises in another process, an error of the same kind that names it.
    """
    return run([_threshold(streams, count, WIDE)], processes)[0]


@dataclass(frozen=True)
class Wanted:
    """Numbers that a selection wants to have added up over the processes.

    Attributes:
        size: how many.
        fill: writes those of this process into zeros.
    """

    size: int
    fill: Callable[[Indices], object]


Steps = Generator[Wanted, Indices, _Result]
"""A selection that stops wherever it wants numbers added up, and goes on with the sums."""


def run(selections: Sequence[Steps[_Result]], processes: Processes) -> list[_Result]:
    """Make selections side by side: what all of them want added up is added up at once.

    Args:
        selections: each process has them in the same order.
        processes: as for `threshold`.

    Raises:
        Exception: what reading raises; if it raises in another process, an error of the same kind that names it.
    """
    found: dict[int, _Result] = {}
    sums: dict[int, Any] = dict.fromkeys(range(len(selections)))
    while sums:
        wanted: dict[int, Wanted] = {}
        for at, given in sums.items():
            try:
                wanted[at] = selections[at].send(given)
            except StopIteration as end:
                found[at] = end.value
        sums = dict(zip(wanted, _added([*wanted.values()], processes), strict=True))
    return [found[at] for at in range(len(selections))]


def _added(wanted: Sequence[Wanted], processes: Processes) -> list[Indices]:
    """Add up what is wanted over the processes, all of it at once; if a `fill` raises in one, each one raises."""
    if not wanted:
        return []
    ends = [*accumulate((one.size for one in wanted), initial=0)]
    spans = [slice(*ends_of) for ends_of in pairwise(ends)]
    sums = np.zeros(ends[-1] + 1, np.int64)
    trouble: Exception | None = None
    try:
        for one, span in zip(wanted, spans, strict=True):
            one.fill(sums[span])
    except Exception as error:  # told to the others first, which else would wait for this process
        sums[:], trouble = 0, error
        sums[-1] = 1
    if processes.total(sums)[-1]:
        stop(processes, trouble)
    return [sums[span] for span in spans]


def _threshold(streams: Sequence[Stream], count: int, digit: int) -> Steps[Cut]:
    dtype = torch.float64 if any(stream.wide for stream in streams) else torch.float32
    no_ties = dict.fromkeys((stream.name for stream in streams), 0)
    if count <= 0:
        return Cut(-math.inf, dtype, no_ties)
    if count == sum(stream.legal or 0 for stream in streams):  # all that may go goes: there is nothing to rank
        return Cut(math.inf, dtype, no_ties)
    sizes = {stream.group for stream in streams}
    if len(sizes) > 1:
        cut = yield from _grouped(streams, count, dtype)
    else:  # of groups of one size it is a number of groups, to the nearest
        nearest = (2 * count + (size := sizes.pop())) // (2 * size)
        cut = (yield from _exact(streams, nearest, dtype, digit)) if nearest else Cut(-math.inf, dtype, no_ties)
    if cut.value == math.inf:
        raise InputError(
            f"{count:,} weights of {listed([stream.name for stream in streams])} were to be pruned, but too many of "
            "them are protected (a score of +inf, a padding row, a pattern): ask for less, or protect less"
        )
    return cut


def keep(stream: Stream, cut: Cut) -> tuple[Tensor, int]:
    """Apply a cut to one stream: the bits of the kept scores, and the number of pruned ones."""
    packed = torch.empty(-(-stream.values.numel() // 8), dtype=torch.uint8, device=stream.values.device)
    bare = stream.bare(cut.value)
    for start, piece in bare.pieces(cut.dtype):
        part = bits.pack(above(piece, bare, cut, start))
        packed[start // 8 : start // 8 + len(part)] = part
    if stream.kept is not None and bare.kept is None:
        packed &= stream.kept
    return packed, stream.values.numel() - bits.count(packed)


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


def lowest(
    streams: Callable[[], Sequence[Stream]],
    count: int,
    most: Mapping[str, int],
    apply: Callable[[Stream, Cut], tuple[_Result, int, int]],
    digit: int,
) -> Steps[dict[str, tuple[_Result, int, int]]]:
    """The lowest of all streams go; where one would lose more than it may, it loses that, and the others the rest.

    Args:
        streams: makes them, in the order in which ties go.
        count: weights to prune in all.
        most: weights that each stream may lose.
        apply: applies a cut to a stream: what comes of it, the scores that it loses here, and another number.
        digit: `WIDE`, or `NARROW` if many selections are made at once.

    Returns:
        For each stream what came of it, and the sums of the two numbers over all processes.
    """
    rest: list[Stream] = []
    yield Wanted(0, lambda _: rest.extend(streams()))
    done: dict[str, tuple[_Result, int, int]] = {}
    while rest:
        found = yield from _applied(rest, (yield from _threshold(rest, count, digit)), apply)
        full = [stream for stream in rest if found[stream.name][1] * stream.group > most[stream.name]]
        if not full:
            return {**done, **found}
        for stream in full:
            cut = yield from _threshold([stream], most[stream.name], digit)
            done |= yield from _applied([stream], cut, apply)
            count -= done[stream.name][1] * stream.group
        rest = [stream for stream in rest if stream.name not in done]
    return done


def _applied(
    streams: Sequence[Stream], cut: Cut, apply: Callable[[Stream, Cut], tuple[_Result, int, int]]
) -> Steps[dict[str, tuple[_Result, int, int]]]:
    found: list[_Result] = []

    def fill(sums: Indices) -> None:
        for stream, row in zip(streams, sums.reshape(-1, 2), strict=True):
            result, *numbers = apply(stream, cut)
            found.append(result)
            row[:] = numbers if stream.here else 0

    sums = yield Wanted(2 * len(streams), fill)
    rows = zip(streams, found, sums.reshape(-1, 2).tolist(), strict=True)
    return {stream.name: (result, lost, other) for stream, result, (lost, other) in rows}


def _exact(streams: Sequence[Stream], count: int, dtype: torch.dtype, digit: int) -> Steps[Cut]:
    bottom, top = _key(-math.inf, dtype), _key(math.inf, dtype)
    low, high = yield from _bracket(streams, count, dtype, digit)
    low = max(low, bottom + 1)  # what is pruned already lies at the bottom, and may be much
    known: list[_Keys] = []
    for _ in range(9):  # one pass nearly always, six at the very most
        shift = 0
        while (last := (high - low >> shift) + 2) >= _CELLS:  # the first cell lies below, and the last one above
            shift += 1
        read = partial(_census, streams, low, high, shift, dtype, known)
        ((before, cell, inside),) = yield from _fall(read, last + 1, [count], digit)
        if cell == 0:  # the sample has misled us: look beyond the bracket
            low, high = bottom, low - 1
        elif cell >= last:
            low, high = high + 1, top
        else:
            low += cell - 1 << shift
            high = min(high, low + (1 << shift) - 1)
            if low == high:
                value, ties, until = _float(low, dtype), count - before, dict[str, int]()
                if ties < inside:
                    until = yield from _until(streams, value, ties, dtype, digit)
                return Cut(value, dtype, until)
    raise InputError(f"the score of {streams[0].name} changes from call to call: an elementwise one must not")


def _fall(
    read: Callable[[], tuple[Indices, Indices]], cells: int, counts: Sequence[int], digit: int
) -> Steps[list[tuple[int, int, int]]]:
    """Find the cells in which some counts fall: the number of each one is found digit by digit.

    Args:
        read: the cells in which this process found scores, ascending, and the scores in those up to each; 0 first.
        cells: how many there are.
        counts: of the scores of all processes, 1 or more.
        digit: bits.

    Returns:
        For each count the scores in the cells before its own, the cell, and the scores in it.
    """
    mine: list[Indices] = []
    found = [(0, 0, 0) for _ in counts]
    left = (cells - 1).bit_length()
    while left > 0:
        taken, left = min(digit, left), max(left - digit, 0)
        edges = [first + (np.arange((1 << taken) + 1) << left) for _, first, _ in found]

        def fill(sums: Indices, edges: Sequence[Indices] = edges) -> None:
            mine[:] = mine or read()
            at, ends = mine
            for row, each in zip(sums.reshape(len(counts), -1), edges, strict=True):
                row[:] = np.diff(ends[at.searchsorted(each)])

        sums = yield Wanted(len(counts) << taken, fill)
        for at, (row, count) in enumerate(zip(sums.reshape(len(counts), -1), counts, strict=True)):
            before, first, _ = found[at]
            ends = before + row.cumsum()
            part = min(int(ends.searchsorted(count)), len(row) - 1)
            found[at] = int(ends[part] - row[part]), first + (part << left), int(row[part])
    return found


def _bracket(streams: Sequence[Stream], count: int, dtype: torch.dtype, digit: int) -> Steps[tuple[int, int]]:
    """Two keys between which the k-th lowest score lies, by a random sample (one index in each of 16,384 strata)."""
    bottom, top = _key(-math.inf, torch.float32), _key(math.inf, torch.float32)
    ends = np.cumsum([stream.size for stream in streams])
    size = int(ends[-1])
    if size <= 4 * _SAMPLE:
        return _key(-math.inf, dtype), _key(math.inf, dtype)
    strata = np.arange(_SAMPLE) + np.random.default_rng(0).random(_SAMPLE)
    indices = (strata * (size / _SAMPLE)).astype(np.int64).clip(max=size - 1)
    cuts = np.searchsorted(indices, [0, *ends])
    shift = (top - bottom).bit_length() - _SAMPLE_CELLS.bit_length() + 1

    def read() -> tuple[Indices, Indices]:
        found = [np.zeros(0, np.float32)]
        for stream, first, last, start in zip(streams, cuts, cuts[1:], [0, *ends], strict=False):
            if stream.here and first < last:
                wanted = indices[first:last] - start
                local = wanted if stream.place is None else stream.place.locate(wanted)[1]
                found.append(stream.sample(local, torch.float32).numpy())
        keys = _keys(np.concatenate(found)) - np.uint64(bottom % 2**64) >> np.uint64(shift)
        return np.sort(keys.astype(np.int64)), np.arange(len(keys) + 1)

    chance = count / size
    middle, margin = chance * _SAMPLE, _SIGMAS * math.sqrt(_SAMPLE * chance * (1 - chance)) + _SIGMAS
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    ranks = [max(first, 0) + 1, min(last, _SAMPLE - 1) + 1]
    (_, lowest, _), (_, highest, _) = yield from _fall(read, _SAMPLE_CELLS, ranks, digit)
    # of the numbers of single precision, a step wider
    low = max(bottom + (lowest << shift) - 1, bottom) if first >= 0 else bottom
    high = min(bottom + (highest + 1 << shift), top) if last < _SAMPLE else top
    return _key(_float(low, torch.float32), dtype), _key(_float(high, torch.float32), dtype)


@dataclass(frozen=True)
class _Keys:
    """The keys of scores of this process from `low` to `high`, ascending, less `low`; how many scores lie around."""

    low: int
    high: int
    below: int
    keys: npt.NDArray[np.uint64]
    above: int

    def part(self, low: int, high: int) -> _Keys:
        """Those from another `low` to another `high`, between these."""
        first, last = np.searchsorted(self.keys, np.array([low - self.low, high - self.low + 1], np.uint64)).tolist()
        keys = self.keys[first:last] - np.uint64(low - self.low)
        return _Keys(low, high, self.below + first, keys, self.above + len(self.keys) - last)

    def cells(self, shift: int) -> tuple[Indices, Indices]:
        """As `_fall` reads them: a cell for what lies below, one for each 2^shift keys, and one for what lies above."""
        cells = (self.keys >> np.uint64(shift)).astype(np.int64) + 1
        ends = np.arange(len(cells) + 1) + self.below
        last = (self.high - self.low >> shift) + 2
        return np.concatenate([[0], cells, [last]]), np.concatenate([[0], ends, [ends[-1] + self.above]])


def _census(
    streams: Sequence[Stream], low: int, high: int, shift: int, dtype: torch.dtype, known: list[_Keys]
) -> tuple[Indices, Indices]:
    """Read all scores of this process, and say in which cells they lie: as `_Keys.cells`.

    Args:
        known: takes the keys if they are few, so that they are not read again.
    """
    if known and known[0].low <= low and high <= known[0].high:
        return known[0].part(low, high).cells(shift)
    known.clear()
    least, most = _float(low, dtype), _float(high, dtype)
    keys: list[npt.NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
    bins: Indices | None = None
    under = over = held = 0
    for stream in streams:
        bare = stream.bare(least)
        for start, piece in bare.pieces(dtype, check=True) if stream.here else ():
            hidden = stream.kept if bare.kept is None else None
            kept = None if hidden is None else bits.unpack(hidden, piece.numel(), start)
            below, found = _between(piece, least, most, kept)
            under += below
            over += piece.numel() - below - len(found)
            keys.append(_keys(found) - np.uint64(low % 2**64))
            held += len(found)
            if held > _FEW:
                bins = np.zeros((high - low >> shift) + 3, np.int64) if bins is None else bins
                _count_keys(keys, bins, shift)
                held = 0
    if bins is None:
        known.append(_Keys(low, high, under, np.sort(np.concatenate(keys)), over))
        return known[0].cells(shift)
    _count_keys(keys, bins, shift)
    bins[0], bins[-1] = under, over
    at = np.flatnonzero(bins)
    return at, np.concatenate([[0], bins[at].cumsum()])


def _count_keys(keys: list[npt.NDArray[np.uint64]], bins: Indices, shift: int) -> None:
    """Count keys by their cells, and let them go."""
    for some in keys:
        np.add.at(bins[1:], some >> np.uint64(shift), 1)
    keys[1:] = []


def _until(streams: Sequence[Stream], value: float, ties: int, dtype: torch.dtype, digit: int) -> Steps[dict[str, int]]:
    """Say for each stream up to which index its scores equal to `value` go, where of all of them `ties` go.

    Streams in their order: of the first ones all go, and are left out; of one some, found digit by digit of the index.
    """
    counts = [np.zeros(1 << digit, np.int64) for _ in streams]

    def first(sums: Indices) -> None:
        for stream, each in zip(streams, counts, strict=True):
            _ties(stream, value, range(stream.size), dtype, each)
        sums[:] = [each.sum() for each in counts]

    equal = yield Wanted(len(streams), first)
    ends = equal.cumsum()
    split = int(np.searchsorted(ends, ties))
    found = dict.fromkeys((stream.name for stream in streams[split + 1 :]), 0)
    left = ties - int(ends[split] - equal[split])
    if left == equal[split]:
        return found
    stream, span = streams[split], range(streams[split].size)
    parts = yield Wanted(1 << digit, lambda sums: np.copyto(sums, counts[split]))
    while True:
        ends = parts.cumsum()
        at = int(np.searchsorted(ends, left))
        left -= int(ends[at] - parts[at])
        step = 1 << _shift(span, len(parts))
        span = range(span.start + at * step, min(span.stop, span.start + (at + 1) * step))
        if left == parts[at] or step == 1:
            return {**found, stream.name: span.stop}
        parts = yield Wanted(len(parts), partial(_ties, stream, value, span, dtype))


def _ties(stream: Stream, value: float, span: range, dtype: torch.dtype, counts: Indices) -> None:
    """Count the scores equal to `value` in equal parts of a span of the whole tensor, those of this process."""
    for start, piece in stream.pieces(dtype, within=span) if stream.here else ():
        found = stream.whole(_positions(_compare(operator.eq, piece, value)).cpu().numpy() + start)
        inside = found[np.searchsorted(found, span.start) : np.searchsorted(found, span.stop)] - span.start
        counts += np.bincount(inside >> _shift(span, len(counts)), minlength=len(counts))


def _shift(span: range, parts: int) -> int:
    return max(0, (len(span) - 1).bit_length() - parts.bit_length() + 1)


def _keys(scores: _Floats) -> npt.NDArray[np.uint64]:
    """Whole numbers (modulo 2^64) in the order of the scores; those of 0.0 and -0.0 are the same."""
    signed = (scores + 0.0).view(np.int32 if scores.itemsize == 4 else np.int64)
    highest = np.iinfo(signed.dtype).max
    return np.where(signed < 0, signed ^ highest, signed).astype(np.int64).view(np.uint64)


def _key(score: float, dtype: torch.dtype) -> int:
    word = int(np.array(score + 0.0, _NUMPY[dtype]).view(_WORD[dtype]))
    return word ^ np.iinfo(_WORD[dtype]).max if word < 0 else word


def _float(key: int, dtype: torch.dtype) -> float:
    word = key ^ np.iinfo(_WORD[dtype]).max if key < 0 else key
    return float(np.array(word, _WORD[dtype]).view(_NUMPY[dtype]))


def _grouped(streams: Sequence[Stream], count: int, dtype: torch.dtype) -> Steps[Cut]:
    """Take whole groups, the lowest first, as long as that brings the weights pruned nearer to `count`."""
    starts = np.cumsum([0, *(stream.size for stream in streams)])

    def fill(sums: Indices) -> None:  # with the words of numbers of double precision, each of one process
        for stream, first in zip(streams, starts, strict=False):
            for start, piece in stream.pieces(dtype) if stream.here else ():
                at = first + stream.whole(np.arange(start, start + piece.numel()))
                sums.view(np.float64)[at] = piece.cpu().numpy()

    words = yield Wanted(int(starts[-1]), fill)
    scores = torch.from_numpy(words.view(np.float64).copy()).to(dtype)
    groups = torch.cat([torch.full((s.size,), s.group, dtype=torch.int64) for s in streams])
    scores, order = scores.sort(stable=True)
    weights = groups[order].cumsum(0)
    taken = int(torch.searchsorted(weights, count))  # groups that together stay below `count`
    before = int(weights[taken - 1]) if taken else 0
    if taken < len(weights) and int(weights[taken]) - count <= count - before:
        taken += 1
    value, end = (float(scores[taken - 1]), int(order[taken - 1]) + 1) if taken else (-math.inf, 0)
    until = zip(streams, starts.tolist(), strict=False)  # equals go in their order, up to `end`
    return Cut(value, dtype, {stream.name: max(end - first, 0) for stream, first in until})


_NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
_WORD: dict[torch.dtype, Any] = {torch.float32: np.int32, torch.float64: np.int64}


# numpy compares, counts and finds several times faster than torch on a CPU; elsewhere torch does the same


def _compare(compare: Callable[[Any, float], Any], piece: Tensor, value: float) -> Tensor:
    compared: Tensor = torch.from_numpy(compare(piece.numpy(), value)) if bits.on_cpu(piece) else compare(piece, value)
    return compared


def _between(piece: Tensor, low: float, high: float, kept: Tensor | None) -> tuple[int, _Floats]:
    """How many are below `low`, as all that are not kept, and those from there up to `high`."""
    if bits.on_cpu(piece):
        scores = piece.numpy()
        inside = np.greater_equal(scores, low)
        if kept is not None:
            np.logical_and(inside, kept.numpy(), out=inside)
        below = scores.size - int(np.count_nonzero(inside))
        np.logical_and(inside, np.less_equal(scores, high), out=inside)
        return below, scores[np.flatnonzero(inside)]
    found = piece[piece >= low] if kept is None else piece[(piece >= low) & kept]
    return piece.numel() - found.numel(), found[found <= high].cpu().numpy()


def _count(flags: Tensor) -> int:
    return int(np.count_nonzero(flags.numpy())) if bits.on_cpu(flags) else int(torch.count_nonzero(flags))


def _positions(flags: Tensor) -> Tensor:
    if bits.on_cpu(flags):
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero().view(-1)
