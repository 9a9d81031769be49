"""Inverses and factors of positive definite matrices, by products of halves.

LAPACK's own give other last bits with another number of threads, and one bit can turn the choice between two weights.
Products do not, and they are quicker.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 32
"""Up to here LAPACK works with one thread."""


def invert_(matrix: Tensor) -> Tensor:
    """Turn positive definite matrices, [groups, n, n], into their inverses, in place."""
    half = matrix.shape[-1] // 2
    if half < _SMALL // 2 + 1:
        return matrix.copy_(torch.cholesky_inverse(torch.linalg.cholesky(matrix)))
    first, upper = matrix[:, :half, :half], matrix[:, :half, half:]
    last, lower = matrix[:, half:, half:], matrix[:, half:, :half]
    across = invert_(first) @ upper
    invert_(last.baddbmm_(lower, across, alpha=-1))
    mixed = across @ last
    first.baddbmm_(mixed, across.mT)
    torch.neg(mixed, out=upper)
    lower.copy_(upper.mT)
    return matrix


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of positive definite matrices, [groups, n, n]."""
    half = matrix.shape[-1] // 2
    if half < _SMALL // 2 + 1:
        small: Tensor = torch.linalg.cholesky(matrix)
        return small
    found = torch.zeros_like(matrix)
    found[:, :half, :half] = first = cholesky(matrix[:, :half, :half])
    below = torch.linalg.solve_triangular(first.mT, matrix[:, half:, :half], upper=True, left=False)
    found[:, half:, :half] = below
    found[:, half:, half:] = cholesky(torch.baddbmm(matrix[:, half:, half:], below, below.mT, alpha=-1))
    return found
