"""Sparsity as a function of the step: when the pruning happens.

| name | sparsity at progress p from 0 to 1 (s is the final one) | source |
|---|---|---|
| `one_shot` | s at once | |
| `linear` | s p | |
| `cubic` | s (1 - (1 - p)^3) | Zhu & Gupta 2017, "To prune, or not to prune", eq. 1 |
| `geometric` | 1 - (1 - s)^p: each update removes the same fraction of what remains | Frankle & Carbin 2019 |
| `cosine` | s (1 - cos(pi p)) / 2 | |

Steps are whatever the Pruner counts: optimizer steps when it is attached, your own calls of `step()` otherwise.
A user's own schedule is a function `step -> sparsity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from secateur.errors import InputError, InputTypeError

Curve = Callable[[Fraction, Fraction], Fraction | float]


@dataclass(frozen=True)
class Schedule:
    """A curve between two steps, looked at every so often and always at the end.

    Attributes:
        kind: the name of the curve.
        start: the step at which the curve begins; up to it nothing is pruned (but by a curve that begins high).
        stop: the step from which on the sparsity is the final one, exactly, whatever `every` is.
        every: steps between changes of the masks.
    """

    kind: str
    start: int
    stop: int
    every: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _CURVES:
            raise InputError(f"no schedule named {self.kind!r}: choose {', '.join(_CURVES)}")
        for name in ("start", "stop", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputTypeError(f"{self.kind}({name}={value!r}): give a whole number of steps")
        if self.start < 0 or self.every < 1:
            raise InputError(f"{self}: start must be 0 or more, and every 1 or more")
        if self.stop < self.start:
            raise InputError(f"{self} ends before it starts: give a stop of at least {self.start}")

    def sparsity(self, step: int, final: Fraction) -> Fraction:
        """The sparsity after `step` steps, on the way to `final`; it changes every `every` steps and at `stop`."""
        if step < self.start:
            return Fraction(0)
        if step >= self.stop:
            return final
        looked_at = self.start + (step - self.start) // self.every * self.every
        return Fraction(_CURVES[self.kind](Fraction(looked_at - self.start, self.stop - self.start), final))

    def in_epochs(self, steps_per_epoch: int) -> Schedule:
        """Read start, stop and every as epochs where a Pruner counts steps: `linear(2, 10).in_epochs(len(loader))`."""
        if steps_per_epoch < 1:
            raise InputError(f"in_epochs({steps_per_epoch!r}): an epoch has at least one step")
        n = steps_per_epoch
        return replace(self, start=self.start * n, stop=self.stop * n, every=self.every * n)

    def __str__(self) -> str:
        return f"{self.kind}(start={self.start}, stop={self.stop}, every={self.every})"


_CURVES: dict[str, Curve] = {  # in fractions where they can be, so that a tenth of 0.7 is 0.07
    "one_shot": lambda p, s: s,
    "linear": lambda p, s: s * p,
    "cubic": lambda p, s: s * (1 - (1 - p) ** 3),
    "geometric": lambda p, s: 1 - float(1 - s) ** float(p),
    "cosine": lambda p, s: float(s) * (1 - math.cos(math.pi * p)) / 2,
}


def one_shot(at: int = 0) -> Schedule:
    """All at once, at step `at`."""
    return Schedule("one_shot", at, at)


def linear(start: int, stop: int, every: int = 1) -> Schedule:
    """The same number of weights at each update."""
    return Schedule("linear", start, stop, every)


def cubic(start: int, stop: int, every: int = 1) -> Schedule:
    """Fast while there is redundancy, slow near the end (Zhu & Gupta 2017, eq. 1): the usual choice."""
    return Schedule("cubic", start, stop, every)


def geometric(start: int, stop: int, every: int = 1) -> Schedule:
    """The same fraction of the remaining weights at each update, as lottery tickets and SynFlow do."""
    return Schedule("geometric", start, stop, every)


def cosine(start: int, stop: int, every: int = 1) -> Schedule:
    """Slow at both ends."""
    return Schedule("cosine", start, stop, every)
