"""Sparsity as a function of the step: when the pruning happens.

`print(sc.schedules.SCHEDULES)` lists those that have a name; `@schedule("name")` gives one to a curve of your own.
Steps are whatever the Pruner counts: optimizer steps when it is attached, your own calls of `step()` otherwise. Floats
are fractions of the training: `cubic(start=0.1, stop=0.7)`. A loop that knows its length says how many steps that is.
A user's own schedule is a function `step -> sparsity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from secateur.errors import InputError, InputTypeError
from secateur.sparsity import fraction
from secateur.support import checks
from secateur.support.registry import Registry, called

Curve = Callable[[Fraction, Fraction], Fraction | float]
_C = TypeVar("_C", bound=Curve)

SCHEDULES: Registry[Curve] = Registry("schedule", "a function of the step")
"""The curves that have a name: the sparsity at a progress p from 0 to 1, where s is the final one."""


@dataclass(frozen=True)
class Schedule:
    """A curve of sparsity between two steps, read every `every` steps and always at the end.

    Attributes:
        kind: the name of the curve.
        start: the step at which the curve begins; before it nothing is pruned, unless the curve begins above 0.
        stop: the step from which on the sparsity is the final one, exactly, whatever `every` is.
        every: steps between changes of the masks.

    `start` and `stop` are both whole numbers of steps, or both fractions of the training (float, 0 to 1); a `start` of
    0 is either. `over` makes steps of fractions.
    """

    kind: str
    start: int | float
    stop: int | float
    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise checks.wrong("kind", self.kind, f"the name of a curve: {', '.join(SCHEDULES)}")
        if self.kind not in SCHEDULES:
            raise SCHEDULES.unknown(self.kind)
        for name in ("start", "stop", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | (int if name == "every" else float)):
                other = ", or a fraction of the training, 0.0 to 1.0" if name != "every" else ""
                raise InputTypeError(f"{self.kind}({name}={value!r}): give a whole number of steps{other}")
        fractions = isinstance(self.stop, float)
        if isinstance(self.start, float) != fractions and not (fractions and self.start == 0):
            raise InputError(f"{self}: give start and stop both in steps, or both as fractions, 0.0 to 1.0")
        if fractions and not (self.start >= 0 and self.stop <= 1):
            raise InputError(f"{self}: fractions of the training lie between 0.0 and 1.0; write steps without a point")
        if self.start < 0 or self.every < 1:
            raise InputError(f"{self}: start must be 0 or more, and every 1 or more")
        if not self.start <= self.stop:
            raise InputError(f"{self} ends before it starts: give a stop of at least {self.start}")
        if self.lifts and not fractions and self.every >= self.stop - self.start:
            raise InputError(f"{self} never lifts the masks: give an every that is less than stop - start")

    @property
    def lifts(self) -> bool:
        """Whether the masks are lifted now and then, so that the sparsity falls to 0."""
        return getattr(SCHEDULES[self.kind].value, "lifts", False)

    @property
    def settles(self) -> bool:
        """Whether the sparsity stays once it is the final one."""
        return not self.lifts

    def ended(self, step: int) -> bool:
        """Whether the sparsity stays from this step on, if it is the final one."""
        return self.settles or step >= self.stop

    def sparsity(self, step: int, final: Fraction) -> Fraction:
        """The sparsity after `step` steps, on the way to `final`; it changes every `every` steps and at `stop`.

        Raises:
            InputError: start and stop are fractions of a training whose length is not known.
        """
        start, stop = self.start, self.stop
        if isinstance(start, float) or isinstance(stop, float):
            raise InputError(
                f"{self} is in fractions of the training, whose length is not known: give schedule.over(total_steps), "
                "with all steps of the optimizer that the loop will make"
            )
        if step < start:
            return Fraction(0)
        if step >= stop:
            return final
        curve = SCHEDULES[self.kind].value
        phase = (step - start) // self.every
        if self.lifts and phase % 2:
            return Fraction(0)
        looked_at = start + phase * self.every
        return Fraction(curve(Fraction(looked_at - start, stop - start), final))

    def over(self, total_steps: int) -> Schedule:
        """The schedule in steps, where it is in fractions of a training of `total_steps` steps of the optimizer.

        One that is in steps already is returned as it is.

        >>> print(cubic(start=0.1, stop=0.7, every=10).over(1000))
        cubic(start=100, stop=700, every=10)
        """
        checks.whole("total_steps", total_steps, 1, "the number of steps in all")
        if not isinstance(self.stop, float):
            return self
        return replace(self, start=round(self.start * total_steps), stop=round(self.stop * total_steps))

    def in_epochs(self, steps_per_epoch: int) -> Schedule:
        """Read start, stop and every as epochs where a Pruner counts steps: `linear(2, 10).in_epochs(len(loader))`."""
        checks.whole("steps_per_epoch", steps_per_epoch)
        if isinstance(self.stop, float):
            raise InputError(f"{self} is in fractions of the training: call over(total_steps) in place of in_epochs")
        if steps_per_epoch < 1:
            raise InputError(f"in_epochs({steps_per_epoch!r}): an epoch has at least one step")
        n = steps_per_epoch
        return replace(self, start=self.start * n, stop=self.stop * n, every=self.every * n)

    def settings(self) -> dict[str, Any]:
        """What two runs must have in common."""
        return vars(self)

    def __str__(self) -> str:
        return f"{self.kind}(start={self.start}, stop={self.stop}, every={self.every})"


@dataclass(frozen=True)
class Function:
    """A user's function `step -> sparsity`, asked in the ways in which a Schedule is."""

    curve: Callable[[int], float]
    lifts = settles = False  # asked at each step, so that a fall after its end is noticed

    def sparsity(self, step: int, final: Fraction) -> Fraction:
        """What the function says, whatever the final sparsity is."""
        return fraction(self.curve(step))

    def ended(self, step: int) -> bool:
        """It does: what follows must never fall."""
        return True

    def over(self, total_steps: int) -> Function:
        """It is in steps already."""
        return self

    def settings(self) -> str:
        """What two runs must have in common: what functions compute is not compared."""
        return str(self)

    def __str__(self) -> str:
        return "a function"


