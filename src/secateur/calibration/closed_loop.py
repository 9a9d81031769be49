"""Prunes LSTM, GRU and RNN so that they still compute alike when they run on states of their own.

A recurrent layer reads what it made a step before. Weights that were fitted to the states of the dense layer do not fit
those of the pruned one, and what is off grows from step to step. So the weights are fitted a few times more: each time
to what the pruned layer really reads, with the pre-activations of the dense one at the same times as the target. At
first it is chosen anew, too, which of them stay. It goes from layer to layer, each on the outputs of the pruned ones
below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.calibration.moments import Piece
from secateur.calibration.recurrent import Direction, Pass, Run, directions, ordered, passed
from secateur.calibration.solvers.base import Select, Solver
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.refit import refit

ROUNDS = 3
CHOICES = 1
"""Rounds, the first ones, in which what stays is chosen anew: what a layer makes of itself is known only then."""
STEPS = 30
"""Of conjugate gradients in each round."""
_CHUNK = 4096
"""Samples whose products are added up in float32, before they are in float64."""

Pieces = tuple[Piece, ...]
Solution = tuple[Tensor, Tensor]
"""New weights of a matrix, float32 [1, rows, inputs], and which of them stay."""
_Fit = Callable[[Pieces, Tensor, Tensor, Curvature], Solution]
"""From the pieces, current weights, target and curvature of a matrix to its solution."""


@torch.no_grad()
def solve(
    module: nn.RNNBase,
    prefix: str,
    runs: Sequence[Run],
    solver: Solver,
    choose: Callable[[Pieces], Select],
    *,
    rounds: int = ROUNDS,
) -> dict[Pieces, Solution]:
    """Prune a recurrent module; it is only read.

    Each layer and direction is one problem of least squares: its input and its state together are what it reads. First
    the solver chooses which weights stay, on the states of the dense layer. Then come the rounds. Of all of them those
    weights are taken whose outputs, on states of their own, are nearest to the dense ones.

    Args:
        module: an LSTM, GRU or RNN.
        prefix: its name in the model.
        runs: calls of it, at least one.
        solver: chooses what stays, and its values.
        choose: for the pieces of each of the matrices (see `recurrent.moments`) how many stay, and where. What is even
            for each row serves such layers: compared across rows, whole units are lost.
        rounds: of fitting to states of its own; without them it runs in open loop.

    Returns:
        For the pieces of each matrix its new weights and which of them stay.
    """
    dense = pruned = [run.input for run in runs]
    found: dict[Pieces, Solution] = {}
    for layer in directions(module, prefix):
        loops = [_Loop(direction, runs, dense, pruned) for direction in layer]
        for loop in loops:
            loop.open(solver, choose)
            loop.close(rounds, solver, choose)
            found.update(loop.solutions)
        dense = [torch.cat(each, -1) for each in zip(*(loop.dense_outputs for loop in loops), strict=True)]
        pruned = [torch.cat(each, -1) for each in zip(*(loop.outputs for loop in loops), strict=True)]
    return found


class _Loop:
    """One direction of a layer, on its way from dense to pruned.

    Args:
        direction: the dense one.
        runs: the calls of its module.
        dense: its inputs in each of them, in the dense module.
        pruned: the same, of pruned layers below.
    """

    def __init__(
        self, direction: Direction, runs: Sequence[Run], dense: Sequence[Tensor], pruned: Sequence[Tensor]
    ) -> None:
        self._dense = self._now = direction
        self._runs, self._inputs = runs, pruned
        self._target = [passed(direction, x, run) for x, run in zip(dense, runs, strict=True)]
        self._seen: list[Pass] = []
        self.solutions: dict[Pieces, Solution] = {}

    @property
    def dense_outputs(self) -> list[Tensor]:
        """In each run, in the order of time."""
        return [made.output for made in self._target]

    @property
    def outputs(self) -> list[Tensor]:
        """The same of the pruned one."""
        return [made.output for made in self._seen]

    def open(self, solver: Solver, choose: Callable[[Pieces], Select]) -> None:
        """Choose what stays, with the states of the dense layer."""
        inputs = zip(self._target, self._inputs, self._runs, strict=True)
        seen = [replace(made, x=ordered(self._dense, x, run)) for made, x, run in inputs]
        self._choose(seen, solver, choose)

    def close(self, rounds: int, solver: Solver, choose: Callable[[Pieces], Select]) -> None:
        """Fit the weights to the states that they make themselves, and keep the best of all rounds."""
        least, best = math.inf, (self._now, self.solutions)
        for count in range(rounds + 1):
            seen = self._run()
            error = sum(_error(a, b) for a, b in zip(seen, self._target, strict=True))
            if not math.isfinite(error):
                break
            if error < least:
                least, best, self._seen = error, (self._now, dict(self.solutions)), seen
            if count < min(CHOICES, rounds):
                self._choose(seen, solver, choose)
            elif count < rounds:
                self._fit(seen, self._refit)
        self._now, self.solutions = best
        self._seen = self._seen or self._run()

    def _choose(self, seen: Sequence[Pass], solver: Solver, choose: Callable[[Pieces], Select]) -> None:
        self._fit(seen, lambda pieces, _, target, curvature: solver(target, curvature, choose(pieces)))

    def _run(self) -> list[Pass]:
        return [passed(self._now, x, run) for x, run in zip(self._inputs, self._runs, strict=True)]

    def _refit(self, pieces: Pieces, weights: Tensor, target: Tensor, curvature: Curvature) -> Solution:
        kept = self.solutions[pieces][1]
        return refit(weights, target, kept, curvature, steps=STEPS), kept

    def _fit(self, seen: Sequence[Pass], fit: _Fit) -> None:
        """Fit all matrices to what they read in these passes, and to what the dense ones made at the same times."""
        now = self._now
        for pieces, (gram, cross) in self._products(seen).items():
            weights, curvature = now.matrix(pieces), Curvature(gram.unsqueeze(0))
            off = self._dense.matrix(pieces).double() @ cross - weights.double() @ gram
            target = weights + _ridge(off.float(), curvature)
            found, kept = fit(pieces, weights.unsqueeze(0), target.unsqueeze(0), curvature)
            self.solutions[pieces] = found, kept
            self._now = self._now.replaced(pieces, found[0])

    def _products(self, seen: Sequence[Pass]) -> Mapping[Pieces, tuple[Tensor, Tensor]]:
        """For each matrix the sums of z z^T over what it reads, and of d z^T with what the dense one reads."""
        found: dict[Pieces, tuple[Tensor, Tensor]] = {}
        for made, target in zip(seen, self._target, strict=True):
            for pieces, z, d in zip(self._now.parts, made.read(self._now), target.read(self._dense), strict=True):
                gram, cross = product(z, z), product(d, z)
                if pieces in found:
                    gram, cross = gram.add_(found[pieces][0]), cross.add_(found[pieces][1])
                found[pieces] = gram, cross
        return found


def _ridge(off: Tensor, curvature: Curvature) -> Tensor:
    """How all weights, if none were zero, would change to fit a target: least squares, drawn to the present weights.

    Args:
        off: what the target makes less what the weights make, times what these read: [rows, inputs].
        curvature: of what they read; its damping is the pull.
    """
    scale = curvature.scale[0]
    factor = torch.linalg.cholesky(curvature.matrix[0])
    return torch.cholesky_solve((off / scale).mT, factor).mT / scale


def product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of samples [samples, n] and [samples, m], added up in float64: [n, m]."""
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for one, other in zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True):
        total += one.T @ other
    return total


def _error(made: Pass, target: Pass) -> float:
    return float((made.samples(made.after) - target.samples(target.after)).square().sum(dtype=torch.float64))
