import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.structure import rules
from secateur.structure.allocation import ALLOCATIONS
from secateur.structure.capture import capture
from secateur.structure.groups import Groups
from secateur.structure.policy import Policy

assert rules


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Block(16), Block(12), nn.Linear(8, 2)).eval()


X = torch.randn(3, 4)


def pools(name):
    model = net()
    groups = Groups(capture(model, [((X,), {})], Policy()))
    return [len(cell) for cell in groups.cells], list(ALLOCATIONS.find(name)(groups, model))


def test_uniform_compares_none():
    assert pools("uniform") == ([16, 12, 8], [0, 1, 2])


def test_global_compares_all():
    assert pools("global")[1] == [0, 0, 0]


def test_hidden_layers_of_equal_blocks_are_isomorphic_and_the_residual_is_not():
    first, second, residual = pools("isomorphic")[1]
    assert first == second != residual


def widths(allocation, share=0.5, **options):
    model = net()
    model[1].up.weight.data *= 0.01
    model[1].up.bias.data *= 0.01
    model[1].down.weight.data *= 0.01
    small = sc.shrink(model, X, share, allocation=allocation, **options)
    return small[1].up.out_features, small[2].up.out_features, small[0].out_features


def test_the_lowest_of_a_pool_go_and_one_of_each_cell_stays():
    assert widths("uniform") == (8, 6, 4)
    assert widths("isomorphic") == (2, 12, 4)
    assert widths("global") == (1, 9, 8)
    assert widths("global", min_width=3)[0] == 3


def test_an_unknown_allocation_or_none():
    with pytest.raises(InputError, match="choose uniform, global, isomorphic, or a function"):
        sc.shrink(net(), X, 0.5, allocation="erk")
    assert sc.shrink(net(), X, 0.5, allocation=lambda groups, model: [0, 0, 1])[0].out_features == 4
