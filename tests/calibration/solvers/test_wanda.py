"""Weights times the norms of what they read."""

import torch

from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.wanda import wanda


def highest(count):
    return lambda scores: scores >= scores.sort(-1, descending=True).values[..., count - 1 : count]


def test_the_norm_of_the_input_counts():
    gram = torch.diag(torch.tensor([1.0, 100.0, 1.0, 1.0], dtype=torch.float64))[None]
    weights = torch.tensor([[[3.0, 1.0, 2.0, -0.5]]])
    found, _ = wanda(weights, Curvature(gram), highest(2))
    assert found.tolist() == [[[3.0, 1.0, 0.0, 0.0]]]


def test_dead_inputs_go_first():
    gram = torch.diag(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))[None]
    found, _ = wanda(torch.tensor([[[1.0, 1000.0, 2.0]]]), Curvature(gram), highest(2))
    assert found.tolist() == [[[1.0, 0.0, 2.0]]]
