"""Sides that are timed in turn, in one process: what another tenant of the machine does then falls on all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

Seconds = dict[str, list[float]]


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1) -> Seconds:
    """Wall-clock seconds of each side in each round; the order turns about, the first round warms up."""
    found: Seconds = {name: [] for name in sides}
    gc.disable()
    for turn in range(rounds + 1):
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            start = time.perf_counter()
            for _ in range(repeats):
                sides[name]()
            if turn:
                found[name].append((time.perf_counter() - start) / repeats)
    gc.enable()
    return found


def ratio(seconds: Seconds, above: str, below: str) -> dict[str, float]:
    """Seconds of one side over those of another in the same round: the median, the smallest, the largest."""
    return spread([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
