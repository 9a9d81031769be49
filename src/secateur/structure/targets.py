"""How much goes: a share of the units, or as much as leaves a fraction of the parameters or multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from secateur.errors import InputError, StructureError
from secateur.measurement import costs, timing
from secateur.structure.capture import Capture, Run, calm
from secateur.structure.fields import labels, support
from secateur.structure.groups import Groups, Worth, as_mask
from secateur.structure.remains import size
from secateur.structure.units import Labels
from secateur.support.inputs import Arguments

NEAR = 0.05
"""A target is met by what lies within so much of it."""

_HALVINGS = 20
_MEASUREMENTS = 10
_NEAR_TIME = 0.02
_NEARLY_ALL = 0.97

_T = TypeVar("_T")


@dataclass(frozen=True)
class Target:
    """What is to remain.

    Attributes:
        what: "params", "macs" or "latency".
        fraction: of those of the given model.
    """

    what: str
    fraction: float

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


def parameters(cap: Capture, model: nn.Module) -> Callable[[Labels], int]:
    """How many parameters remain of a captured model, as a function of the kept labels; tied ones count once."""
    sizes: dict[int, list[Labels]] = {}
    for t in dict(model.named_parameters()).values():
        sizes[id(t)] = [labels(f).ravel() for f in cap.fields(t)] if cap.seen(t) else []
    weights = [(t, sizes[id(t)]) for t in model.parameters()]

    def count(kept: Labels) -> int:
        total = 0
        for t, axes in weights:
            full = math.prod(len(axis) for axis in axes)
            total += t.numel() // full * math.prod(int(kept[axis].sum()) for axis in axes)
        return total

    return count


def products(cap: Capture) -> Callable[[Labels], int]:
    """How many multiply-accumulates the products of all forwards in eval mode make, as a function of kept labels."""
    known = []
    for run in cap.runs:
        for call in run.calls if not run.training else ():
            for shape, fields in call.products:
                dims = [d for f in fields for d in support(f)]
                apart = len(dims) == len(set(dims)) == len(fields)  # each field along a dimension of its own
                known.append((shape, fields, [labels(f).ravel() for f in fields] if apart else []))

    def count(kept: Labels) -> int:
        total, mask = 0, as_mask(kept)
        for shape, fields, lines in known:
            if lines or not fields:
                rest = math.prod(shape) // math.prod(len(line) for line in lines)
                total += rest * math.prod(int(kept[line].sum()) for line in lines)
            else:
                total += math.prod(size(shape, fields, mask))
        return total

    return count


def counted(model: nn.Module, runs: Sequence[Run]) -> int:
    """The multiply-accumulates of all forwards in eval mode, as `sc.measure` counts them.

    Raises:
        InputError: torch cannot tell them, or there are none.
    """
    total = 0
    for run in runs:
        if not run.training:
            with calm(model, False):
                found = costs.macs(model, run.arguments)["macs"]
            if not found:
                raise InputError(
                    "the MACs of this model cannot be counted: it has no matrix products, or some that torch does not "
                    "know. Give params= or latency= instead"
                )
            total += found
    return total


def select(
    groups: Groups,
    worth: Worth,
    pools: Sequence[Hashable],
    target: Target,
    left: Callable[[Labels], float],
    round_to: int,
    min_width: int,
) -> tuple[Labels, list[int]]:
    """Choose units so that a fraction of a cost is left, as near as units are fine; no model is cut meanwhile.

    First the share of all pools is halved in, then pools go over to the next share one by one.

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
    tried: dict[float, tuple[Labels, list[int]]] = {}
    count = len(set(pools))

    def attempt(share: float | Sequence[float]) -> float:
        choice = groups.select(worth, share, pools, round_to, min_width)
        cost = left(choice[0])
        tried.setdefault(cost, choice)
        return cost

    low, high = 0.0, 1.0
    least = attempt(high)
    if least > target.fraction + NEAR:
        raise StructureError(
            f"{target.what}={target.fraction:g} cannot be met: at least {least:.3f} of the given model's remain"
        )
    attempt(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if attempt(middle) > target.fraction else (low, middle)
    first, last = 0, count
    while last - first > 1:
        middle = (first + last) // 2
        ahead = attempt([high] * middle + [low] * (count - middle))
        first, last = (middle, last) if ahead > target.fraction else (first, middle)
    best = min(tried, key=lambda cost: abs(cost - target.fraction))
    if abs(best - target.fraction) > NEAR:
        below, above = max(c for c in tried if c <= target.fraction), min(c for c in tried if c > target.fraction)
        raise StructureError(
            f"{target.what}={target.fraction:g} cannot be met: whole units go, and the nearest are {below:.3f} and "
            f"{above:.3f}. Ask for one of these"
        )
    return tried[best]


def reach(cap: Capture, model: nn.Module, target: Target) -> Callable[[Labels], float]:
    """The fraction of the cost that is left of a captured model, as a function of the kept labels."""
    if target.what == "params":
        parts = parameters(cap, model)
        full = parts(np.ones(cap.ledger.size, bool))
        return lambda kept: parts(kept) / full
    made, all_macs = products(cap), counted(model, cap.runs)
    beside = all_macs - made(np.ones(cap.ledger.size, bool))  # of what labels do not follow
    return lambda kept: (made(kept) + beside) / all_macs


def time_left(model: nn.Module, small: nn.Module, example: Arguments, seconds: float) -> float:
    """The time of a call of the small model over that of the given one, measured in turn: the median of the rounds."""
    models = {"given": model, "small": small}
    with timing.evaluating(models, torch.get_num_threads()):
        blocks, _ = timing.time_blocks(models, example, seconds)
    return timing.quantile([b / a for a, b in zip(blocks["given"], blocks["small"], strict=True)], 0.5)


def search_time(fraction: float, left: Callable[[float], float], sure: Callable[[float], tuple[float, _T]]) -> _T:
    """Find units to remove so that a fraction of the time is left, from a few measurements.

    A line through those that came near says what to try next, so that no single one, which the machine may have
    spoiled, leads astray.

    Args:
        fraction: of the time.
        left: measures the fraction that is left at a share of the units.
        sure: measures it longer, and gives what was made with it.

    Returns what was made at the share that met the target.

    Raises:
        StructureError: none did.
    """
    points = [(0.0, 1.0), (1.0, 0.0)]  # share, time left; the second is a guess
    for _ in range(_MEASUREMENTS):
        shares, times = np.array(points).T
        slope, at_zero = np.polyfit(shares, times, 1, w=1 / (0.03 + np.abs(times - fraction)) ** 2)
        share = float(np.clip((fraction - at_zero) / min(slope, -0.1), 0.02, _NEARLY_ALL))
        got = left(share)
        if abs(got - fraction) <= _NEAR_TIME:
            got, found = sure(share)
            if abs(got - fraction) <= _NEAR_TIME + 0.01:
                return found
        points.append((share, got))
        if share == _NEARLY_ALL and got > fraction + NEAR:
            break
    share, got = min(points[2:], key=lambda one: abs(one[1] - fraction))
    if abs(got - fraction) <= NEAR:
        got, found = sure(share)
        if abs(got - fraction) <= NEAR:
            return found
        points.append((share, got))
    told = ", ".join(f"{time:.2f} at a sparsity of {share:.2f}" for share, time in sorted(points[2:]))
    raise StructureError(
        f"latency={fraction:g} cannot be met: of the time of a call is left {told}. "
        "Give one of these sparsities, or measure when the machine is less busy"
    )
