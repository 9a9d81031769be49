import pytest
import torch
from torch import nn

import secateur as sc


class Residual(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c, self.function = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3), function

    def forward(self, x):
        y = self.a(x)
        return self.c(self.function(y, self.b(y)))


def widths(function):
    torch.manual_seed(0)
    small = sc.shrink(Residual(function).eval(), torch.randn(4, 6), 0.5)
    return small.a.out_features, small.b.out_features


@pytest.mark.parametrize(
    "function",
    [
        lambda y, z: y + z,
        lambda y, z: torch.where(y > 0, y, z),
        lambda y, z: torch.maximum(y, z).tanh(),
        lambda y, z: torch.addcmul(y, y, z),
        lambda y, z: torch.zeros_like(y) + y - z.sum(-1, keepdim=True),
        lambda y, z: y * z.norm(dim=-1, keepdim=True),
    ],
)
def test_equal_positions_are_one_unit(function):
    assert widths(function) == (8, 8)


@pytest.mark.parametrize("name", ["cumsum", "logcumsumexp"])
def test_along_a_dimension_positions_stay(name):
    with pytest.raises(sc.errors.StructureError, match=name):
        widths(lambda y, z: y + getattr(z, name)(-1))


def test_a_softmax_may_run_over_the_units_that_stay():
    assert widths(lambda y, z: y + z.softmax(-1)) == (8, 8)


def test_a_buffer_of_zeros_has_any_size():
    assert widths(lambda y, z: y + z + torch.zeros(y.shape)) == (8, 8)
