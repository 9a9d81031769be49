"""Sums of x x^T over the inputs of layers, each input summed once however many layers read it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from secateur.calibration.moments import Moments, Piece
from secateur.errors import NotFiniteError, listed

_ROWS = 1024
"""Samples that are summed in float32 before they go into float64: few enough to lose less than 1e-6."""

_BLOCK = 192
"""Columns whose products are computed at once: those below the diagonal are not."""


class Reader(NamedTuple):
    """Rows of the matrix of some tensors, side by side, that read one input.

    Attributes:
        names: of the tensors.
        start: the first row, of each of them.
        stop: the one after the last.
    """

    names: tuple[str, ...]
    start: int
    stop: int


class Matrices(NamedTuple):
    """How many matrices a tensor holds, one below another, and how many rows each has."""

    groups: int
    rows: int


Sum = tuple[Tensor, Tensor]
"""Sums of x x^T [groups, inputs, inputs] in float64, and of samples [groups]."""
Source = tuple[int, int]
"""Where sums of a row lie: which sum, and which group of it."""


@dataclass
class _Fresh:
    """The sums of an input that is still in memory: others may read it too."""

    found: Sum
    storage: StorageWeakRef | None
    readers: list[Reader]

    @property
    def gone(self) -> bool:
        return self.storage is None or bool(self.storage.expired())  # type: ignore[no-untyped-call]


class Grams:
    """Streams sums: an input that several readers read is summed once, and where they always do they share the sum."""

    def __init__(self) -> None:
        self._fresh: dict[Hashable, _Fresh] = {}
        self._sums: dict[tuple[Reader, ...], Sum] = {}

    def add(self, reader: Reader, x: Tensor, how: Hashable, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Add what a reader read.

        Args:
            reader: whose rows are dealt out evenly over the groups of the input.
            x: the tensor that was read: until it is gone, other readers of it are recognised.
            how: in which way it was read.
            rows: gives the samples, [groups, samples, inputs] each.

        Raises:
            NotFiniteError: NaN or inf among them.
        """
        for key in [key for key, fresh in self._fresh.items() if fresh.gone]:
            self._keep(self._fresh.pop(key))
        storage, place = _place(x)
        key = (place, how)
        if (fresh := self._fresh.get(key)) is not None:
            if reader not in fresh.readers:
                fresh.readers.append(reader)
                return
            self._keep(self._fresh.pop(key))  # it reads the same once more
        alone = self._sums.get((reader,))  # a layer that reads alone, as the widest ones do, needs no second sum
        found = summed(rows(), alone)
        if not found[0].diagonal(dim1=1, dim2=2).isfinite().all():
            raise NotFiniteError(
                f"the inputs of {listed(reader.names)} hold NaN or inf: look for them in the batches, or in a weight "
                "of a layer before it"
            )
        if alone is None:
            self._fresh[key] = _Fresh(found, storage, [reader])

    def flush(self) -> None:
        """Say that a forward has ended: what comes next is read anew."""
        for fresh in self._fresh.values():
            self._keep(fresh)
        self._fresh.clear()

    def _keep(self, fresh: _Fresh) -> None:
        readers = tuple(sorted(fresh.readers))
        if readers in self._sums:
            for total, new in zip(self._sums[readers], fresh.found, strict=True):
                total += new
        else:
            self._sums[readers] = fresh.found

    def absorb(self, found: Iterable[Moments]) -> None:
        """Add what was summed elsewhere, which stays as it is."""
        readers: dict[int, list[Reader]] = {}
        sums: dict[int, Sum] = {}
        for one in found:
            readers.setdefault(id(one.gram), []).append(Reader(one.names, one.pieces[0].start, one.pieces[0].stop))
            sums[id(one.gram)] = one.gram, one.count
        for key, (gram, count) in sums.items():
            self._keep(_Fresh((gram.clone(), count.clone()), None, readers[key]))

    def moments(self, matrices: Mapping[str, Matrices]) -> list[Moments]:
        """What was summed, by tensor, in the order of its rows.

        Args:
            matrices: that each tensor holds; of tensors side by side one will do.
        """
        self.flush()
        sums = list(self._sums.values())
        read: dict[tuple[str, ...], dict[tuple[int, int], list[Source]]] = {}
        for number, readers in enumerate(self._sums):
            parts = sums[number][0].shape[0]
            for names, start, stop in readers:
                height = (stop - start) // parts
                for part in range(parts):
                    at = start + part * height, start + (part + 1) * height
                    read.setdefault(names, {}).setdefault(at, []).append((number, part))
        made, found = _Made(sums), []
        for names, slabs in read.items():
            held = next(matrices[name] for name in names if name in matrices)
            found += made.of(names, slabs, held)
        return found


