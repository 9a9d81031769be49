"""Operands of functions of torch, recognised as rows of a weight."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration.reading import Held, Weights


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 5))
        self.down_proj = nn.Parameter(torch.zeros(3, 5, 4))


def weights(model):
    return Weights(sc.weights(model).members)


LINEAR = nn.Linear(5, 6, bias=False)
KNOWN = weights(LINEAR)
VIEWS = {
    "whole": (lambda w: w, "oi", (0, 6)),
    "detached": (lambda w: w.detach(), "oi", (0, 6)),
    "turned": (lambda w: w.T, "io", (0, 6)),
    "rows": (lambda w: w[2:5], "oi", (2, 5)),
    "a chunk": (lambda w: w.chunk(3)[1], "oi", (2, 4)),
    "one row": (lambda w: w[3:4], "oi", (3, 4)),
    "one row, without its dimension": (lambda w: w[3], "i", (3, 4)),
    "with a dimension more": (lambda w: w[None, 1:3], "goi", (1, 3)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_recognised(name):
    view, letters, rows = VIEWS[name]
    held = KNOWN.held(view(LINEAR.weight), letters)
    assert (held.name, held.start, held.stop, held.groups) == ("weight", *rows, 1)
    assert held.inputs == (letters.index("i"),)


@pytest.mark.parametrize(
    ("view", "letters"),
    [
        (lambda w: w[::2], "oi"),  # every other row
        (lambda w: w[:, 1:], "oi"),  # some of the inputs
        (lambda w: w, "io"),  # the other way round
        (lambda w: w.clone(), "oi"),  # a copy
        (lambda w: w.view(5, 6), "oi"),
        (lambda w: w.view(2, 3, 5), "goi"),
        (lambda w: torch.zeros(6, 5), "oi"),
        (lambda w: None, "oi"),
    ],
)
def test_others_are_not(view, letters):
    assert KNOWN.held(view(LINEAR.weight), letters) is None


def test_experts_are_rows_of_one_matrix():
    model = Experts()
    known = weights(model)
    assert known.matrices == {"gate_up_proj": (3, 8), "down_proj": (3, 5)}
    assert known.held(model.gate_up_proj, "goi") == Held("gate_up_proj", 0, 24, 3, (2,))
    assert known.held(model.gate_up_proj[1], "oi") == Held("gate_up_proj", 8, 16, 1, (1,))
    assert known.held(model.gate_up_proj[1].chunk(2)[1], "oi") == Held("gate_up_proj", 12, 16, 1, (1,))
    assert known.held(model.down_proj[1:], "goi") == Held("down_proj", 5, 15, 2, (2,))
    assert known.held(model.gate_up_proj[:, :4], "goi") is None  # rows that do not follow one another


def test_a_kernel_is_recognised_as_a_whole():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2))
    known = weights(model)
    assert known.kernel(model[0].weight) == Held("0.weight", 0, 6, 2, ())
    assert known.kernel(model[1].weight.detach()) == Held("1.weight", 0, 6, 2, ())
    assert known.kernel(model[0].weight[1:]) is None
    assert known.kernel(torch.zeros(6, 2, 3, 3)) is None


def test_weights_that_lie_in_one_memory_are_told_apart():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    together = torch.zeros(12)
    model[0].weight.data = together[:6].view(2, 3)
    model[1].weight.data = together[6:].view(3, 2)
    known = weights(model)
    assert known.held(model[0].weight, "oi") == Held("0.weight", 0, 2, 1, (1,))
    assert known.held(model[1].weight, "oi") == Held("1.weight", 0, 3, 1, (1,))
