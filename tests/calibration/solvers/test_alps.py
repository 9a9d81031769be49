"""Support and values found together."""

import itertools

import pytest
import torch

from secateur.calibration.moments import Moments, Piece
from secateur.calibration.solvers.alps import alps
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.refit import refit
from secateur.calibration.solvers.wanda import wanda
from secateur.calibration.supports import selector
from secateur.patterns import blocks, n_m, rows


def problem(groups=1, rows=16, inputs=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 200, inputs, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(groups, inputs, inputs, dtype=torch.float64, generator=generator)
    return torch.randn(groups, rows, inputs, generator=generator), Curvature(x.mT @ x)


def highest(count):
    """The highest of all scores, by a full sort."""

    def select(scores):
        kept = torch.zeros(scores.numel(), dtype=torch.bool)
        kept[scores.reshape(-1).argsort(stable=True)[scores.numel() - count :]] = True
        return kept.view(scores.shape)

    return select


def error(found, weights, curvature):
    difference = (found - weights) * curvature.scale
    return float(((difference @ curvature.matrix) * difference).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_it_is_better_than_wanda_with_a_refit_and_keeps_the_count(seed, share):
    weights, curvature = problem(groups=2, seed=seed)
    count = int(share * weights.numel())
    found, kept = alps(weights, curvature, highest(count))
    assert int(kept.sum()) == count
    assert found[~kept].eq(0).all()
    assert not found[~kept].signbit().any()
    _, other = wanda(weights, curvature, highest(count))
    best = refit(weights, weights, other, curvature)
    assert error(found, weights, curvature) < 0.97 * error(best, weights, curvature)


def test_a_small_problem_comes_near_to_the_best_of_all_supports():
    weights, curvature = problem(rows=1, inputs=10, seed=4)
    found, _ = alps(weights, curvature, highest(4))
    errors = []
    for support in itertools.combinations(range(10), 4):
        kept = torch.zeros_like(weights, dtype=torch.bool)
        kept[..., list(support)] = True
        errors.append(error(refit(weights, weights, kept, curvature), weights, curvature))
    assert error(found, weights, curvature) <= 1.1 * min(errors) < 0.9 * sorted(errors)[10]


def test_nothing_to_prune_changes_nothing():
    weights, curvature = problem()
    assert alps(weights, curvature, highest(weights.numel()))[0].equal(weights)
    assert alps(weights, curvature, highest(0))[0].eq(0).all()


def test_weights_of_dead_inputs_go_first_and_cost_nothing():
    weights, _ = problem(inputs=4)
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    found, kept = alps(weights, Curvature((x.T @ x)[None]), highest(48))
    assert not kept[..., 2].any()
    assert kept.sum() == 48
    torch.testing.assert_close(found[..., [0, 1, 3]], weights[..., [0, 1, 3]], rtol=1e-4, atol=1e-5)
    nothing = Curvature(torch.zeros(1, 4, 4, dtype=torch.float64))
    assert alps(weights, nothing, highest(20))[1].sum() == 20


def test_the_random_numbers_of_torch_are_left_alone_and_two_runs_are_equal():
    weights, curvature = problem()
    state = torch.get_rng_state()
    first, second = (alps(weights, curvature, highest(80))[0] for _ in range(2))
    assert first.equal(second)
    assert torch.get_rng_state().equal(state)


def test_the_number_of_threads_does_not_matter():
    weights, curvature = problem(rows=64, inputs=128)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(alps(weights, curvature, highest(2048)))
    finally:
        torch.set_num_threads(before)
    one, two = (error(weights_of, weights, curvature) for weights_of, _ in found)
    assert one == pytest.approx(two, rel=1e-3)  # small products may differ in a bit, and that in a weight
    assert int((found[0][1] ^ found[1][1]).sum()) < 2048 / 50


@pytest.mark.parametrize("pattern", [n_m(2, 4), n_m(1, 8), blocks(4, 4), rows])
def test_patterns_hold_and_it_beats_wanda_with_a_refit(pattern):
    weights, curvature = problem(rows=16, inputs=32)
    moments = Moments((Piece("w", 0, 16),), torch.zeros(1, 32, 32), torch.ones(1))
    zeros = int(weights.numel() * (pattern.sparsity or 0.5))
    select = selector(moments, {"w": (16, 32)}, weights, zeros, pattern=pattern)
    found, kept = alps(weights, curvature, select)
    assert int((~kept).sum()) == zeros
    assert found[~kept].eq(0).all()
    legal = pattern.expand(pattern.reduce(kept[0].float(), zeros).reshape(-1) > 0, torch.Size((16, 32)))
    assert kept[0].equal(legal & kept[0])
    if pattern != rows:  # whose outputs nothing can make up for
        _, other = wanda(weights, curvature, select)
        best = refit(weights, weights, other, curvature)
        assert error(found, weights, curvature) <= error(best, weights, curvature)
