"""secateur.patterns on what layers compute: outputs and inputs as the layer means them; groups that span tensors."""

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, PatternError


class Experts(nn.Module):
    """Fused experts, [experts, outputs, inputs] or turned."""

    def __init__(self, turned):
        super().__init__()
        up, down = ((3, 8, 20), (3, 10, 8)) if turned else ((3, 20, 8), (3, 8, 10))
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
        self.is_transposed = turned


LAYERS = {  # a layer; and its weights as matrices [outputs, inputs * kernel], by name, by hand
    "linear": (lambda: nn.Linear(8, 12), {"weight": lambda w: w}),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3), {"weight": lambda w: w.flatten(1)}),
    "conv2d, groups": (lambda: nn.Conv2d(16, 12, 3, groups=2), {"weight": lambda w: w.flatten(1)}),
    "conv3d": (lambda: nn.Conv3d(8, 12, 2), {"weight": lambda w: w.flatten(1)}),
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 12, 3), {"weight": lambda w: w.transpose(0, 1).flatten(1)}),
    "transposed 2d, groups": (
        lambda: nn.ConvTranspose2d(16, 12, 3, groups=2),
        {"weight": lambda w: torch.cat([half.transpose(0, 1).flatten(1) for half in w.chunk(2)])},
    ),
    "transposed 3d, groups": (
        lambda: nn.ConvTranspose3d(32, 8, 2, groups=4),
        {"weight": lambda w: torch.cat([part.transpose(0, 1).flatten(1) for part in w.chunk(4)])},
    ),
    "lstm": (lambda: nn.LSTM(8, 4), {"weight_ih_l0": lambda w: w, "weight_hh_l0": lambda w: w}),
    "gru": (lambda: nn.GRU(8, 4, bidirectional=True), {"weight_ih_l0_reverse": lambda w: w}),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"in_proj_weight": lambda w: w, "out_proj.weight": lambda w: w}),
    "experts": (lambda: Experts(False), {"gate_up_proj": lambda w: w.flatten(0, 1)}),
    "experts, turned": (lambda: Experts(True), {"gate_up_proj": lambda w: w.transpose(1, 2).flatten(0, 1)}),
}


def pruned(kind, pattern):
    torch.manual_seed(0)
    make, matrices = LAYERS[kind]
    layer = make()
    masks = sc.prune(layer, 0.5, pattern=pattern, scope=sc.weights(layer, only=list(matrices)), allocation="uniform")
    assert sc.check(layer, masks) == {}
    return layer, {name: (matrix(masks[name]), matrix) for name, matrix in matrices.items()}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_outputs(kind):
    _, found = pruned(kind, "rows")
    for name, (mask, matrix) in found.items():
        assert int((~mask).all(1).sum()) == len(mask) // 2, name
        assert (mask.all(1) | (~mask).all(1)).all(), name
        torch.manual_seed(0)
        dense = matrix(dict(LAYERS[kind][0]().named_parameters())[name].detach().abs()).mean(1)
        assert dense[~mask.any(1)].max() < dense[mask.any(1)].min()


@pytest.mark.parametrize("kind", LAYERS)
def test_n_m_runs_along_the_inputs(kind):
    _, found = pruned(kind, "2:4")
    for name, (mask, _) in found.items():
        inputs = 4 if name == "weight_hh_l0" else 8
        by_input = mask.reshape(len(mask), inputs, -1).movedim(1, -1)
        assert (by_input.reshape(*by_input.shape[:2], -1, 4).sum(-1) == 2).all(), name


@pytest.mark.parametrize("kind", LAYERS)
def test_columns_are_inputs(kind):
    _, found = pruned(kind, "columns")
    for name, (mask, _) in found.items():
        inputs = 4 if name == "weight_hh_l0" else 8
        by_input = mask.reshape(len(mask), inputs, -1).transpose(0, 1).flatten(1)
        assert int((~by_input).all(1).sum()) == inputs // 2, name
        assert (by_input.all(1) | (~by_input).all(1)).all(), name


