"""One-shot block by block: exact counts, fitted survivors, and what cannot be done."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration.by_blocks import Task, prune_by_blocks, pruned_by_blocks
from secateur.calibration.solvers import SOLVERS
from secateur.calibration.ways import ways
from secateur.errors import InputError, SecateurWarning, UnknownNameError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.never = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(3, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def made(n=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Sequential(*(Block() for _ in range(n))), nn.Linear(8, 4)).eval()


def data(n=3, size=40):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(5, 5, generator=generator)
    return [torch.randn(size, 5, generator=generator) @ mix for _ in range(n)]


def lost(model, dense):
    with torch.no_grad():
        return float(sum((model(x) - dense(x)).square().sum() for x in data()))


SCOPE = {"skip": "*never"}


def pruned(task, batches=None, **scope):
    model = made()
    masks = prune_by_blocks(model, batches or data(), task, scope=sc.weights(model, **(scope or SCOPE)))
    return model, masks


def test_the_fitted_survivors_lose_less():
    losses = {}
    for solver in ("magnitude", "wanda", "alps"):
        model, masks = pruned(Task(0.6, solver=solver))
        assert masks.pruned == round(0.6 * masks.size)
        assert all(abs(n - 0.6 * masks[name].numel()) < 1 for name, n in masks.counts().items())
        assert sc.check(model, masks) == {}
        losses[solver] = lost(model, made())
    assert losses["alps"] < 0.5 * min(losses["magnitude"], losses["wanda"])


def test_patterns_and_allocations():
    model, masks = pruned(Task(0.5, pattern="2:4"), skip=["*never", "0"])
    assert all(bool((mask.view(-1, 4).sum(1) == 2).all()) for mask in masks.values())
    model, masks = pruned(Task({"1.0*": 0.25, "2": 0.5}), **SCOPE)
    assert masks.counts() == {"1.0.up.weight": 32, "1.0.down.weight": 32, "2.weight": 16}
    assert int((model[1][1].up.weight == 0).sum()) == 0


def test_what_was_short_of_data_is_told():
    with pytest.warns(SecateurWarning, match=r"1.0.never.weight, .* pruned by magnitude: give batches that reach them"):
        model, masks = pruned(Task(0.5), only="*.weight")
    kept = masks["1.0.never.weight"]
    assert torch.equal(model[1][0].never.weight, made()[1][0].never.weight * kept)
    assert int(kept.sum()) == 6
    with pytest.warns(SecateurWarning, match=r"1.0.down.weight.* fewer samples than inputs.*: give more batches"):
        pruned(Task(0.5), data(2, 5))


def test_a_solver_of_ones_own_and_the_context():
    def rows(weights, curvature, select):
        kept = select(-weights.abs())
        return weights * kept, kept

    model = made()
    before = copy.deepcopy(model.state_dict())
    with pruned_by_blocks(model, data(), Task(0.5, solver=rows), scope=sc.weights(model, **SCOPE)) as (masks, _):
        assert sc.check(model, masks) == {}
        assert float(model[0].weight.abs().max()) < float(before["0.weight"].abs().max())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert masks.sparsity == 0.5


class Speech(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.out = kind(6, 24, 2), nn.Linear(24, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def speech(solver="alps", kind=nn.LSTM, **scope):
    """How much a model with a recurrent module loses; and its masks."""
    torch.manual_seed(0)
    dense = Speech(kind).eval()
    with torch.no_grad():
        for parameter in dense.rnn.parameters():
            parameter.mul_(2)  # so that errors of the state grow
    model, batches = copy.deepcopy(dense), list(torch.randn(4, 40, 8, 6).cumsum(1).sin())
    with pytest.warns(SecateurWarning, match="the whole model is one block"):
        masks = prune_by_blocks(model, batches, Task(0.8, solver=solver), scope=sc.weights(model, **scope))
    with torch.no_grad():
        return float(sum((model(x) - dense(x)).square().sum() for x in batches)), masks


def test_recurrent_modules_are_fitted_to_their_own_states(monkeypatch):
    closed, masks = speech()
    assert masks.pruned == round(0.8 * masks.size)
    opened = [ways(SOLVERS.find("alps"), "full", looped=True)[0]._replace(rounds=0)]
    monkeypatch.setattr("secateur.calibration.by_blocks.ways", lambda *args, **named: opened)
    assert closed < speech()[0]


def test_recurrent_modules_of_which_a_part_is_pruned():
    _, masks = speech(only="*ih*")
    assert list(masks) == ["rnn.weight_ih_l0", "rnn.weight_ih_l1"]
    assert masks.sparsity == pytest.approx(0.8, abs=0.01)
    assert speech(kind=nn.GRU)[1].sparsity == pytest.approx(0.8, abs=0.01)


def test_what_cannot_be_done():
    with pytest.raises(
        InputError, match="'sensitivity', which looks at the whole model: choose global, uniform, erk, lamp, or"
    ):
        pruned(Task(0.5, allocation="sensitivity"))
    with pytest.raises(InputError, match=r"no solver named 'alp': choose .*alps"):
        pruned(Task(0.5, solver="alp"))
    with pytest.raises(InputError, match=r"inputs of 0.weight hold NaN or inf: look for them in the batches"):
        pruned(Task(0.5), [torch.full((40, 5), torch.nan)])
    with pytest.raises(UnknownNameError, match="matches no tensor"):
        pruned(Task({"nothing": 0.5}))