def ordered(found: Iterable[Moments], names: Iterable[str]) -> list[Moments]:
    """Some moments in the order of the tensors; those of other tensors are left out."""
    order = {name: i for i, name in enumerate(names)}
    known = [one for one in found if any(name in order for name in one.names)]
    return sorted(known, key=lambda one: min(order[name] for name in one.names if name in order))


class _Made:
    """Makes the sums of each range of rows, those of equal sources once."""

    def __init__(self, sums: list[Sum]) -> None:
        self._sums = sums
        self._known: dict[tuple[tuple[Source, ...], ...], Sum] = {}

    def of(
        self, names: tuple[str, ...], slabs: Mapping[tuple[int, int], list[Source]], matrices: Matrices
    ) -> list[Moments]:
        """The moments of the tensors: the groups together where each is read as a whole, else each range apart."""
        count, height = matrices
        rows = _atoms(slabs, height)
        whole = [(n * height, (n + 1) * height) for n in range(count)]
        if count > 1 and rows.keys() <= set(whole):
            stacked = self._sum(tuple(rows.get(at, ()) for at in whole))
            return [Moments(tuple(Piece(name, 0, count * height) for name in names), *stacked)]
        return [
            Moments(tuple(Piece(name, start, stop) for name in names), *self._sum((sources,)))
            for (start, stop), sources in rows.items()
        ]

    def _sum(self, sources: tuple[tuple[Source, ...], ...]) -> Sum:
        if sources not in self._known:
            used = {number for group in sources for number, _ in group}
            whole = next(iter(used))
            if len(used) == 1 and sources == tuple(((whole, g),) for g in range(self._sums[whole][0].shape[0])):
                self._known[sources] = self._sums[whole]
            else:
                self._known[sources] = self._gathered(sources, self._sums[whole])
        return self._known[sources]

    def _gathered(self, sources: tuple[tuple[Source, ...], ...], like: Sum) -> Sum:
        gram = like[0].new_zeros(len(sources), *like[0].shape[1:])
        count = like[1].new_zeros(len(sources))
        for group, own in enumerate(sources):
            for number, part in own:
                gram[group] += self._sums[number][0][part]
                count[group] += self._sums[number][1][part]
        return gram, count


def _atoms(slabs: Mapping[tuple[int, int], list[Source]], height: int) -> dict[tuple[int, int], tuple[Source, ...]]:
    """Cut ranges of rows that overlap, so that each row is in one; neighbours of equal sources are one.

    Args:
        slabs: what each range reads.
        height: rows of a matrix: each begins a range of its own.
    """
    ends = sorted({end for slab in slabs for end in slab})
    found: dict[tuple[int, int], tuple[Source, ...]] = {}
    last = (-1, -1)
    for start, stop in pairwise(ends):
        sources = tuple(sorted(s for (a, b), own in slabs.items() if a <= start and stop <= b for s in own))
        if not sources:
            continue
        if last[1] == start and start % height and found[last] == sources:
            del found[last]
            start = last[0]
        last = (start, stop)
        found[last] = sources
    return found


def summed(rows: Iterable[Tensor], before: Sum | None = None) -> Sum:
    """Sum x x^T over samples, in float32 for some rows at a time and in float64 over these.

    Args:
        rows: [groups, samples, inputs] each, at least one.
        before: a sum of others, to which these are added in place.
    """
    total, count = before or (torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    samples = 0
    for piece in rows:
        samples += piece.shape[1]
        for some in torch.split(piece, _ROWS, 1):
            x = some if some.dtype == torch.float64 else some.float()
            if not total.numel():
                wide = x.device if x.device.type != "mps" else "cpu"  # which has no float64
                total = torch.zeros(len(x), x.shape[2], x.shape[2], dtype=torch.float64, device=wide)
                count = torch.zeros(len(x), dtype=torch.int64, device=wide)
            for at in range(0, x.shape[2], _BLOCK):  # the half above the diagonal
                total[:, at : at + _BLOCK, at:] += (x[:, :, at : at + _BLOCK].mT @ x[:, :, at:]).to(total.device)
    for at in range(0, total.shape[-1], _BLOCK):
        total[:, at + _BLOCK :, at : at + _BLOCK] = total[:, at : at + _BLOCK, at + _BLOCK :].mT
    count += samples
    return total, count


def _place(x: Tensor) -> tuple[StorageWeakRef | None, Hashable]:
    """Where the numbers of a tensor lie, and which they are; of one without memory of its own, something unique."""
    try:
        storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        return storage, (storage.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
    except (RuntimeError, NotImplementedError):  # inference mode counts no versions
        return None, object()
