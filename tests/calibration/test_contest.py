"""The best of several ways wins, judged in the whole model; without a judge the first."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration.contest import Contest, Judge
from secateur.calibration.matrices import Draft, matrices
from secateur.calibration.solvers import SOLVERS
from secateur.calibration.ways import Way


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    stats = sc.calibrate(model, [torch.randn(20, 6) for _ in range(5)])
    return model, stats, sc.weights(model), matrices(sc.weights(model), stats.moments)


def entered(contest, matrix):
    dense = matrix.weights()
    for name, share in (("bad", -1.0), ("good", 0.9), ("worse", 0.0)):
        kept = dense != 0
        weights = dense.clone()
        weights[:, :3] *= share
        contest.enter(Way(name, SOLVERS.find("magnitude")), [(matrix, weights, kept)])
    return contest


def test_best(parts):
    model, stats, scope, (matrix,) = parts
    before = model.weight.detach().clone()
    contest = entered(Contest(Judge(model, stats, scope, None), Draft()), matrix)
    found = contest.result(scope)
    assert torch.equal(model.weight, before)
    assert found.way == "good"
    assert list(found.tried) == ["bad", "good", "worse"]
    assert max(found.tried, key=found.tried.get) == "good"
    assert found.losses["weight"] == (0, 24, pytest.approx(0.01, rel=0.5))
    assert "good: " in str(found)


def test_metric_of_the_user(parts):
    model, stats, scope, (matrix,) = parts
    judge = Judge(model, stats, scope, lambda candidate: -candidate.weight.detach().sum().abs())
    assert entered(Contest(judge, Draft()), matrix).result(scope).way != ""


def test_without_a_judge_the_first(parts):
    model, _, scope, (matrix,) = parts
    stats = sc.calibrate(
        model, [torch.randn(20, 6)], loss=lambda model, batch: model(batch).square().mean()
    )  # batches that only a loss knows how to use
    judge = Judge(model, stats, scope, None)
    assert not judge
    found = entered(Contest(judge, Draft()), matrix).result(scope)
    assert (found.way, dict(found.tried)) == ("bad", {})
