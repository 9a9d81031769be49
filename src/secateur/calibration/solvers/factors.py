"""Inverses and factors of positive definite matrices, by products of halves.

LAPACK's own give other last bits with another number of threads, and one bit can turn the choice between two weights.
Products do not, and they are quicker.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 32
"""Up to here LAPACK works with one thread."""


def inverse(matrix: Tensor) -> Tensor:
    """The inverse of positive definite matrices, [groups, n, n]."""
    half = matrix.shape[-1] // 2
    if half < _SMALL // 2 + 1:
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    first = inverse(matrix[:, :half, :half])
    across = first @ matrix[:, :half, half:]
    last = inverse(torch.baddbmm(matrix[:, half:, half:], matrix[:, half:, :half], across, alpha=-1))
    found = torch.empty_like(matrix)
    found[:, half:, half:] = last
    mixed = across @ last
    torch.neg(mixed, out=found[:, :half, half:])
    found[:, half:, :half] = found[:, :half, half:].mT
    found[:, :half, :half] = torch.baddbmm(first, mixed, across.mT)
    return found


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
