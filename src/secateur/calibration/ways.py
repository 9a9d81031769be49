"""The ways to prune a model at once: which solver, where weights are compared, how recurrent layers are fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from secateur.calibration.matrices import Matrix
from secateur.calibration.solvers import SOLVERS
from secateur.calibration.solvers.base import Select, Solver
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.refit import refit as fit
from secateur.calibration.supports import Within

Effort = Literal["full", "fast"]
Solution = tuple[Matrix, Tensor, Tensor]
"""A matrix, its new weights [groups, rows, inputs], and which of them stay."""


class Way(NamedTuple):
    """One way to prune a model.

    Attributes:
        name: for people.
        solver: of all matrices.
        within: where the weights of a matrix are compared.
    """

    name: str
    solver: Solver
    within: Within = "matrix"


def fast(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
    """Wanda's choice, and a refit of the survivors."""
    _, kept = SOLVERS.find("wanda")(weights, curvature, select)
    return fit(weights, weights, kept, curvature), kept


class Solutions:
    """New weights of a model, way by way; the model is only read, and must be the dense one meanwhile.

    Args:
        parts: its matrices.
        select: which weights of a matrix stay, given where they are compared.
    """

    def __init__(self, parts: Sequence[Matrix], select: Callable[[Matrix, Within], Select]) -> None:
        self._parts, self._select = parts, select

    def of(self, way: Way) -> list[Solution]:
        """Solve all matrices in one way."""
        return [
            (part, *way.solver(part.weights(), part.curvature, self._select(part, way.within))) for part in self._parts
        ]


def ways(solver: Solver, effort: Effort) -> list[Way]:
    """What is tried, the one that is expected to be best first.

    Args:
        solver: that was asked for.
        effort: "fast" knows one way only.
    """
    quick = Way("wanda with refit", fast, "row")
    if effort == "fast":
        return [quick]
    name = getattr(solver, "__name__", type(solver).__name__)
    first = Way(name, solver, "row" if solver is SOLVERS.find("wanda") else "matrix")
    return [first, quick] if solver is SOLVERS.find("alps") else [first]
