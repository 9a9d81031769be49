"""Inverses and factors by halves."""

import pytest
import torch

from secateur.calibration.solvers.factors import cholesky, invert_


def definite(n, groups=2):
    x = torch.randn(groups, 3 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return (x.mT @ x / n + 0.1 * torch.eye(n)).float()


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 34, 35, 67, 200])
def test_they_are_what_they_say(n):
    matrix, one = definite(n), torch.eye(n).expand(2, n, n)
    torch.testing.assert_close(invert_(matrix.clone()) @ matrix, one, rtol=0, atol=1e-4)
    found = cholesky(matrix)
    torch.testing.assert_close(found @ found.mT, matrix, rtol=1e-4, atol=1e-4)
    assert found.triu(1).eq(0).all()


def test_they_are_the_same_with_any_number_of_threads():
    matrix, before = definite(192, groups=1), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((invert_(matrix.clone()), cholesky(matrix)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)
