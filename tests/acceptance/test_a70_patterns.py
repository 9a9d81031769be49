"""A70: a pattern follows what a layer computes, not how it stores its weight."""

import pytest
import torch
from torch import nn

import secateur as sc

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", TRANSPOSED)
def test_a70_rows_of_a_transposed_convolution_are_dead_outputs(dims, groups):
    torch.manual_seed(0)
    layer = TRANSPOSED[dims](8, 8, 3, groups=groups, bias=False)
    sc.prune(layer, 0.5, pattern="rows")
    out = layer(torch.randn(2, 8, *[4] * dims)).transpose(0, 1).flatten(1)
    assert int((out == 0).all(1).sum()) == 4


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", TRANSPOSED)
def test_a70_columns_of_a_transposed_convolution_are_inputs_that_change_nothing(dims, groups):
    torch.manual_seed(0)
    layer = TRANSPOSED[dims](8, 8, 3, groups=groups, bias=False)
    masks = sc.prune(layer, 0.5, pattern="columns")
    dead = (~masks["weight"].flatten(1)).all(1)
    assert int(dead.sum()) == 4
    x = torch.randn(2, 8, *[4] * dims)
    other = x.clone()
    other[:, dead] = 9.0
    assert torch.equal(layer(x), layer(other))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", TRANSPOSED)
def test_a70_n_m_runs_along_the_inputs_of_each_output(dims, groups):
    torch.manual_seed(0)
    layer = TRANSPOSED[dims](8, 6, 3, groups=groups, bias=False)
    mask = sc.prune(layer, 0.5, pattern="2:4")["weight"]
    for part in mask.chunk(groups):  # [inputs, outputs / groups, *kernel]
        by_four = part.movedim(0, -1).unflatten(-1, (-1, 4))
        assert (by_four.sum(-1) == 2).all()


def test_a70_rows_of_conv1d_of_transformers_are_outputs():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layer = nn.Sequential(conv1d(8, 16))
    sc.prune(layer, 0.5, pattern="rows")
    assert int((layer[0].weight == 0).all(0).sum()) == 4


def test_a70_rows_of_a_recurrent_layer_are_those_of_its_gates():
    torch.manual_seed(0)
    layer = nn.LSTM(8, 6)
    masks = sc.prune(layer, 0.5, pattern="rows", allocation="uniform")
    for mask in masks.values():
        assert int((~mask.any(1)).sum()) == 12  # of the 24: 4 gates of 6 units