class _MakesSchedule(Protocol):
    """What makes a Schedule: `cubic(start=500, stop=4000, every=100)`."""

    def __call__(self, start: int | float, stop: int | float, every: int = 1) -> Schedule:
        """Say when, as `Schedule` does."""


def schedule(name: str, *, source: str = "") -> Callable[[Curve], _MakesSchedule]:
    """Give a schedule a name, under which `Schedule(name, ...)`, errors and the docs know it.

    What is decorated is its curve: the sparsity at a progress p from 0 to 1, where s is the final one. It becomes what
    makes a Schedule of it: `mine(start=500, stop=4000, every=100)`.

    Args:
        name: of the schedule.
        source: the paper and equation it comes from.

    Raises:
        InputError: another schedule has that name.

    >>> @schedule("square_root")
    ... def square_root(p, s):
    ...     return s * p**0.5
    >>> float(square_root(0, 100).sparsity(25, Fraction(9, 10)))
    0.45
    """

    def register(curve: Curve) -> _MakesSchedule:
        def make(start: int | float, stop: int | float, every: int = 1) -> Schedule:
            return Schedule(name, start, stop, every)

        SCHEDULES.add(name, curve, source=source)
        return called(make, curve)

    return register


def one_shot(at: int | float = 0) -> Schedule:
    """All at once, at step `at`, or after that fraction of the training (float)."""
    return Schedule("one_shot", at, at)


SCHEDULES.add("one_shot", lambda p, s: s, meaning="s at once")

# in fractions where they can be, so that a tenth of 0.7 is 0.07


@schedule("linear")
def linear(p: Fraction, s: Fraction) -> Fraction:
    """s p: the same number of weights at each update."""
    return s * p


@schedule("cubic", source='Zhu & Gupta 2017, "To prune, or not to prune", eq. 1')
def cubic(p: Fraction, s: Fraction) -> Fraction:
    """s (1 - (1 - p)^3): fast while there is redundancy, slow near the end; the usual choice."""
    return s * (1 - (1 - p) ** 3)


_FIRST = Fraction(7, 10)
"""What `gmp_star` prunes in its first step."""


@schedule("gmp_star", source='Kurtic & Alistarh 2022, "GMP*"; Zhu & Gupta 2017, eq. 1 with s0 of its own')
def gmp_star(p: Fraction, s: Fraction) -> Fraction:
    """s - (s - s0) (1 - p)^3 with s0 = 0.7, or s if that is less: most goes at once, and what is hard slowly."""
    return s - (s - min(s, _FIRST)) * (1 - p) ** 3


