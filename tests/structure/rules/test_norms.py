import pytest
import torch
from torch import nn

import secateur as sc


def scaled(norm):
    for p in norm.parameters():
        p.data = torch.rand_like(p) + 0.5
    return norm


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(16), nn.InstanceNorm2d(16, affine=True), nn.GroupNorm(4, 16), nn.GroupNorm(16, 16), nn.PReLU(16)],
)
def test_channels_go_with_their_norm(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), scaled(norm), nn.MaxPool2d(2), nn.Conv2d(16, 5, 1)).eval()
    small = sc.shrink(model, torch.randn(2, 3, 8, 8), 0.5)
    assert small[1].weight.shape == (8,)
    assert small[3].in_channels == 8


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.RMSNorm(16), nn.Softmax(-1)])
def test_statistics_run_over_the_units_that_stay(norm):
    torch.manual_seed(0)
    small = sc.shrink(nn.Sequential(nn.Linear(4, 16), scaled(norm), nn.Linear(16, 3)).eval(), torch.randn(2, 4), 0.5)
    assert small[0].out_features == 8
