"""A refit of any mask: the zeros stay, the outputs come nearer to the dense model's, and it is the least squares."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration.fidelity import Fidelity
from secateur.errors import InputError, InputTypeError, MaskError, SecateurWarning, UnknownNameError


def inputs(count, width=24):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator)
    return [torch.randn(64, width, generator=generator).cumsum(-1) @ mix / 8 for _ in range(count)]


@pytest.fixture
def dense():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))


@pytest.mark.parametrize(
    "options", [{}, {"score": "random"}, {"pattern": sc.blocks(4, 4)}, {"pattern": "2:4"}], ids=str
)
def test_nearer_for_any_mask(dense, options):
    batches = inputs(10)
    stats, judge = sc.calibrate(dense, batches), Fidelity(dense, batches)
    pruned = copy.deepcopy(dense)
    masks = sc.prune(pruned, 0.5, **options)
    refitted = copy.deepcopy(dense)
    found = sc.refit(refitted, masks, stats)
    assert found == masks
    for name in masks:
        assert torch.equal(refitted.get_parameter(name) != 0, masks[name])
    assert judge.of(refitted) > judge.of(pruned)


def test_least_squares(dense):
    layer, batches = dense[0], inputs(4)
    masks = sc.Masks({"weight": torch.rand(40, 24, generator=torch.Generator().manual_seed(3)) < 0.5})
    stats = sc.calibrate(layer, batches)
    target, x = layer.weight.detach().double().clone(), torch.cat(batches).double()
    sc.refit(layer, masks, stats)
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    for row, kept in enumerate(masks["weight"]):
        exact = torch.zeros(24, dtype=torch.float64)
        exact[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ target[row])

        def loss(weights, row=row):
            return (weights - target[row]) @ hessian @ (weights - target[row])

        assert loss(layer.weight[row].detach().double()) <= 1.02 * loss(exact)
        assert loss(exact) < loss(target[row] * kept)


def test_pruned_before(dense):
    batches = inputs(10)
    stats, model = sc.calibrate(dense, batches), copy.deepcopy(dense)
    masks = sc.prune(model, 0.5)
    with pytest.raises(InputError, match=r"dense="):
        sc.refit(model, masks, stats)
    expected = copy.deepcopy(dense)
    sc.refit(expected, masks, stats)
    for given in (dense, dense.state_dict()):
        one = copy.deepcopy(model)
        sc.refit(one, masks, stats, dense=given)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), expected.parameters(), strict=True))


def test_tied_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one = nn.Linear(12, 12)
            self.two = nn.Linear(12, 12)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x).relu())

    model = Tied()
    stats = sc.calibrate(model, inputs(5, 12))
    kept = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    sc.refit(model, sc.Masks({"two.weight": kept}), stats)
    assert torch.equal(model.one.weight != 0, kept)


def test_without_statistics(dense):
    stats = sc.calibrate(dense, inputs(5), scope=sc.weights(dense, only=["0"]))
    masks = sc.prune(copy.deepcopy(dense), 0.5)
    expected = dense[2].weight.detach() * masks["2.weight"]
    with pytest.warns(SecateurWarning, match=r"2\.weight has no statistics"):
        sc.refit(dense, masks, stats)
    assert torch.equal(dense[2].weight, expected)


def test_refused(dense):
    stats = sc.calibrate(dense, inputs(5))
    before = copy.deepcopy(dense)
    masks = sc.prune(copy.deepcopy(dense), 0.5)
    with pytest.raises(InputTypeError, match=r"sc\.Masks"):
        sc.refit(dense, dict(masks), stats)
    with pytest.raises(InputTypeError, match=r"sc\.calibrate"):
        sc.refit(dense, masks, masks)
    with pytest.raises(UnknownNameError, match="head"):
        sc.refit(dense, sc.Masks({"head.weight": torch.ones(2, 2).bool()}), stats)
    with pytest.raises(MaskError, match="shape"):
        sc.refit(dense, sc.Masks({"0.weight": torch.ones(2, 2).bool()}), stats)
    with pytest.raises(InputTypeError, match="state_dict"):
        sc.refit(dense, masks, stats, dense=3)
    with pytest.raises(InputTypeError, match="progress"):
        sc.refit(dense, masks, stats, progress=3)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), before.parameters(), strict=True))
