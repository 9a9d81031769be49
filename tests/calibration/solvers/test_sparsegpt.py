"""Column by column, each error made up for by the columns that follow."""

import pytest
import torch

from secateur.calibration.moments import Moments, Piece
from secateur.calibration.solvers import sparsegpt as room
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.sparsegpt import sparsegpt
from secateur.calibration.solvers.wanda import wanda
from secateur.calibration.supports import selector
from secateur.patterns import blocks, n_m


def problem(groups=2, rows=8, inputs=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 300, inputs, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(groups, inputs, inputs, dtype=torch.float64, generator=generator)
    return torch.randn(groups, rows, inputs, generator=generator), Curvature(x.mT @ x)


def choose(weights, zeros, pattern=None, within="matrix"):
    groups, rows, inputs = weights.shape
    moments = Moments((Piece("w", 0, groups * rows),), torch.zeros(groups, inputs, inputs), torch.ones(groups))
    return selector(moments, {"w": (groups * rows, inputs)}, weights, zeros, pattern=pattern, within=within)


def error(found, weights, curvature):
    difference = (found - weights) * curvature.scale
    return float(((difference @ curvature.matrix) * difference).sum())


@pytest.mark.parametrize("columns", [8, 12, 128])
@pytest.mark.parametrize(
    ("zeros", "pattern", "within"),
    [(300, None, "matrix"), (300, None, "row"), (256, n_m(2, 4), "matrix"), (256, blocks(2, 8), "matrix")],
)
def test_counts_are_exact_over_all_blocks_and_it_beats_wanda(monkeypatch, columns, zeros, pattern, within):
    monkeypatch.setattr(room, "COLUMNS", columns)
    weights, curvature = problem()
    found, kept = sparsegpt(weights, curvature, choose(weights, zeros, pattern, within))
    assert int((~kept).sum()) == zeros
    assert found[~kept].eq(0).all()
    assert not found[~kept].signbit().any()
    if columns < 32 and pattern != blocks(2, 8):  # the fewer are decided at once, the better they follow the updates
        other, _ = wanda(weights, curvature, choose(weights, zeros, pattern, within))
        assert error(found, weights, curvature) < 0.8 * error(other, weights, curvature)
    if pattern == n_m(2, 4):
        assert kept.unflatten(-1, (8, 4)).sum(-1).eq(2).all()


def test_one_column_gone_is_made_up_for_as_the_optimal_brain_surgeon_says():
    weights, curvature = problem(groups=1, rows=1, inputs=6)
    kept = torch.tensor([[[False, True, True, True, True, True]]])
    found, _ = sparsegpt(weights, curvature, lambda scores: kept)
    inverse = torch.linalg.inv(curvature.matrix[0].double())
    scaled = (weights * curvature.scale)[0, 0].double()
    expected = scaled - scaled[0] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(found[0, 0], (expected / curvature.scale[0, 0]).float(), rtol=1e-3, atol=1e-4)


def test_nothing_to_prune_changes_nearly_nothing():
    weights, curvature = problem()
    found, kept = sparsegpt(weights, curvature, choose(weights, 0))
    assert kept.all()
    torch.testing.assert_close(found, weights)


def test_two_loud_inputs_that_say_the_same_are_no_trouble():
    x = torch.randn(400, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e4
    x[:, 1:40] = x[:, :1]
    weights = torch.randn(1, 8, 300, generator=torch.Generator().manual_seed(1))
    curvature = Curvature((x.T @ x)[None])
    found, kept = sparsegpt(weights, curvature, choose(weights, 1200))
    assert found.isfinite().all()
    assert error(found, weights, curvature) < 0.5 * error(weights.masked_fill(~kept, 0.0), weights, curvature)
