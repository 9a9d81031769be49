"""The ways to prune a model at once: which solver, where weights are compared, how recurrent layers are fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from secateur.calibration import closed_loop
from secateur.calibration.matrices import Matrix
from secateur.calibration.recurrent import Run
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
        within_recurrent: the same in recurrent modules and cells, which read two inputs side by side.
        rounds: in which these are fitted to states of their own; none is the open loop.
    """

    name: str
    solver: Solver
    within: Within = "matrix"
    within_recurrent: Within = "row"
    rounds: int = closed_loop.ROUNDS


class Loop(NamedTuple):
    """A recurrent module all of whose weights are pruned, the calls of it that were kept, and its matrices."""

    module: nn.RNNBase
    prefix: str
    runs: Sequence[Run]
    parts: Sequence[Matrix]


def loops(model: nn.Module, runs: Mapping[str, Sequence[Run]], parts: Sequence[Matrix]) -> list[Loop]:
    """The recurrent modules that can be fitted to states of their own, by the calls of them that were kept."""
    found = []
    for prefix, calls in runs.items():
        module = model.get_submodule(prefix)
        weights = [name for name, parameter in module.named_parameters(prefix) if parameter.ndim > 1]
        inside = [part for part in parts if set(part.moments.names) <= set(weights)]
        whole = {name for part in inside for name in part.moments.names} == set(weights)
        if isinstance(module, nn.RNNBase) and whole and calls:
            found.append(Loop(module, prefix, calls, inside))
    return found


def fast(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
    """Wanda's choice, and a refit of the survivors."""
    _, kept = SOLVERS.find("wanda")(weights, curvature, select)
    return fit(weights, weights, kept, curvature), kept


class Solutions:
    """New weights of a model, way by way; the model is only read, and must be the dense one meanwhile.

    Args:
        parts: its matrices.
        select: which weights of a matrix stay, given where they are compared.
        loops: which of the matrices are those of recurrent modules, which are solved as a whole.
    """

    def __init__(
        self, parts: Sequence[Matrix], select: Callable[[Matrix, Within], Select], loops: Sequence[Loop] = ()
    ) -> None:
        looped = {part for loop in loops for part in loop.parts}
        self._others = [part for part in parts if part not in looped]
        self._order = {part: i for i, part in enumerate(parts)}
        self._select, self._loops = select, loops
        self._known: dict[tuple[Matrix, Solver, Within], Solution] = {}

    def of(self, way: Way) -> list[Solution]:
        """Solve all matrices in one way."""
        found = [self._plain(part, way) for part in self._others]
        found += (one for loop in self._loops for one in self._looped(loop, way))
        return sorted(found, key=lambda solution: self._order[solution[0]])

    def _plain(self, part: Matrix, way: Way) -> Solution:
        within = way.within if len(part.members) == 1 else way.within_recurrent
        key = part, way.solver, within
        if key not in self._known:  # ways may differ in recurrent modules only
            self._known[key] = part, *way.solver(part.weights(), part.curvature, self._select(part, within))
        return self._known[key]

    def _looped(self, loop: Loop, way: Way) -> list[Solution]:
        parts = {part.moments.pieces: part for part in loop.parts}

        def choose(pieces: closed_loop.Pieces) -> Select:
            return self._select(parts[pieces], way.within_recurrent)

        found = closed_loop.solve(loop.module, loop.prefix, loop.runs, way.solver, choose, rounds=way.rounds)
        return [(parts[pieces], weights, kept) for pieces, (weights, kept) in found.items()]


def ways(solver: Solver, effort: Effort, looped: bool = False) -> list[Way]:
    """What is tried, the one that is expected to be best first.

    Args:
        solver: that was asked for.
        effort: "fast" knows one way only.
        looped: whether there are recurrent modules, for which more is tried.
    """
    quick = Way("wanda with refit", fast, "row", rounds=0)
    if effort == "fast":
        return [quick]
    name = getattr(solver, "__name__", type(solver).__name__)
    first = Way(name, solver, "row" if solver is SOLVERS.find("wanda") else "matrix")
    if solver is not SOLVERS.find("alps"):
        return [first._replace(rounds=0)]
    if not looped:
        return [first, quick]
    opened = first._replace(name=f"{name}, open loop", rounds=0)
    return [
        first._replace(name=f"{name}, closed loop"),
        opened,
        opened._replace(name=f"{name}, open loop, compared across rows", within_recurrent="matrix"),
        quick,
    ]
