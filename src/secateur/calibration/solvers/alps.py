"""Support and values found together: alternating directions with a count of nonzeros (Meng et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.calibration.solvers.base import Select, solver
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.refit import descend

ITERATIONS = 60
PERIOD = 3
"""Iterations with one penalty: each new one costs a factorization."""
FIRST_PENALTY = 0.1
POLISH = 10
"""Steps of conjugate gradients on the final support."""


@solver(
    "alps",
    source='Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language '
    'Models", algorithms 1 and 2',
)
def alps(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
    """Which weights stay and what they become is found together, by alternating directions and conjugate gradients.

    One copy of the weights minimises the error of the outputs, another has the zeros; a growing penalty on their
    difference, and its multipliers, lead them together. In scaled weights, in which H has a unit diagonal.
    """
    target = weights * curvature.scale
    kept = select(target.square())
    if bool(kept.all()):
        return weights, kept
    kept, sparse = _alternate(target, curvature, select, kept)
    sparse += descend(sparse - target, kept, curvature, POLISH)
    return sparse / curvature.scale, kept


def _alternate(target: Tensor, curvature: Curvature, select: Select, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The support, and the weights on it."""
    penalty, moved_once = FIRST_PENALTY, False
    inverse = _Inverse(curvature, penalty)
    fitted = target @ curvature.matrix
    sparse, multiplier = target * kept, torch.zeros_like(target)
    before = kept
    for iteration in range(1, ITERATIONS + 1):
        free = inverse(fitted - multiplier + penalty * sparse)
        wanted = free + multiplier / penalty
        kept = select(wanted.square())
        sparse = wanted * kept
        multiplier = (wanted - sparse) * penalty
        if iteration % PERIOD == 0:
            moved = int((kept ^ before).sum()) / max(int(kept.sum()), 1)
            before = kept
            if moved == 0 and moved_once:
                break
            moved_once |= moved > 0
            penalty *= _growth(moved)
            inverse = _Inverse(curvature, penalty)
    return kept, sparse


def _growth(moved: float) -> float:
    """Of the penalty, by the share of the support that moved: the paper's table, and back where it never moved."""
    return 1.3 if moved >= 0.1 else 1.2 if moved >= 0.005 else 1.1 if moved > 0 else 0.2


class _Inverse:
    """Multiplies rows by the inverse of H + penalty."""

    def __init__(self, curvature: Curvature, penalty: float) -> None:
        raised = curvature.matrix.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(penalty)
        self._factor = torch.linalg.cholesky(raised)

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.mT, self._factor).mT
