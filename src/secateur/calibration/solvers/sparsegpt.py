"""Column by column, each error made up for by the columns that follow (Frantar & Alistarh 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.calibration.solvers.base import Select, solver
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.factors import cholesky

COLUMNS = 32
"""Decided at once. The paper takes 128: fewer follow the updates more closely, at more selections."""


@solver(
    "sparsegpt",
    source='Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", '
    "algorithm 1",
)
def sparsegpt(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
    """Column by column the weights of the least saliency go, and the columns that follow make up for them.

    A block of columns is decided when it is reached, by weights that were updated until then. The paper gives every
    block the same share. Here the columns to come are ranked along, as they are at that moment, so that a block has
    the share that it is worth and the count is exact at the end.
    """
    factor = _factor(curvature.matrix)
    left = weights * curvature.scale
    decided = torch.full_like(left, math.nan)
    kept = torch.ones_like(left, dtype=torch.bool)
    pivots = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    for start in range(0, left.shape[-1], COLUMNS):
        block = slice(start, min(start + COLUMNS, left.shape[-1]))
        scores = torch.where(decided.isnan(), (left / pivots).square(), decided)
        kept[..., block] = select(scores)[..., block]
        decided[..., block] = torch.where(kept[..., block], math.inf, -math.inf)
        errors = _block(left[..., block], kept[..., block], factor[:, block, block])
        left[..., block.stop :] -= errors @ factor[:, block, block.stop :]
    return left / curvature.scale, kept


def _factor(matrix: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: row j holds what is left of it once the columns before j are fixed.

    It is the inverse of the factor from the last column to the first; the inverse itself, in which float32 would lose
    digits, is never made.
    """
    backwards = cholesky(matrix.flip(-2, -1)).flip(-2, -1)
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    factor: Tensor = torch.linalg.solve_triangular(backwards, one, upper=True)
    return factor


def _block(left: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
    """Prune some columns one after another, in place; the errors, each in units of its pivot."""
    errors = torch.empty_like(left)
    for column in range(left.shape[-1]):
        gone = left[..., column].masked_fill(kept[..., column], 0.0)
        errors[..., column] = gone / factor[:, column, column].unsqueeze(-1)
        left[..., column:] -= errors[..., column, None] * factor[:, None, column, column:]
    return errors
