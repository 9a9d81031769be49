"""How much goes: a share of the units, or as much as leaves a fraction of the parameters or multiply-accumulates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from secateur.errors import InputError, StructureError
from secateur.measurement import costs, timing
from secateur.structure.calm import calm
from secateur.structure.capture import Capture
from secateur.structure.fields import labels, support
from secateur.structure.groups import Groups, Worth, as_mask
from secateur.structure.remains import size
from secateur.structure.units import Flags, Labels
from secateur.support.inputs import Arguments

NEAR = 0.05
"""A target is met by what lies within so much of it."""

CLOSE = 0.005
"""Nearer than that nobody looks."""

_HALVINGS = 12
_MEASUREMENTS = 10
_NEAR_TIME = 0.02
_NEARLY_NONE = 0.01

_T = TypeVar("_T")


@dataclass(frozen=True)
class Target:
    """What is to remain.

    Attributes:
        what: "params", "macs" or "latency".
        fraction: of those of the given model.
        strict: whether to raise where units are too coarse for it, or to take the nearest.
    """

    what: str
    fraction: float
    strict: bool = True

    def check(self, got: float) -> None:
        """See that a model meets the target.

        Raises:
            StructureError: it does not.
        """
        if abs(got - self.fraction) > NEAR:
            raise StructureError(
                f"{self.what}={self.fraction:g} was not met: {got:.3f} of the given model's remain. "
                "Ask for what can be met, or for a sparsity"
            )


def parameters(cap: Capture, model: nn.Module) -> Callable[[Flags], int]:
    """How many parameters remain of a captured model, as a function of the kept labels; tied ones count once."""
    sizes: dict[int, list[Labels]] = {}
    for t in dict(model.named_parameters()).values():
        sizes[id(t)] = [labels(f).ravel() for f in cap.fields(t)] if cap.seen(t) else []
    weights = [(t, sizes[id(t)]) for t in model.parameters()]

    def count(kept: Flags) -> int:
        total = 0
        for t, axes in weights:
            full = math.prod(len(axis) for axis in axes)
            total += t.numel() // full * math.prod(int(kept[axis].sum()) for axis in axes)
        return total

    return count


def products(cap: Capture) -> Callable[[Flags], int]:
    """How many multiply-accumulates the products of all forwards in eval mode make, as a function of kept labels."""
    known = []
    for run in cap.runs:
        for call in run.calls if not run.training else ():
            for shape, fields in call.products:
                dims = [d for f in fields for d in support(f)]
                apart = len(dims) == len(set(dims)) == len(fields)  # each field along a dimension of its own
                known.append((shape, fields, [labels(f).ravel() for f in fields] if apart else []))

    def count(kept: Flags) -> int:
        total, mask = 0, as_mask(kept)
        for shape, fields, lines in known:
            if lines or not fields:
                rest = math.prod(shape) // math.prod(len(line) for line in lines)
                total += rest * math.prod(int(kept[line].sum()) for line in lines)
            else:
                total += math.prod(size(shape, fields, mask))
        return total

    return count


def counted(model: nn.Module, examples: Iterable[Arguments]) -> int:
    """The multiply-accumulates of forwards in eval mode, as `sc.measure` counts them.

    Raises:
        InputError: torch cannot tell them, or there are none.
    """
    total = 0
    for one in examples:
        with calm(model, False):
            found = costs.macs(model, one)["macs"]
        if not found:
            raise InputError(
                "the MACs of this model cannot be counted: it has no matrix products, or some that torch does not "
                "know. Give params= or latency= instead"
            )
        total += found
    return total


def knob(model: nn.Module, example: Arguments) -> str:
    """What is turned to meet a time: "macs", or "params" where MACs cannot be counted."""
    try:
        counted(model, [example])
    except InputError:
        return "params"
    return "macs"


def select(
    groups: Groups,
    worth: Worth,
    pools: Sequence[Hashable],
    target: Target,
    left: Callable[[Flags], float],
    round_to: int,
    min_width: int,
) -> tuple[Flags, list[int]]:
    """Choose units so that a fraction of a cost is left, as near as units are fine; no model is cut meanwhile.

    Args:
        groups: of the model.
        worth: for each label, its score.
        pools: for each cell, with which it is ranked.
        target: what is to remain.
        left: the fraction of the cost that is left with these labels kept.
        round_to, min_width: as in `Groups.select`.

    Returns the mask of kept labels, and how many go of each cell.

    Raises:
        StructureError: the target is out of reach, or units are too coarse for it.
    """

    def take(share: float | Worth, pools: Sequence[Hashable]) -> _Choice:
        kept, counts = groups.select(worth, share, pools, round_to, min_width)
        return _Choice(left(kept), np.array(counts), share, pools)

    search = _Search(take, target.fraction, groups)
    search.approach(lambda share: take(share, pools), np.unique(groups.parts))
    tried, named = search.tried, f"{target.what}={target.fraction:g} cannot be met"
    best = search.best()
    if search.off(best) > NEAR and target.strict:
        below = max((one.left for one in tried if one.left <= target.fraction), default=None)
        above = min(one.left for one in tried if one.left > target.fraction)
        if below is None:
            raise StructureError(f"{named}: at least {above:.3f} of the given model's remain")
        raise StructureError(
            f"{named}: whole units go, and the nearest are {below:.3f} and {above:.3f}. Ask for one of these"
        )
    chosen = groups.select(worth, best.share, best.pools, round_to, min_width)  # again: `groups.stuck` is of the last
    groups.missed = search.off(best) / (1 - target.fraction)
    return chosen


class _Choice(NamedTuple):
    """What is left of the cost, how many units go of each cell, and how to have them again from `Groups.select`."""

    left: float
    counts: Labels
    share: float | Worth
    pools: Sequence[Hashable]


class _Search:
    """Looks for a fraction that is left, first with all units alike, then with those that are fine enough."""

    def __init__(
        self, take: Callable[[float | Worth, Sequence[Hashable]], _Choice], fraction: float, groups: Groups
    ) -> None:
        self.take, self.fraction, self.parts = take, fraction, groups.parts
        self.sizes = np.array([len(cell) for cell in groups.cells])
        self.each = range(len(self.sizes))
        self.tried: list[_Choice] = []
        self.meant = np.zeros(len(self.sizes))

    def best(self) -> _Choice:
        """What comes nearest; where several are near enough, that which is most like what all units alike would be."""

        def strange(choice: _Choice) -> float:
            return float(np.abs(choice.counts / self.sizes - self.meant).max(initial=0))

        return min(self.tried, key=lambda one: (max(self.off(one), CLOSE), strange(one), self.off(one)))

    def off(self, choice: _Choice) -> float:
        return abs(choice.left - self.fraction)

    def approach(self, line: Callable[[float], _Choice], free: Labels, turns: int = 2) -> None:
        """Halve a line from nothing to all; where it jumps over the fraction, let parts jump one by one.

        The part at which the fraction is passed stays on one side or the other, and the rest makes up for it.

        Args:
            line: from 0, where nothing goes, to 1, where all does.
            free: the parts that change along it.
            turns: how often a part may be set aside like that.
        """
        above, below, known = line(0.0), line(1.0), len(self.tried)
        self.tried += [above, below]
        if not below.left <= self.fraction < above.left:
            return
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            found = line((low + high) / 2)
            if self._over(found):
                low, above = (low + high) / 2, found
            else:
                high, below = (low + high) / 2, found
        first, last, start, end = 0, len(free), above.counts, below.counts
        if len(free) == len(np.unique(self.parts)):
            self.meant = start / self.sizes
        while last - first > 1:
            middle = (first + last) // 2
            found = self.take(np.where(np.isin(self.parts, free[:middle]), end, start) / self.sizes, self.each)
            if self._over(found):
                first, above = middle, found
            else:
                last, below = middle, found
        rest = np.delete(free, first)
        if turns and len(rest) and min(map(self.off, self.tried[known:])) > CLOSE:
            for side in (above, below):
                self.approach(functools.partial(self._beside, side.counts / self.sizes, rest), rest, turns - 1)

    def _over(self, found: _Choice) -> bool:
        self.tried.append(found)
        return found.left > self.fraction

    def _beside(self, shares: Worth, free: Labels, at: float) -> _Choice:
        """The given shares at 1 / 2; of some parts nothing goes at 0, all goes at 1."""
        other = 2 * at * shares if at < 0.5 else shares + (2 * at - 1) * (1 - shares)
        return self.take(np.where(np.isin(self.parts, free), other, shares), self.each)


def reach(cap: Capture, model: nn.Module, target: Target) -> Callable[[Flags], float]:
    """The fraction of the cost that is left of a captured model, as a function of the kept labels."""
    if target.what == "params":
        parts = parameters(cap, model)
        full = parts(np.ones(cap.ledger.size, bool))
        return lambda kept: parts(kept) / full
    made, all_macs = products(cap), counted(model, [run.arguments for run in cap.runs if not run.training])
    beside = all_macs - made(np.ones(cap.ledger.size, bool))  # of what labels do not follow
    return lambda kept: (made(kept) + beside) / all_macs


def time_left(model: nn.Module, small: nn.Module, example: Arguments, seconds: float) -> float:
    """The time of a call of the small model over that of the given one, measured in turn: the median of the rounds."""
    models = {"given": model, "small": small}
    with timing.evaluating(models, torch.get_num_threads()):
        blocks, _ = timing.time_blocks(models, example, seconds)
    return timing.quantile([b / a for a, b in zip(blocks["given"], blocks["small"], strict=True)], 0.5)


def search_time(
    fraction: float, knob: str, left: Callable[[float], float], sure: Callable[[float], tuple[float, _T]]
) -> _T:
    """Find a model that takes a fraction of the time, from a few measurements.

    A line through those that came near says what to try next, so that no single one, which the machine may have
    spoiled, leads astray.

    Args:
        fraction: of the time.
        knob: the cost of which another fraction is asked for each time: "macs" or "params".
        left: measures the fraction of the time that is left with a fraction of that cost.
        sure: measures it longer, and gives what was made with it.

    Returns what was made when the target was met.

    Raises:
        StructureError: it never was.
    """
    points = [(1.0, 1.0), (0.0, 0.0)]  # cost, time left; the second is a guess
    for _ in range(_MEASUREMENTS):
        asked, times = np.array(points).T
        slope, at_zero = np.polyfit(asked, times, 1, w=1 / (0.03 + np.abs(times - fraction)) ** 2)
        cost = float(np.clip((fraction - at_zero) / max(slope, 0.1), _NEARLY_NONE, 1 - _NEARLY_NONE))
        got = left(cost)
        if abs(got - fraction) <= _NEAR_TIME:
            got, found = sure(cost)
            if abs(got - fraction) <= _NEAR_TIME:
                return found
        points.append((cost, got))
        if cost == _NEARLY_NONE and got > fraction + NEAR:
            break
    cost, got = min(points[2:], key=lambda one: abs(one[1] - fraction))
    if abs(got - fraction) <= NEAR:
        got, found = sure(cost)
        if abs(got - fraction) <= NEAR:
            return found
        points.append((cost, got))
    told = ", ".join(f"{time:.2f} with {knob}={cost:.2f}" for cost, time in sorted(points[2:]))
    raise StructureError(
        f"latency={fraction:g} cannot be met: of the time of a call is left {told}. "
        "Give one of these, or measure when the machine is less busy"
    )
