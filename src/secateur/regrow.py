"""Masks that move while a model trains: the least active weights are dropped, and as many others grow.

`print(sc.regrow.REGROWTHS)` lists the ways that have a name; `@regrowth("name")` gives one to a way of your own: a
function `(name, weight, gradient, generator) -> Tensor` of the weight's shape that says what grows, the highest first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from secateur import scores, selection, sharding, streams
from secateur.errors import InputError, PatternError, StateError
from secateur.feedback import FEEDBACKS, Feedback
from secateur.masks import Masks
from secateur.movers import Mover
from secateur.plan import FixedMasks, Plan
from secateur.scope import Member, Scope
from secateur.sharding import Place
from secateur.streams import Stream
from secateur.support import bits, checks
from secateur.support.process_groups import ALONE, Processes, together
from secateur.support.registry import Registry, called

Growth = Callable[[str, Tensor, Tensor, torch.Generator], Tensor]

REGROWTHS: Registry[Growth] = Registry(
    "regrowth", "a method of sc.feedback, or one of your own under @sc.regrow.regrowth"
)
"""The ways to choose what grows that have a name: functions `(name, weight, gradient, generator) -> Tensor`."""


@dataclass(frozen=True)
class Regrowth(Mover):
    """Moves masks: at every update each tensor drops a share of its active weights and grows as many, in exact numbers.

    The active weights of least magnitude are dropped; a share of `drop / 2 * (1 + cos(pi * step / stop))`, rounded
    down. What grows begins at zero; a weight that grows at once when it was dropped keeps its value.
    Source: Evci et al. 2020, "RigL", algorithm 1 and eq. 1.

    Attributes:
        kind: the name of the way that chooses what grows.
        every: steps between updates.
        drop: share of the active weights that the first updates drop, 0 < drop <= 1.
        stop: the step from which on the masks stay, or a fraction of the training (float, up to 1.0), of which
            `over(total_steps)` makes steps.
        seed: of the generator that is given to the function.

    Raises:
        InputError, InputTypeError: a value that cannot be used; no update comes before `stop`.
    """

    kind: str
    every: int = 100
    drop: float = 0.3
    stop: int | float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise checks.wrong("kind", self.kind, f"the name of a regrowth: {', '.join(REGROWTHS)}")
        if self.kind not in REGROWTHS:
            raise REGROWTHS.unknown(self.kind)
        checks.number("drop", self.drop, "a share of the active weights, such as 0.3")
        checks.number("stop", self.stop, "a step, or a fraction of the training such as 0.75")
        self.require_usable()
        checks.whole("seed", self.seed, 0, "a whole number below 2**32")
        if self.seed >= 2**32:
            raise InputError(f"seed is {self.seed}: give a whole number below 2**32")
        if not 0 < self.drop <= 1:
            raise InputError(f"drop is {self.drop}: give a share of the active weights, above 0 and at most 1")

    def generator(self) -> torch.Generator:
        """A new generator of its own; one of `score="random"` with the same seed draws other numbers.

        With equal numbers SET would grow just the weights that are there.
        """
        return torch.Generator().manual_seed(self.seed + 191111134)

    def share(self, step: int) -> float:
        """The share of its active weights that a tensor drops at this step."""
        return self.drop / 2 * (1 + math.cos(math.pi * step / self.stop))

    def moved(
        self, scope: Scope, masks: Masks, gradients: Mapping[str, Tensor], generator: torch.Generator, step: int
    ) -> Masks:
        """The masks after the update of this step; nothing but the state of the generator is changed.

        A frozen tensor, and one without a gradient, stays as it is.

        Args:
            scope: the weights.
            masks: which of them are active.
            gradients: dense ones, by name.
            generator: for ways that draw.
            step: of the training.

        Raises:
            StateError: there are no gradients at all.
            NotFiniteError: NaN or inf in a weight or a gradient. InputError: numbers that cannot rank.
        """
        pruned = masks.counts()
        moving = [name for name, weight in scope.items() if pruned[name] and weight.requires_grad]
        spread = sharding.spread(scope)
        processes = ALONE if spread is None else spread.grid
        there = processes.total(np.array([name in gradients for name in moving], np.int64)).tolist()
        seen = [name for name, count in zip(moving, there, strict=True) if count == processes.size]
        if moving and not seen:
            raise StateError(
                f"no gradient was seen at step {step}, at which the masks move: without attach() call "
                "pruner.observe() after backward, and zero the gradients after the step"
            )

        def require_finite() -> None:
            for name in seen:
                streams.require_finite(name, scope[name])
                streams.require_finite(f"the gradient of {name}", gradients[name])

        together(processes, require_finite)
        packed = {name: masks.packed(name) for name in masks}
        for name in seen:
            count = int((scope.members[name].free - pruned[name]) * self.share(step))
            if count:
                kept, place = packed[name].to(gradients[name].device), None if spread is None else spread.places[name]
                growth = functools.partial(self._growth, name, scope[name].detach(), gradients[name], generator)
                packed[name] = _moved(scope.members[name], kept, (pruned[name], count), growth, place, processes)
        return Masks.from_bits(packed, {name: masks.shape(name) for name in masks}, spread)

    def _growth(self, name: str, weight: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        """What says which of the weights that are here grow."""
        growth, part = REGROWTHS[self.kind].value, bits.local(weight)

        def call(weight: Tensor) -> Tensor:
            return growth(name, weight, bits.local(gradient), generator)

        if getattr(growth, "by_shape", False):
            return scores.evaluate(lambda *_: sharding.by_shape(call, name, weight), name, part)
        return scores.evaluate(lambda *_: call(part), name, part)

    def __str__(self) -> str:
        return f"{self.kind}(every={self.every}, drop={self.drop}, stop={self.stop})"


def _moved(
    member: Member,
    kept: Tensor,
    counts: tuple[int, int],
    growth: Callable[[], Tensor],
    place: Place | None,
    processes: Processes,
) -> Tensor:
    """The bits of one tensor after an update.

    Args:
        member: the tensor.
        kept: its bits before.
        counts: weights that are pruned, and that are dropped and grow.
        growth: says which of the weights that are here grow.
        place: where these lie, if the tensor is spread over processes.
        processes: over which it is spread.
    """
    name, weight, (pruned, count) = member.name, bits.local(member.parameter), counts
    here = place is None or place.counts
    drop = Stream(name, weight, scores.magnitude, kept, sharding.protected(member, place), here=here, place=place)
    still, _ = selection.keep(drop, selection.threshold([drop], pruned + count, processes=processes))
    stays = bits.unpack(still, weight.numel()).view(weight.shape)
    lowest = (-together(processes, growth)).masked_fill(stays, math.inf)  # of these grow
    grow = Stream(name, lowest, here=here, place=place)
    rest, _ = selection.keep(grow, selection.threshold([grow], count, processes=processes))
    return still | bits.pack(~bits.unpack(rest, weight.numel()))


class _MakesRegrowth(Protocol):
    """What makes a Regrowth: `rigl(every=100, drop=0.3, stop=0.75)`."""

    def __call__(self, every: int = 100, drop: float = 0.3, stop: int | float = 0.75, seed: int = 0) -> Regrowth:
        """Say when and how many, as `Regrowth` does."""


def regrowth(name: str, *, source: str = "") -> Callable[[Growth], _MakesRegrowth]:
    """Give a way to choose what grows a name, under which `Pruner(regrow=name)`, errors and the docs know it.

    What is decorated is a function `(name, weight, gradient, generator) -> Tensor` of the weight's shape; of the
    weights that are not active, those with the highest values grow. It becomes what makes a Regrowth of it:
    `mine(every=100, drop=0.3, stop=0.75)`.

    Args:
        name: of the way.
        source: the paper and equation it comes from.

    Raises:
        InputError: another way has that name.

    >>> @regrowth("where_it_was_large")
    ... def where_it_was_large(name, weight, gradient, generator):
    ...     return (weight * gradient).abs()
    >>> print(where_it_was_large(every=10, stop=100))
    where_it_was_large(every=10, drop=0.3, stop=100)
    """

    def register(growth: Growth) -> _MakesRegrowth:
        def make(every: int = 100, drop: float = 0.3, stop: int | float = 0.75, seed: int = 0) -> Regrowth:
            return Regrowth(name, every, drop, stop, seed)

        REGROWTHS.add(name, growth, source=source)
        return called(make, growth)

    return register


@regrowth("set", source='Mocanu et al. 2018, "Scalable Training of Artificial Neural Networks", SET')
@scores.by_shape
def set_(name: str, weight: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
    """At random, from a generator of its own."""
    return torch.rand(weight.shape, generator=generator, device=generator.device).to(weight.device)


@regrowth("rigl", source='Evci et al. 2020, "RigL", algorithm 1')
@scores.elementwise
def rigl(name: str, weight: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
    """abs(g): where the dense gradient is largest; it is looked at on update steps only."""
    return gradient.abs()


def resolve(given: str | Regrowth | Feedback | None) -> Regrowth | Feedback | None:
    """Turn what a user may pass as `regrow=` into a Regrowth, a Feedback, or None: masks that stay.

    Raises:
        InputError: an unknown name. InputTypeError: something else.
    """
    if isinstance(given, str):
        return FEEDBACKS[given].value() if given in FEEDBACKS else Regrowth(given)
    if not isinstance(given, Regrowth | Feedback | None):
        raise checks.wrong("regrow", given, "sc.regrow.rigl(every=100), sc.feedback.sr_ste(), a name, or None")
    return given


def require_movable(given: Regrowth | Feedback | None, plan: Plan | FixedMasks) -> None:
    """See that masks may move as they are to.

    Raises:
        InputError: they are given, or chosen in another way. PatternError: they would break the pattern.
    """
    if given is None:
        return
    if isinstance(plan, FixedMasks):
        raise InputError("given masks are held as they are: leave regrow out, or give a sparsity in their place")
    soft = isinstance(given, Feedback) and given.soft
    growth = REGROWTHS[given.kind].value if isinstance(given, Regrowth) else None
    of_parts = growth is None or any(getattr(growth, mark, False) for mark in ("elementwise", "by_shape"))
    if any(map(bits.is_sharded, plan.scope.values())) and (soft or not of_parts):
        mark = "" if soft else ", or, if its function looks at each weight alone, mark it with @sc.scores.elementwise"
        raise InputError(f"the weights are sharded, and {given} looks at whole ones: leave regrow out{mark}")
    if plan.pattern is not None and (soft or isinstance(given, Regrowth)):
        what = "one threshold for each tensor" if soft else "regrowth moves single weights, which"
        raise PatternError(f"{what} would break the pattern {plan.pattern}: leave regrow out, or the pattern")
    if soft and plan.allocation.share is not None:
        raise InputError(f'{given} learns how many weights each tensor keeps: leave allocation at "global"')


def gradients(scope: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the gradients that there are: an optimizer may write into its own."""
    found = {name: sharding.placed_as(w.grad.detach(), w) for name, w in scope.items() if w.grad is not None}
    return {name: gradient.to_dense() if gradient.is_sparse else gradient.clone() for name, gradient in found.items()}
