import importlib
import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, StructureError
from secateur.measurement import costs
from secateur.structure import rules
from secateur.structure.capture import capture
from secateur.structure.policy import Policy
from secateur.structure.targets import counted, parameters, products, search_time, time_left

assert rules


class Mixed(nn.Module):
    """A convolution in groups, a transposed one, a recurrent layer, attention, einsum of three: MACs of every kind."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 8, 3, groups=2), nn.ConvTranspose1d(8, 16, 3, stride=2)
        self.rnn = nn.LSTM(16, 12, num_layers=2, bidirectional=True)
        self.attention = nn.MultiheadAttention(24, 4)
        self.w, self.v = nn.Parameter(torch.randn(24, 10)), nn.Parameter(torch.randn(10, 6))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        y = self.rnn(self.b(self.a(x).relu()).permute(2, 0, 1))[0]
        y = self.attention(y, y, y)[0]
        return self.out(torch.einsum("tbi,ij,jk->tbk", y, self.w, self.v))


def test_macs_and_parameters_are_foreseen_without_a_cut():
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 4, 9)
    cap = capture(model, [((x,), {})], Policy())
    every = torch.ones(cap.ledger.size, dtype=torch.bool).numpy()
    assert products(cap)(every) == counted(model, [((x,), {})]) == costs.macs(model, ((x,), {}))["macs"]
    assert parameters(cap, model)(every) == sum(p.numel() for p in model.parameters())


def cnn():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)).eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def left(small, what):
    if what == "macs":
        return costs.macs(small, ((X,), {}))["macs"] / costs.macs(cnn(), ((X,), {}))["macs"]
    return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in cnn().parameters())


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("fraction", [0.7, 0.5, 0.2])
def test_a_fraction_remains(what, allocation, fraction):
    small = sc.shrink(cnn(), X, **{what: fraction}, allocation=allocation)
    assert left(small, what) == pytest.approx(fraction, abs=0.01)


def test_macs_of_several_examples_are_added_up():
    small = sc.shrink(cnn(), [X, torch.randn(1, 3, 16, 16)], macs=0.5)
    assert left(small, "macs") == pytest.approx(0.5, abs=0.02)


def test_a_target_out_of_reach_says_how_far_it_can_go_and_what_holds_it():
    with pytest.raises(StructureError, match=r"=0\.3 cannot be met: at least 1\.000 of .*holds it: .*as keep='3' asks"):
        sc.shrink(cnn(), X, params=0.3, keep="3")
    with pytest.raises(StructureError, match="cannot be met: at least"):
        sc.shrink(cnn(), X, macs=0.2, min_width=30)


class Coarse(nn.Module):
    """Three wide heads, and layers behind them that are as fine as one likes."""

    def __init__(self):
        super().__init__()
        self.attention, self.up, self.down = nn.MultiheadAttention(24, 3, batch_first=True), nn.Linear(24, 64), Net()

    def forward(self, x):
        return self.down(self.up(self.attention(x, x, x)[0]))


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.ReLU(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 2))


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize("fraction", [0.7, 0.5, 0.3])
def test_where_some_units_are_coarse_the_fine_ones_make_up_for_it(what, allocation, fraction):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 24), Coarse()).eval(), torch.randn(2, 7, 5)
    small = sc.shrink(model, x, **{what: fraction}, allocation=allocation)
    one, other = (
        costs.macs(m, ((x,), {}))["macs"] if what == "macs" else sum(p.numel() for p in m.parameters())
        for m in (small, model)
    )
    assert one / other == pytest.approx(fraction, abs=0.01)


def test_units_too_coarse_for_a_target():
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    with pytest.raises(StructureError, match=r"the nearest are 0\.5\d+ and 1\.000. Ask for one of these"):
        sc.shrink(model, torch.randn(1, 4), params=0.75)


def test_a_model_without_products_has_no_macs():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return (x * self.weight).sum(-1)

    with pytest.raises(InputError, match="Give params= or latency= instead"):
        sc.shrink(Scale(), torch.randn(2, 8), macs=0.5)


@pytest.mark.parametrize("amount", [0, 1, 1.5, -0.1, True, "half", math.nan])
def test_amounts(amount):
    with pytest.raises(InputError, match="give the fraction of the macs that remains, between 0 and 1"):
        sc.shrink(cnn(), X, macs=amount)


def test_one_amount_at_a_time():
    with pytest.raises(InputError, match=r"sparsity and macs are given together: .*give one of them"):
        sc.shrink(cnn(), X, 0.5, macs=0.5)
    with pytest.raises(InputError, match=r"params and latency are given together: .*give one"):
        sc.shrink(cnn(), X, params=0.5, latency=0.5)


def test_the_time_is_searched_in_a_few_measurements():
    asked, draw = [], torch.Generator().manual_seed(0)

    def curved(cost):
        asked.append(cost)
        return (0.1 + 0.9 * cost**0.7) * (1 + 0.04 * float(torch.randn((), generator=draw)))

    cost = search_time(0.5, "macs", curved, lambda cost: (0.1 + 0.9 * cost**0.7, cost))
    assert 0.1 + 0.9 * cost**0.7 == pytest.approx(0.5, abs=0.02)
    assert len(asked) <= 8


def test_a_time_that_cannot_be_met_tells_the_measured_ones():
    with pytest.raises(StructureError, match=r"latency=0\.3 cannot be met: .*0\.80 with macs=0\.01, .*Give one"):
        search_time(0.3, "macs", lambda cost: 0.8, lambda cost: (0.8, None))


def test_time_is_measured_side_by_side():
    wide, narrow = (nn.Sequential(nn.Linear(512, n), nn.Linear(n, 512)) for n in (4096, 64))
    assert time_left(wide, narrow, ((torch.randn(64, 512),), {}), 0.05) < 0.7


def test_a_fraction_of_the_time_remains(monkeypatch):
    def by_weights(model, small, example, seconds):
        return left(small, "params")

    monkeypatch.setattr(importlib.import_module("secateur.structure.shrink"), "time_left", by_weights)
    small = sc.shrink(cnn(), X, latency=0.5, round_to=2)
    assert left(small, "params") == pytest.approx(0.5, abs=0.05)
    assert small[0].out_channels % 2 == 0
