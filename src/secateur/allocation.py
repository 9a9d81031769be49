"""One budget shared among tensors: how many weights each of them loses, in integers that add up exactly.

| name | each tensor loses | source |
|---|---|---|
| `global_` | what the scores say, all tensors ranked together | Han et al. 2015 |
| `uniform` | the same fraction | Zhu & Gupta 2017 |
| `erk` | density ~ sum of its dimensions / their product | Evci et al. 2020, "RigL", section 3 |
| `lamp` | what layer-adaptive magnitudes say, ranked together | Lee et al. 2021, "LAMP", eq. 1 |

A user's own is a function `(weights, count) -> {name: how many to prune}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from secateur import selection
from secateur.errors import InputError, InputTypeError
from secateur.sparsity import fraction

Counts = dict[str, int]


@dataclass(frozen=True)
class Allocation:
    """How a budget is shared, and what each tensor keeps in any case.

    Attributes:
        share: `(weights, count) -> {name: how many to prune}`; None ranks all weights together by their scores.
        min_keep: weights that each tensor keeps, a number (int) or a fraction of it (float).
        allow_empty: let a tensor lose all its weights; `min_keep` is then 0.
    """

    share: Callable[[Mapping[str, Tensor], int], Mapping[str, int]] | None = None
    min_keep: int | float = 1
    allow_empty: bool = False

    def __post_init__(self) -> None:
        share = isinstance(self.min_keep, float)
        if isinstance(self.min_keep, bool) or not self.min_keep >= 0 or (share and not self.min_keep <= 1):
            raise InputError(
                f"min_keep={self.min_keep!r}: give a number of weights (int) or a fraction (float, 0 to 1)"
            )
        if not self.min_keep and not self.allow_empty:
            raise InputError("min_keep=0 lets a tensor lose all its weights: say so with allow_empty=True")

    def most(self, free: int) -> int:
        """Weights that a tensor of `free` prunable ones may lose."""
        if self.allow_empty:
            return free
        kept = math.ceil(fraction(self.min_keep) * free) if isinstance(self.min_keep, float) else self.min_keep
        return max(free - kept, 0)


def global_(*, min_keep: int | float = 1, allow_empty: bool = False) -> Allocation:
    """All weights ranked together: important tensors keep more. The default."""
    return Allocation(None, min_keep, allow_empty)


def uniform(*, min_keep: int | float = 1, allow_empty: bool = False) -> Allocation:
    """The same fraction of each tensor; the odd weights go to the largest remainders."""
    return Allocation(_uniform, min_keep, allow_empty)


def erk(*, min_keep: int | float = 1, allow_empty: bool = False) -> Allocation:
    """Erdos-Renyi-kernel: a tensor keeps a fraction ~ (sum of its dimensions) / (their product), at most all."""
    return Allocation(_erk, min_keep, allow_empty)


def lamp(*, min_keep: int | float = 1, allow_empty: bool = False) -> Allocation:
    """Layer-adaptive magnitudes: w^2 over the sum of the squares of the weights of its tensor not smaller than it.

    Inside a tensor the scores choose, as ever. Needs 4 bytes a weight, and 24 for the largest tensor.
    """
    return Allocation(_lamp, min_keep, allow_empty)


_BY_NAME: dict[str, Callable[[], Allocation]] = {
    "global": global_,
    "uniform": uniform,
    "erk": erk,
    "lamp": lamp,
}


def resolve(
    allocation: str | Allocation | Callable[[Mapping[str, Tensor], int], Mapping[str, int]],
) -> Allocation:
    """Turn what a user may pass as `allocation=` into an Allocation."""
    if isinstance(allocation, Allocation):
        return allocation
    if isinstance(allocation, str):
        if allocation not in _BY_NAME:
            raise InputError(f"no allocation named {allocation!r}: choose {', '.join(_BY_NAME)}, or give a function")
        return _BY_NAME[allocation]()
    if callable(allocation):
        return Allocation(allocation)
    raise InputTypeError(
        f"allocation is a {type(allocation).__name__}: give a name or a function (weights, count); a sparsity for each "
        "tensor goes in place of the sparsity: sc.prune(model, {'lstm*': 0.9, 'head.weight': 0.5})"
    )


def shared(
    allocation: Allocation, weights: Mapping[str, Tensor], bounds: Mapping[str, tuple[int, int]], count: int
) -> Counts:
    """Call `allocation.share` and fit its numbers to the (least, most) that each tensor may lose.

    Raises:
        InputError: the function's numbers are no counts of these tensors, or do not add up to `count`.
    """
    assert allocation.share is not None
    asked = dict(allocation.share(weights, count))
    if set(asked) != set(weights) or any(not isinstance(n, int) or n < 0 for n in asked.values()):
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


def _uniform(weights: Mapping[str, Tensor], count: int) -> Counts:
    sizes = {name: w.numel() for name, w in weights.items()}
    return apportion(sizes, sizes, count)


def _erk(weights: Mapping[str, Tensor], count: int) -> Counts:
    sizes = {name: w.numel() for name, w in weights.items()}
    kept = apportion({name: sum(w.shape) for name, w in weights.items()}, sizes, sum(sizes.values()) - count)
    return {name: size - kept[name] for name, size in sizes.items()}


def _lamp(weights: Mapping[str, Tensor], count: int) -> Counts:
    streams = [selection.Stream(name, _layer_adaptive(w)) for name, w in weights.items()]
    cut = selection.threshold(streams, count)
    counts: Counts = {}
    for stream in streams:
        _, counts[stream.name], cut = selection.keep(stream, cut)
    return counts


def _layer_adaptive(weight: Tensor) -> Tensor:
    squares = weight.detach().abs().double().square().flatten().sort().values
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    return torch.where(squares > 0, squares / not_smaller, 0.0).float()


__all__: Sequence[Any] = ("Allocation", "erk", "global_", "lamp", "uniform")
