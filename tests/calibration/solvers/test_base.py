"""What is true for all solvers, and how they are chosen."""

import pytest
import torch

from secateur.calibration.solvers.base import SOLVERS, solver
from secateur.calibration.solvers.curvature import Curvature
from secateur.errors import InputError


def curvature(inputs=3):
    return Curvature(torch.eye(inputs, dtype=torch.float64)[None])


def test_what_goes_is_plus_zero_whatever_a_solver_leaves():
    @solver("negative")
    def negative(weights, curvature, select):
        return -weights.abs(), select(weights)

    try:
        found, kept = SOLVERS.find("negative")(torch.ones(1, 2, 3), curvature(), lambda scores: scores < 0)
        assert not kept.any()
        assert not found.signbit().any()
    finally:
        del SOLVERS._choices["negative"]


def test_nan_and_inf_are_refused():
    for name in SOLVERS:
        with pytest.raises(InputError, match="repair"):
            SOLVERS.find(name)(torch.tensor([[[1.0, float("nan"), 2.0]]]), curvature(), lambda s: s > 0)


def test_a_name_stands_for_one_solver():
    with pytest.raises(InputError, match="another name"):
        solver("wanda")(lambda weights, curvature, select: (weights, select(weights)))
    with pytest.raises(InputError, match="magnitude"):
        SOLVERS.find("obs")
