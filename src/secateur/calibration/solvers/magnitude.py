"""The smallest weights go, and the others stay as they are: what all other solvers are measured by."""

from __future__ import annotations

from torch import Tensor

from secateur.calibration.solvers.base import Select, solver
from secateur.calibration.solvers.curvature import Curvature


@solver("magnitude")
def magnitude(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
    """The smallest weights go; the others stay as they are."""
    return weights, select(weights.abs())
