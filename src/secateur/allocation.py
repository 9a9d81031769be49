"""One budget shared among tensors: how many weights each of them loses, in integers that add up exactly.

`print(sc.allocation.ALLOCATIONS)` lists those that have a name. A user's own is a function
`(weights, count) -> {name: how many to prune}`; `@allocation("name")` gives it a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur import selection
from secateur.errors import InputError, InputTypeError
from secateur.sparsity import fraction
from secateur.streams import Stream
from secateur.support import checks
from secateur.support.registry import Registry, called

Counts = dict[str, int]

Rule = Callable[[Mapping[str, Tensor], int], Mapping[str, int]]


@dataclass(frozen=True)
class Allocation:
    """How a budget is shared, and what each tensor keeps in any case.

    Attributes:
        share: `(weights, count) -> {name: how many to prune}`; None ranks all weights together by their scores.
        min_keep: weights that each tensor keeps, a number (int) or a fraction of it (float).
        allow_empty: let a tensor lose all its weights; `min_keep` is then 0.
        shapes_only: whether `share` looks at nothing but the shapes of the weights, and so serves for files too.
    """

    share: Rule | None = None
    min_keep: int | float = 1
    allow_empty: bool = False
    shapes_only: bool = False

    def __post_init__(self) -> None:
        if self.share is not None:
            checks.function("share", self.share, "a function (weights, count), or None")
        checks.flag("allow_empty", self.allow_empty)
        checks.flag("shapes_only", self.shapes_only)
        remedy = "a number of weights (int) or a fraction (float, 0 to 1)"
        share, whole = isinstance(self.min_keep, float), type(self.min_keep) is int
        if not (share or whole) or not self.min_keep >= 0 or (share and not self.min_keep <= 1):
            raise InputError(f"min_keep={self.min_keep!r}: give {remedy}")
        if not self.min_keep and not self.allow_empty:
            raise InputError("min_keep=0 lets a tensor lose all its weights: say so with allow_empty=True")

    @property
    def of_parts(self) -> bool:
        """Whether parts of tensors will do, which several processes hold."""
        return self.share is None or self.shapes_only

    def most(self, free: int) -> int:
        """Weights that a tensor of `free` prunable ones may lose."""
        if self.allow_empty:
            return free
        kept = math.ceil(fraction(self.min_keep) * free) if isinstance(self.min_keep, float) else self.min_keep
        return max(free - kept, 0)


class _MakesAllocation(Protocol):
    """What makes an Allocation: `erk()`, `uniform(min_keep=0.05)`."""

    def __call__(self, *, min_keep: int | float = 1, allow_empty: bool = False) -> Allocation:
        """Say what each tensor keeps in any case, as `Allocation` does."""


ALLOCATIONS: Registry[_MakesAllocation] = Registry("allocation", "a function (weights, count)")
"""The allocations that have a name."""


def allocation(name: str, *, source: str = "", shapes_only: bool = False) -> Callable[[Rule], _MakesAllocation]:
    """Give an allocation a name, under which `prune(allocation=name)`, errors and the docs know it.

    What is decorated is the function `(weights, count) -> {name: how many to prune}`; it becomes what makes an
    Allocation of it: `mine(min_keep=0.05)`.

    Args:
        name: of the allocation.
        source: the paper and equation it comes from.
        shapes_only: it looks at nothing but the shapes of the weights, and so serves for files too.

    Raises:
        InputError: another allocation has that name.
    """

    def register(share: Rule) -> _MakesAllocation:
        def make(*, min_keep: int | float = 1, allow_empty: bool = False) -> Allocation:
            return Allocation(share, min_keep, allow_empty, shapes_only)

        called(make, share)
        make.share = share  # type: ignore[attr-defined]
        share.__qualname__ += ".share"  # where pickle finds it
        return ALLOCATIONS.add(name, make, source=source)

    return register


def global_(*, min_keep: int | float = 1, allow_empty: bool = False) -> Allocation:
    """All weights ranked together: important tensors keep more. The default."""
    return Allocation(None, min_keep, allow_empty, shapes_only=True)


ALLOCATIONS.add("global", global_, source='Han et al. 2015, "Learning both Weights and Connections"')


@allocation("uniform", source='Zhu & Gupta 2017, "To prune, or not to prune"', shapes_only=True)
def uniform(weights: Mapping[str, Tensor], count: int) -> Counts:
    """The same fraction of each tensor; the odd weights go to the largest remainders."""
    sizes = {name: w.numel() for name, w in weights.items()}
    return apportion(sizes, sizes, count)


@allocation("erk", source='Evci et al. 2020, "RigL", section 3', shapes_only=True)
def erk(weights: Mapping[str, Tensor], count: int) -> Counts:
    """Erdos-Renyi-kernel: a tensor keeps a fraction ~ (sum of its dimensions) / (their product), at most all."""
    sizes = {name: w.numel() for name, w in weights.items()}
    kept = apportion({name: sum(w.shape) for name, w in weights.items()}, sizes, sum(sizes.values()) - count)
    return {name: size - kept[name] for name, size in sizes.items()}


@allocation("lamp", source='Lee et al. 2021, "LAMP", eq. 1')
def lamp(weights: Mapping[str, Tensor], count: int) -> Counts:
    """Layer-adaptive magnitudes: w^2 over the sum of the squares of the weights of its tensor not smaller than it.

    Inside a tensor the scores choose, as ever. Needs 4 bytes a weight, and 24 for the largest tensor.
    """
    streams = [Stream(name, _layer_adaptive(w)) for name, w in weights.items()]
    cut = selection.threshold(streams, count)
    return {stream.name: selection.keep(stream, cut)[1] for stream in streams}


def _layer_adaptive(weight: Tensor) -> Tensor:
    squares = weight.detach().abs().double().square().flatten().sort().values
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    return torch.where(squares > 0, squares / not_smaller, 0.0).float()


def resolve(given: str | Allocation | Rule) -> Allocation:
    """Turn what a user may pass as `allocation=` into an Allocation."""
    if isinstance(given, Allocation):
        return given
    if isinstance(given, str):
        return ALLOCATIONS.find(given)()
    if callable(given):
        return Allocation(given)
    raise InputTypeError(
        f"allocation is {checks.kind(given)}: give a name or a function (weights, count); a sparsity for each "
        "tensor goes in place of the sparsity: sc.prune(model, {'lstm*': 0.9, 'head.weight': 0.5})"
    )


def for_files(given: str | Allocation) -> Allocation:
    """Turn what a user may ask of files into an Allocation: one that looks at shapes only.

    Raises:
        InputError: another one; the message lists the choices.
    """
    found = resolve(given) if not isinstance(given, str) or given in ALLOCATIONS else None
    if found is None or not found.shapes_only:
        raise ALLOCATIONS.unknown(str(given), " for files", _serves_files)
    return found


def names_for_files() -> list[str]:
    """The allocations that files take."""
    return ALLOCATIONS.written(_serves_files)


def _serves_files(make: _MakesAllocation) -> bool:
    return make().shapes_only


def shared(
    allocation: Allocation, weights: Mapping[str, Tensor], bounds: Mapping[str, tuple[int, int]], count: int
) -> Counts:
    """Call `allocation.share` and fit its numbers to the (least, most) that each tensor may lose.

    Raises:
        InputError: the function's numbers are no counts of these tensors, or do not add up to `count`.
    """
    assert allocation.share is not None
    asked: Any = allocation.share(weights, count)
    whole = isinstance(asked, Mapping) and all(isinstance(n, int) and n >= 0 for n in asked.values())
    if not whole or set(asked) != set(weights):
        raise InputError(f"the allocation gave {asked!r}: it must give how many weights (int) to prune for each tensor")
    if sum(asked.values()) != count:
        raise InputError(f"the allocation's counts add up to {sum(asked.values()):,}, not to the {count:,} asked for")
    counts = apportion(asked, {name: most for name, (_, most) in bounds.items()}, count)
    # what is pruned already stays pruned: what that adds to one tensor is taken off what the others were to lose
    raised = {name: max(n, bounds[name][0]) for name, n in counts.items()}
    slack = {name: n - bounds[name][0] for name, n in raised.items()}
    back = apportion(slack, slack, sum(raised.values()) - count)
    return {name: n - back[name] for name, n in raised.items()}


def apportion(want: Mapping[str, float | int], most: Mapping[str, int], count: int) -> Counts:
    """Share `count` in proportion to `want`, none above its `most`, by largest remainder (ties: the first).

    What one tensor cannot take is shared again among the others. `count` must not exceed the sum of `most`.
    """
    counts: Counts = {}
    left = {name: Fraction(want[name]) for name in want}
    while True:
        rest = count - sum(counts.values())
        total = sum(left.values())
        even = Fraction(1, len(left)) if left and not total else Fraction(0)
        quota = {name: rest * (w / total if total else even) for name, w in left.items()}
        full = [name for name, q in quota.items() if q > most[name]]
        if not full:
            break
        counts.update({name: most[name] for name in full})
        left = {name: w for name, w in left.items() if name not in full}
    floors = {name: math.floor(q) for name, q in quota.items()}
    by_remainder = sorted(quota, key=lambda name: floors[name] - quota[name])
    odd = rest - sum(floors.values())
    for name in [n for n in by_remainder if floors[n] < most[n]][:odd]:
        floors[name] += 1
    return {name: counts.get(name, floors.get(name, 0)) for name in want}


__all__: Sequence[Any] = ("ALLOCATIONS", "Allocation", "allocation", "erk", "global_", "lamp", "uniform")
