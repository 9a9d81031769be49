"""The scaled and damped Gram matrix."""

import pytest
import torch

from secateur.calibration.solvers.curvature import DAMPING, OWN_DAMPING, Curvature
from secateur.errors import InputError


def gram(groups=2, inputs=5, dead=()):
    x = torch.randn(groups, 40, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[..., list(dead)] = 0
    return x.mT @ x


def test_scaled_weights_have_the_error_of_the_damped_matrix():
    found, h = Curvature(gram()), gram()
    w = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = h + DAMPING * mean[:, None, None] * torch.eye(5)
    damped += OWN_DAMPING * torch.diag_embed(h.diagonal(dim1=-2, dim2=-1))
    expected = ((w.double() @ damped) * w).sum((1, 2))
    scaled = w * found.scale
    torch.testing.assert_close(((scaled @ found.matrix) * scaled).sum((1, 2)).double(), expected, rtol=1e-5, atol=0)
    assert found.matrix.diagonal(dim1=-2, dim2=-1).eq(1).all()


def test_dead_inputs_are_told_and_nothing_is_divided_by_zero():
    found = Curvature(gram(dead=[1, 3]))
    assert found.dead.squeeze(1).tolist() == [[False, True, False, True, False]] * 2
    nothing = Curvature(torch.zeros(1, 3, 3, dtype=torch.float64))
    assert nothing.dead.all()
    assert nothing.scale.eq(1).all()
    assert nothing.matrix.equal(torch.eye(3)[None])


def test_nan_is_refused():
    with pytest.raises(InputError, match="batches"):
        Curvature(torch.full((1, 2, 2), float("nan"), dtype=torch.float64))
