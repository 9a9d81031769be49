"""Tensors that are spread over processes, put together block by block in the process that writes them down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from secateur.errors import GroupError, StateError
from secateur.sharding import Place, Spread
from secateur.support import bits
from secateur.support.bits import Indices
from secateur.support.process_groups import Array, everyone, settle

BLOCK = 1 << 20
"""Numbers that are asked for at a time."""

_DONE, _FAILED = -1, -2
_Made = TypeVar("_Made")


class Part(NamedTuple):
    """The part of a tensor that is here: its dtype, and what gives the numbers from one to before another, flat."""

    dtype: torch.dtype
    read: Callable[[int, int], Tensor]


class _StoppedError(Exception):
    """Another process has met trouble, or a part could not be read here."""


class Exchange:
    """Whole tensors in blocks, whichever processes hold their numbers; each copy counts once, as in `Spread`.

    All processes take turns: in each turn some ask for a block, and all give what they hold of it. So a process holds a
    block or two, and each number goes to one process.

    Args:
        parts: of each tensor, what is here.
        spread: of the same tensors in all processes.
    """

    def __init__(self, parts: Mapping[str, Part], spread: Spread) -> None:
        self.grid = spread.grid
        self._names = sorted(parts)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._parts, self._places = parts, spread.places
        self._trouble: Exception | None = None
        self._last: tuple[tuple[int, int, int], Tensor] | None = None
        # many tensors lie alike: told once for all of these
        layouts = {_layout(self._places[name]): self._places[name] for name in self._names}
        told = [json.loads(text) for text in everyone(self.grid, json.dumps([*map(_told, layouts.values())]))]
        self._held = {layout: [every[k] for every in told] for k, layout in enumerate(layouts)}

    def block(self, name: str, first: int, last: int) -> Tensor:
        """The numbers from `first` to before `last` of a whole tensor, row-major; only inside of `run`."""
        want = self._numbers[name], first, last
        if self._last is None or self._last[0] != want:  # the last one is kept: a small tensor may be read twice
            self._last = want, self._joined(name, first, last, self._turn(want))
        return self._last[1]

    def run(self, work: Callable[[], _Made]) -> _Made:
        """Do work in each process, which may ask for blocks and waits for no process in another way.

        Raises:
            Exception: what `work` raises here; for that of another process an error of its kind that names it.
        """
        made: list[_Made] = []
        trouble: Exception | None = None
        try:
            made.append(work())
            while self._turn((_DONE, 0, 0)) is not None:
                pass
        except _StoppedError:
            trouble = self._trouble
        except GroupError:
            raise
        except Exception as error:  # told to the others in the next turn, for which they wait
            trouble = error
            with suppress(_StoppedError):
                self._turn((_FAILED, 0, 0))
        settle(self.grid, trouble)
        return made[0]

    def _turn(self, want: tuple[int, int, int]) -> list[Array] | None:
        """Ask for a block, and give what others ask for; returns what each process has of it, None when all are done.

        Raises:
            _StoppedError: one has met trouble.
        """
        asked = np.zeros((self.grid.size, 3), np.int64)
        asked[self.grid.rank] = want if self._trouble is None else (_FAILED, 0, 0)
        asked = self.grid.total(asked)
        if (asked[:, 0] == _FAILED).any():
            raise _StoppedError
        if (asked[:, 0] == _DONE).all():
            return None
        return self.grid.swap([self._given(*row) for row in asked.tolist()])

    def _given(self, number: int, first: int, last: int) -> Array:
        """The bytes of a block that are here."""
        place = self._places[self._names[number]] if number >= 0 else None
        if place is None or not place.counts:
            return np.zeros(0, np.uint8)
        start, stop = place.before(first), place.before(last)
        part = self._parts[self._names[number]]
        try:
            found: Array = part.read(start, stop).contiguous().view(torch.uint8).numpy()
        except Exception as error:  # the others wait for bytes: they are told in the next turn
            self._trouble = error
            found = np.zeros((stop - start) * part.dtype.itemsize, np.uint8)
        return found

    def _joined(self, name: str, first: int, last: int, given: list[Array] | None) -> Tensor:
        """A block, of what each process holds of it."""
        size = self._parts[name].dtype.itemsize
        word = np.dtype("c16" if size == 16 else f"u{size}")
        block, held = np.empty(last - first, word), 0
        for told, data in zip(self._held[_layout(self._places[name])], given or (), strict=True):
            words = data.view(word)
            if len(words):
                place = _place(self._places[name].shape, told)
                start = place.before(first)
                ends = place.to_whole(np.array([start, start + len(words) - 1])) - first
                if ends[1] - ends[0] == len(words) - 1:
                    block[ends[0] : ends[1] + 1] = words
                else:
                    block[place.to_whole(np.arange(start, start + len(words))) - first] = words
                held += len(words)
        if held != len(block):
            raise StateError(f"{name}: the processes hold {held:,} of {len(block):,} weights: make its parts whole")
        return torch.from_numpy(block.view(np.uint8)).view(self._parts[name].dtype)


def part_of(tensor: Tensor) -> Part:
    """What is here of a tensor, spread or not, on any device."""
    local = bits.local(tensor).resolve_conj().resolve_neg()
    local = local.reshape(1) if local.ndim == 0 else local

    def read(start: int, stop: int) -> Tensor:
        row = max(math.prod(local.shape[1:]), 1)
        first = start // row
        rows = local[first : -(-stop // row)].reshape(-1)  # a copy of no more than these rows
        return rows[start - first * row : stop - first * row].cpu()

    return Part(tensor.dtype, read)


def _layout(place: Place) -> Any:
    """Equal for tensors of which each process holds the same indices."""
    return place.shape, place.layout


def _told(place: Place) -> Any:
    """What is here of a tensor, as plain data: along each dimension the ranges of its indices."""
    return [_ranges(index) for index in place.index]


def _ranges(index: Indices) -> list[tuple[int, int]]:
    ends = np.flatnonzero(np.diff(index) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(index, ends) if run.size]


def _place(shape: tuple[int, ...], told: Any) -> Place:
    return Place(shape, tuple(_index(tuple(map(tuple, ranges))) for ranges in told))


@lru_cache(maxsize=1 << 8)
def _index(ranges: tuple[tuple[int, int], ...]) -> Indices:
    return np.concatenate([np.arange(0), *(np.arange(*ends) for ends in ranges)])
