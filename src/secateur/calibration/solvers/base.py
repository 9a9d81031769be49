"""What a solver is, and the names by which solvers are chosen. A new one is a function under `@solver("name")`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.calibration.solvers.curvature import Curvature
from secateur.errors import InputError, InputTypeError, NotFiniteError
from secateur.support import checks
from secateur.support.registry import Registry, called

Select = Callable[[Tensor], Tensor]
"""Which weights stay: from scores [groups, rows, n], the higher the better, to bools of that shape, an exact count.

Weights of the score +inf stay and those of -inf go as far as the count lets them.
"""

Solver = Callable[[Tensor, Curvature, Select], tuple[Tensor, Tensor]]
"""From weights, float32 [groups, rows, n], and what they read to new weights and which of them stay."""

SOLVERS: Registry[Solver] = Registry("solver", "a function (weights, curvature, select) -> (weights, kept)")
"""The solvers that have a name."""


def solver(name: str, *, source: str = "") -> Callable[[Solver], Solver]:
    """Register a solver under a name.

    What it does is framed by what is true for all of them: weights that read a dead input (one that was zero in every
    sample) go first, since they cost nothing; and what does not stay is +0.0.

    Args:
        name: what to write to choose it.
        source: the paper and equation it comes from.

    Raises:
        InputError: another solver has that name.
    """

    def register(solve: Solver) -> Solver:
        def framed(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
            if not bool(weights.isfinite().all()):
                raise NotFiniteError("the weights hold NaN or inf: repair them first")
            with torch.no_grad():
                found, kept = solve(weights, curvature, _dead_first(curvature, select))
            return found.masked_fill(~kept, 0.0), kept

        return SOLVERS.add(name, called(framed, solve), source=source)

    return register


def resolve(given: str | Solver) -> Solver:
    """Find a solver by its name, or frame a function of the user's: what it returns is checked, and +0.0 where it goes.

    Raises:
        InputTypeError, UnknownNameError: neither; and, when it is called, what it returns is no pair of tensors.
        InputError: of other shapes, or with another count. NotFiniteError: with NaN or inf.
    """
    if isinstance(given, str):
        return SOLVERS.find(given)
    checks.function("solver", given, "a name, or a function (weights, curvature, select) -> (weights, kept)")
    if any(given is choice.value for choice in SOLVERS.values()):
        return given

    def framed(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            made = given(weights.clone(), curvature, select)
            pair = isinstance(made, tuple) and len(made) == 2 and all(isinstance(one, Tensor) for one in made)
            if not pair or made[1].dtype != torch.bool:
                raise InputTypeError(
                    f"the solver returned {checks.told(made)}: let it return (weights, kept), the new weights and the "
                    "bools that select(scores) gave"
                )
            found, kept = made
            count = int(select(torch.zeros_like(weights)).sum())
            for one in (found, kept):
                if one.shape != weights.shape:
                    raise InputError(
                        f"the solver returned a tensor of shape {tuple(one.shape)} for weights of shape "
                        f"{tuple(weights.shape)}: let it return both tensors in the shape of the weights"
                    )
            if int(kept.sum()) != count:
                raise InputError(
                    f"the solver keeps {int(kept.sum())} of {kept.numel()} weights, and {count} are to stay: let it "
                    "return the bools that select(scores) gave"
                )
            found = found.to(weights).masked_fill(~kept, 0.0)
            if not bool(found.isfinite().all()):
                raise NotFiniteError("the solver returned weights with NaN or inf: let it return finite ones")
        return found, kept

    framed.__name__ = getattr(given, "__name__", type(given).__name__)
    return framed


def _dead_first(curvature: Curvature, select: Select) -> Select:
    if not bool(curvature.dead.any()):
        return select
    return lambda scores: select(scores.masked_fill(curvature.dead & scores.isfinite(), 0.0))
