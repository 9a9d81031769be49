"""Architectures of many kinds, shrunk and judged by a judge that knows nothing of how."""

import copy

import pytest
import torch
from benchmarks.structure_judge import Wrong, count, judge, tag
from torch import nn

import secateur as sc
from structure.architectures import KINDS, build

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_fast_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the judge sees each call
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("sparsity", [0.3, pytest.param(0.43, marks=SLOW), 0.5, pytest.param(0.7, marks=SLOW)])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_original_with_units_removed(name, sparsity):
    model, inputs = build(name)
    tag(model)
    before = copy.deepcopy(model.state_dict())
    small = sc.shrink(model, inputs, sparsity)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    gone = judge(model, small, inputs, KINDS[name].limit)
    half = 1 - count(build(name, 0.5)[0]) / count(model)
    meant = half * (1 - (1 - sparsity) ** 2) / 0.75  # as much of it as where both sides of each matrix shrink
    assert gone > 0
    assert KINDS[name].least - 0.02 <= gone / meant
    if sparsity == 0.5:
        assert gone / meant <= 1.15


class Pair(nn.Module):
    def __init__(self, hidden=8, tied=False):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, 4)
        if tied:
            self.b.weight = nn.Parameter(torch.randn(4, hidden))
            self.a.weight = self.b.weight

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def halves(rows_of_b=slice(0, 4), scale=1.0):
    """A pair, and half of it made by hand: right as it stands."""
    torch.manual_seed(0)
    model, small = Pair(), Pair(4)
    tag(model)
    with torch.no_grad():
        for name, p in small.named_parameters():
            source = dict(model.named_parameters())[name]
            p.copy_(source[:, rows_of_b] * scale if name == "b.weight" else source[: len(p)])
    return model, small


def test_the_judge_lets_a_right_model_pass():
    assert judge(*halves(), (torch.randn(3, 4),)) == pytest.approx(1 - 48 / 92)


def test_the_judge_finds_units_that_do_not_belong_together():
    with pytest.raises(Wrong, match="differs from the masked original"):
        judge(*halves(slice(1, 5)), (torch.randn(3, 4),))


def test_the_judge_finds_values_that_are_new():
    with pytest.raises(Wrong, match="holds values that the original has not"):
        judge(*halves(scale=1.01), (torch.randn(3, 4),))


def test_the_judge_finds_ties_that_came_apart():
    model = Pair(4, tied=True)
    tag(model)
    torn = copy.deepcopy(model)
    torn.b.weight = nn.Parameter(torn.b.weight.detach().clone())
    with pytest.raises(Wrong, match="tied were"):
        judge(model, torn, (torch.randn(3, 4),))


def test_the_judge_finds_another_class():
    model = halves()[0]
    with pytest.raises(Wrong, match="Pair became Sequential"):
        judge(model, nn.Sequential(nn.Linear(4, 4)), (torch.randn(3, 4),))
