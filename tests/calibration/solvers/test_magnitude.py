"""The smallest weights go."""

import torch

from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.magnitude import magnitude


def test_the_smallest_go_and_the_others_stay_as_they_are():
    weights = torch.tensor([[[-3.0, 1.0, 2.0, -0.5]]])
    found, kept = magnitude(
        weights,
        Curvature(torch.eye(4, dtype=torch.float64)[None]),
        lambda scores: scores >= scores.sort().values[..., 2:3],
    )
    assert found.tolist() == [[[-3.0, 0.0, 2.0, 0.0]]]
    assert kept.tolist() == [[[True, False, True, False]]]
