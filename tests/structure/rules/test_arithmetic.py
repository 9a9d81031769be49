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


@pytest.mark.parametrize(
    "function",
    [
        lambda y, z: y + torch.fft.irfft(torch.fft.rfft(z.expand(6, -1, -1), dim=0), 6, dim=0).sum(0),
        lambda y, z: y + torch.fft.fft2(z.expand(6, -1, -1), dim=(0, 1)).abs().sum(0),
        lambda y, z: y + torch.complex(y, z).abs(),
        lambda y, z: y + torch.view_as_real(torch.view_as_complex(torch.stack([y, z], -1)) * 1j).sum(-1),
    ],
)
def test_complex_numbers_keep_their_units(function):
    assert widths(function) == (8, 8)


@pytest.mark.parametrize("name", ["fft", "fftn", "fftshift"])
def test_positions_that_are_transformed_stay(name):
    with pytest.raises(sc.errors.StructureError, match=rf"fft_{name}.* Change the code at that place"):
        widths(lambda y, z: y + getattr(torch.fft, name)(z).real)


def test_complex_weights_are_cut():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(2, 16), nn.Linear(12, 3)
            self.w = nn.Parameter(torch.randn(16, 12, 4, dtype=torch.cfloat))

        def forward(self, x):
            y = torch.fft.rfft(self.a(x), dim=1)
            out = torch.zeros(len(x), y.shape[1], self.w.shape[1], dtype=y.dtype)
            out[:, :4] = torch.einsum("bki,iok->bko", y[:, :4], self.w)
            return self.c(torch.fft.irfft(out, dim=1))

    torch.manual_seed(0)
    small = sc.shrink(Spectral().eval(), torch.randn(2, 8, 2), 0.5)
    assert small.w.shape == (8, 6, 4)
    assert small.a.out_features == 8
    assert small.c.in_features == 6


def added_in_place(y, z):
    total = torch.zeros(y.shape)
    total += y
    return total.index_add_(0, torch.tensor([1, 0]), z[:2])


def test_what_is_added_to_zeros_in_place_is_real():
    assert widths(added_in_place) == (8, 8)