@schedule("geometric", source='Frankle & Carbin 2019, "The Lottery Ticket Hypothesis"')
def geometric(p: Fraction, s: Fraction) -> Fraction:
    """1 - (1 - s)^p: the same fraction of the remaining weights at each update, as lottery tickets and SynFlow do."""
    return min(s, Fraction(1 - math.pow(1 - s, p)))  # rounded, the curve may pass its end


@schedule("cosine")
def cosine(p: Fraction, s: Fraction) -> float:
    """s (1 - cos(pi p)) / 2: slow at both ends."""
    return float(s) * (1 - math.cos(math.pi * p)) / 2


def lifting(curve: _C) -> _C:
    """Mark a curve whose masks are lifted in every other phase of `every` steps; what it says holds in the others."""
    curve.lifts = True  # type: ignore[attr-defined]
    return curve


@schedule("ac_dc", source='Peste et al. 2021, "AC/DC", algorithm 1')
@lifting
def ac_dc(p: Fraction, s: Fraction) -> Fraction:
    """s and 0 in turn, `every` steps each: the masks are lifted and chosen anew; s from `stop` on."""
    return s


def cycles(schedule: Schedule, total_steps: int, *, low: float = 0.1) -> Callable[[int], float]:
    """Cycles of the learning rate, each as long as the masks stay as they are: `LambdaLR(optimizer, cycles(...))`.

    The rate begins anew at `start`, every `every` steps from there, and at `stop`; in between it falls linearly, and
    the last cycle ends with the training. So what remains learns fast after each pruning, and settles before the next.
    For cycles that span several prunings give the same schedule with another `every`.

    Args:
        schedule: that of the Pruner, in steps or in fractions.
        total_steps: steps of the optimizer, in all.
        low: what a cycle falls to, as a fraction of the rate of the optimizer, 0 to 1.

    Returns:
        A function `step -> factor` of the rate at that step: 1.0 where a cycle begins, `low` where it ends.

    Raises:
        InputTypeError, InputError: no Schedule; one that does not end before the training; a value out of range.

    Source: Kurtic & Alistarh 2022, "GMP*", whose cycles have a length of their own; Le & Hua 2021, "Network
    Pruning That Matters", who begin anew at each pruning.

    >>> rate = cycles(cubic(start=10, stop=30, every=10), 50)
    >>> [round(rate(step), 3) for step in (0, 9, 10, 15, 20, 30, 40, 50)]
    [1.0, 0.19, 1.0, 0.55, 1.0, 1.0, 0.55, 0.1]
    """
    if not isinstance(schedule, Schedule):
        raise checks.wrong("schedule", schedule, "the Schedule of the Pruner, such as sc.cubic(0.1, 0.7, every=100)")
    checks.whole("total_steps", total_steps, 1, "the number of steps in all")
    checks.number("low", low, "a fraction of the learning rate, 0 to 1")
    if not 0 <= low <= 1:
        raise InputError(f"low is {low}: give a fraction of the learning rate, 0 to 1")
    steps = schedule.over(total_steps)
    start, stop, every = int(steps.start), int(steps.stop), steps.every
    if stop >= total_steps:
        raise InputError(
            f"{schedule} ends at step {stop}, a training of {total_steps} steps has no last cycle after it: give an "
            "earlier stop"
        )

    def factor(step: int) -> float:
        if step < start:
            begin, end = 0, start
        elif step < stop:
            begin = step - (step - start) % every
            end = min(begin + every, stop)
        else:
            begin, end = stop, total_steps
        return 1 - (1 - low) * min((step - begin) / (end - begin), 1)

    return factor


def resolve(given: str | Schedule | Callable[[int], float]) -> Schedule | Function:
    """Turn what a user may pass as `schedule=` into what a Pruner asks.

    Raises:
        InputError: an unknown name, or one that needs arguments. InputTypeError: something else.
    """
    if given == "one_shot":
        return one_shot()
    if isinstance(given, str):
        if given not in SCHEDULES:
            raise SCHEDULES.unknown(given)
        raise InputError(f"schedule={given!r} needs its steps: sc.cubic(start=500, stop=4000, every=100), for example")
    if isinstance(given, Schedule):
        return given
    if callable(given):
        return Function(given)
    raise InputTypeError(f"schedule is {checks.kind(given)}: give sc.cubic(start, stop) or a function of the step")
