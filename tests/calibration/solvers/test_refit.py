"""The best values on a given support."""

import pytest
import torch

from secateur.calibration.solvers.curvature import DAMPING, OWN_DAMPING, Curvature
from secateur.calibration.solvers.refit import refit


def problem(groups=2, rows=6, inputs=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 60, inputs, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(groups, inputs, inputs, dtype=torch.float64, generator=generator)
    weights = torch.randn(groups, rows, inputs, generator=generator)
    kept = torch.rand(groups, rows, inputs, generator=generator) < 0.4
    return x.mT @ x, weights, kept


def exact(gram, target, kept):
    """Row by row, by the normal equations of the damped matrix."""
    found = torch.zeros_like(target, dtype=torch.float64)
    for g in range(len(gram)):
        h = gram[g] + DAMPING * gram[g].diagonal().mean() * torch.eye(gram.shape[-1])
        h += OWN_DAMPING * torch.diag(gram[g].diagonal())
        for r in range(target.shape[1]):
            on = kept[g, r]
            found[g, r, on] = torch.linalg.solve(h[on][:, on], h[on] @ target[g, r].double())
    return found.float()


def test_many_steps_are_the_exact_least_squares_solution():
    gram, target, kept = problem()
    found = refit(target, target, kept, Curvature(gram), steps=60)
    torch.testing.assert_close(found, exact(gram, target, kept), rtol=1e-2, atol=1e-3)
    assert found[~kept].eq(0).all()
    assert not found[~kept].signbit().any()


@pytest.mark.parametrize("steps", [1, 2, 5, 15])
def test_each_step_lowers_the_error_of_each_output(steps):
    gram, target, kept = problem(seed=1)
    curvature = Curvature(gram)

    def error(weights):
        difference = (weights - target) * curvature.scale
        return ((difference @ curvature.matrix) * difference).sum(-1)

    fewer = refit(target, target, kept, curvature, steps=steps - 1)
    assert (error(refit(target, target, kept, curvature, steps=steps)) <= error(fewer) * (1 + 1e-5)).all()


def test_the_best_stays_bit_for_bit():
    gram, target, kept = problem()
    assert refit(target, target, torch.ones_like(kept), Curvature(gram)).equal(target)
    nothing = torch.zeros_like(gram)
    assert refit(target, target, kept, Curvature(nothing)).equal(target.masked_fill(~kept, 0.0))


def test_a_row_of_which_nothing_stays_is_zero():
    gram, target, kept = problem()
    kept[0, 0] = False
    assert refit(target, target, kept, Curvature(gram))[0, 0].eq(0).all()
