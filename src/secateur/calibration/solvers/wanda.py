"""Weights times the norm of what they read (Sun et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from secateur.calibration.solvers.base import Select, solver
from secateur.calibration.solvers.curvature import Curvature


@solver(
    "wanda", source='Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", equation 1'
)
def wanda(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
    """The smallest products of weight and norm of its input go; the others stay as they are.

    The paper compares within each output: let `select` count by rows.
    """
    return weights, select((weights * curvature.scale).abs())
