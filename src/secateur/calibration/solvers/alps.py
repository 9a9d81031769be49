"""Support and values found together: alternating directions with a count of nonzeros (Meng et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.calibration.solvers.base import Select, solver
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.factors import invert_
from secateur.calibration.solvers.refit import descend

FIRST_PENALTY = 0.1
PERIOD = 6
"""Iterations with one penalty: each new one costs an inverse."""
PERIODS = 12
"""At most; the support is stable after about six."""
RELAXATION = 1.5
"""Of each step, beyond what it asks for: Boyd et al. 2011, "Distributed Optimization and Statistical Learning via the
Alternating Direction Method of Multipliers", section 3.4.3."""
STABLE = 0.005
"""Of the support, in a period: when less than that moved, the rest is left to the conjugate gradients."""
POLISH = 6
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
    kept = select((weights * curvature.scale).square())
    if bool(kept.all()):
        return weights, kept
    kept, sparse = _alternate(weights * curvature.scale, curvature, select, kept)
    sparse += descend(sparse - weights * curvature.scale, kept, curvature, POLISH)
    return sparse.div_(curvature.scale), kept


def _alternate(target: Tensor, curvature: Curvature, select: Select, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The support, and the weights on it; in place, since of a wide layer each copy counts, the target too."""
    fitted = target @ curvature.matrix
    sparse, multiplier, penalty = target.mul_(kept.float()), torch.zeros_like(target), FIRST_PENALTY
    for _ in range(PERIODS):
        inverted, before = _inverse(curvature.matrix, penalty), kept
        pulled = torch.empty_like(sparse)
        for _ in range(PERIOD):
            torch.add(fitted, torch.sub(sparse, multiplier, out=pulled), alpha=penalty, out=pulled)
            multiplier.add_(sparse, alpha=1.0 - RELAXATION)
            wanted = multiplier.baddbmm_(pulled, inverted, alpha=RELAXATION)
            kept = select(torch.square(wanted, out=pulled))
            torch.mul(wanted, pulled.copy_(kept), out=sparse)  # the mask as numbers, which multiply fastest
            multiplier = wanted.sub_(sparse)  # in units of the penalty
        del inverted, pulled  # before the next inverse
        moved = int((kept ^ before).count_nonzero()) / max(int(kept.count_nonzero()), 1)
        if moved < STABLE:
            break
        growth = 1.69 if moved >= 0.1 else 1.44
        penalty *= growth
        multiplier /= growth
    return kept, sparse


def _inverse(matrix: Tensor, penalty: float) -> Tensor:
    """Of H + penalty: by this and one product an iteration, without eigenvectors, which cost more than all the rest."""
    raised = matrix.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(penalty)
    return invert_(raised)
