"""The ways that are tried: the asked one first, the quick one beside the default."""

import torch
from torch import nn

import secateur as sc
from secateur.calibration.matrices import matrices
from secateur.calibration.solvers import SOLVERS
from secateur.calibration.supports import selector
from secateur.calibration.ways import Solutions, fast, ways


def names(*args):
    return [way.name for way in ways(*args)]


def test_which():
    assert names(SOLVERS.find("alps"), "full") == ["alps", "wanda with refit"]
    assert names(SOLVERS.find("alps"), "fast") == ["wanda with refit"]
    assert names(SOLVERS.find("magnitude"), "full") == ["magnitude"]
    assert ways(SOLVERS.find("wanda"), "full")[0].within == "row"


def test_fast_is_wanda_with_better_values():
    model = nn.Linear(16, 8)
    stats = sc.calibrate(model, [torch.randn(64, 16).cumsum(1)])
    (matrix,) = matrices(sc.weights(model), stats.moments)

    def select(part, within):
        return selector(part.moments, part.shapes, part.weights(), 64, within=within)

    way = ways(SOLVERS.find("alps"), "fast")[0]
    ((part, weights, kept),) = Solutions([matrix], select).of(way)
    assert part is matrix
    wanda, chosen = SOLVERS.find("wanda")(matrix.weights(), matrix.curvature, select(matrix, "row"))
    assert torch.equal(kept, chosen)
    assert matrix.loss(weights) < matrix.loss(wanda)
    assert torch.equal(fast(matrix.weights(), matrix.curvature, select(matrix, "row"))[0], weights)