@pytest.mark.parametrize("kind", LAYERS)
def test_blocks_are_outputs_by_inputs(kind):
    _, found = pruned(kind, "4x2")
    for name, (mask, _) in found.items():
        inputs = 4 if name == "weight_hh_l0" else 8
        tiles = mask.reshape(len(mask) // 4, 4, inputs // 2, 2, -1).permute(0, 2, 4, 1, 3).flatten(3)
        assert (tiles.all(-1) | (~tiles).all(-1)).all(), name
        assert int((~mask).sum()) == mask.numel() // 2, name


def test_rows_of_a_transposed_convolution_are_dead_outputs():
    torch.manual_seed(0)
    for make, size in ((nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)):
        layer = make(8, 6, 3, bias=False, groups=2)
        sc.prune(layer, 0.5, pattern="rows")
        out = layer(torch.randn(4, 8, *[5] * size)).transpose(0, 1).flatten(1)
        assert int((out == 0).all(1).sum()) == 3


def test_a_text_says_what_an_object_says():
    for text, pattern, sparsity in (
        ("2:4", sc.n_m(2, 4), 0.5),
        ("1:4", sc.n_m(1, 4), 0.75),
        ("4x2", sc.blocks(4, 2), 0.5),
    ):
        torch.manual_seed(0)
        layer = nn.Linear(16, 8)
        other = nn.Linear(16, 8)
        other.load_state_dict(layer.state_dict())
        assert sc.prune(layer, sparsity, pattern=text) == sc.prune(other, sparsity, pattern=pattern)
    for text, remedy in (
        ("4:4", "0 < n < m"),
        ("0x2", "at least 1"),
        ("2:4:8", "choose free, 2:4"),
        ("", "choose free"),
    ):
        with pytest.raises(InputError, match=remedy):
            sc.prune(layer, 0.5, pattern=text)


@pytest.mark.parametrize("score", ["magnitude", lambda name, weight: weight.square()])
def test_a_row_with_one_zero_does_not_go_before_rows_of_small_weights(score):
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor([[0.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    masks = sc.prune(layer, 1 / 3, pattern="rows", score=score)
    assert masks["weight"].any(1).tolist() == [True, False, True]


def test_rows_of_zeros_go_first_by_any_score():
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    masks = sc.prune(layer, 1 / 3, pattern="rows", score=lambda name, weight: -weight.abs())
    assert masks["weight"].any(1).tolist() == [True, False, True]


@dataclass(frozen=True)
class PerRow:
    """The lowest of each row: every output loses the same number, to one."""

    sparsity = None
    rowwise = True

    def legal(self, shape):
        return math.prod(shape)

    def check(self, name, shape):
        if len(shape) < 2:
            raise PatternError(f"{name} has no rows: leave it out of the scope")

    def group(self, shape):
        return 1

    def reduce(self, scores, count):
        rows = scores.flatten(1)
        rank = rows.argsort(dim=1, stable=True).argsort(dim=1)
        each, odd = divmod(count, len(rows))
        rows = torch.where(rank < each, rows.clamp(max=torch.finfo(rows.dtype).min), rows)  # these go before all others
        return torch.where(rank < each + (odd > 0), rows, math.inf).view(scores.shape)

    def expand(self, kept, shape):
        return kept.view(shape)


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.8])
def test_the_lowest_of_each_row(sparsity, allocation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 10), nn.ConvTranspose1d(10, 6, 2))
    with torch.no_grad():
        model[0].weight[0] *= 100  # a row that a plain ranking would leave alone
    masks = sc.prune(model, sparsity, pattern=PerRow(), allocation=allocation)
    assert masks.pruned == math.floor(Fraction(str(sparsity)) * 360 + Fraction(1, 2))
    for name, mask in masks.items():
        lost = (~(mask.transpose(0, 1) if mask.ndim > 2 else mask).flatten(1)).sum(1)
        assert lost.max() - lost.min() <= 1, name
    assert not masks["0.weight"][0].all()


def test_the_lowest_of_each_row_on_a_schedule():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 10))
    pruner = sc.Pruner(model, 0.7, schedule=sc.linear(0, 6), pattern=PerRow(), allocation="uniform")
    for step in range(1, 7):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(8, 20) * 0.1)
        pruner.step()
        assert pruner.masks.pruned == math.floor(Fraction(7, 60) * step * 240 + Fraction(1, 2))
        lost = (~pruner.masks["0.weight"]).sum(1)
        assert lost.max() - lost.min() <= 1
    pruner.finish()
