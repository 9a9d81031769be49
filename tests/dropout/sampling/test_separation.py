"""Folded samples stay apart, or are refused: whatever is fastest, and whichever values decide."""

import numpy as np
import pytest
import torch
from sampling_cases import X, exact, mlp, near, planned, sample, seeded
from torch import nn
from zoo import linear

from secateur.dropout.interception.followers import Unsuitable
from secateur.dropout.interception.isolation import undisturbed
from secateur.dropout.sampling import monte_carlo

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]


def behind(change):
    """A model whose last part sees the whole batch, with dropout before it."""
    return seeded(lambda s, x: change(s.a(s.drop(x))), a=linear, drop=nn.Dropout)


def rare(h):
    """Changes a pass in which one value of the batch is large."""
    return h * torch.where(h.abs().max() > 2.0, 0.1, 1.0)


MIXED = {
    "the largest": rare,
    "the smallest": lambda h: torch.where(h.amin() < -2.0, h * 0.1, h),
    "any": lambda h: h * (1 - 0.9 * (h > 2.0).any().float()),
    "a norm": lambda h: h / torch.norm(h).clamp(min=9.0),
    "of each column": lambda h: h / h.abs().amax(0, keepdim=True).clamp(min=2.0),
    "written into a buffer": lambda h: h / h.new_full((1,), 2.0).copy_(h.abs().max().clamp(min=2.0)),
    "as many as are large": lambda h: h * (0.1 if len(h[h > 2.0]) else 1.0),
    "as many rows as there are": lambda h: h * sum(row * 0 + 1 for row in h.unbind())[0],
    "another call": lambda h: h.tanh() if len(h) > 4 else h,
    "fewer arguments": lambda h: torch.clamp(h, *[h * 0.5] * (1 if len(h) > 4 else 2)),
    "numpy": lambda h: h * (0.1 if np.asarray(h).max() > 2.0 else 1.0),
}


@pytest.mark.parametrize("change", MIXED.values(), ids=MIXED)
def test_what_mixes_the_batch_is_refused(change):
    """Without one value that shows it: nothing is dropped in these samples, and all values are small."""
    with undisturbed():
        run = planned(behind(change), X * 1e-3)
        with pytest.raises(Unsuitable, match=r"do not stay apart|a value is read"):
            run.some("folded", [0, 1])


APART = {
    "rows": lambda h: h / h.abs().amax(1, keepdim=True),
    "a new tensor": lambda h: h + h.new_ones(1) + torch.ones(1).type_as(h) + torch.ones(1).to(h),
    "a size": lambda h: h.view(h.size(0), 2, 4).softmax(1).flatten(1) * h.shape[1],
    "two results": lambda h: h.sort(1)[0] + sum(h.split(4, 1))[:, :1],
    "keywords": lambda h: torch.add(input=h, other=h, alpha=2),
}


@pytest.mark.parametrize("change", APART.values(), ids=APART)
def test_what_keeps_the_batch_apart_is_folded(change):
    with undisturbed():
        model = behind(change)
        assert near(planned(model, X).some("folded", range(5))[0], exact(model, X, 5))


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("change", [rare, torch.tanh])
def test_whichever_way_is_fastest(change, place, monkeypatch):
    """All ways and sizes are tried, and each wins once: no clock decides what is sampled."""
    monkeypatch.setattr(monte_carlo, "_LONG", float("inf"))
    monkeypatch.setattr(monte_carlo._Race, "winner", lambda race: sorted(race._seconds)[place % len(race._seconds)])
    model = behind(change)
    for seed in range(8):
        assert near(sample(model, X, n=20, seed=seed).samples, exact(model, X, 20, seed=seed))
    (plan,) = monte_carlo._PLANS[model].values()
    assert place != 3 or change is rare or plan.way == "folded"


def test_a_plan_is_left_where_inputs_lead_elsewhere():
    model = seeded(
        lambda s, x: rare(s.a(s.drop(x))) if x.sum() > 0 else s.a(s.drop(x)).tanh(), a=linear, drop=nn.Dropout
    )
    sample(model, -X.abs(), n=20)
    (plan,) = monte_carlo._PLANS[model].values()
    plan.way, plan.chunk = "folded", 20
    for seed in range(8):
        assert near(sample(model, X.abs(), n=20, seed=seed).samples, exact(model, X.abs(), 20, seed=seed))
    (plan,) = monte_carlo._PLANS[model].values()
    assert plan.way != "folded"


def test_all_passes_have_the_size_that_was_tried():
    sizes, told = [], []
    model = mlp()
    with undisturbed():
        run = planned(model, X)
        run.advance = told.append
        run.plan.way, run.plan.chunk = "folded", 7
        with model[3].register_forward_hook(lambda module, args, out: sizes.append(len(args[0]))):
            (samples,) = run.samples(20, 2)
    assert sizes == [4, 28, 28, 28]  # the first is that of one sample, with which others are compared
    assert told == [7, 7, 4]
    assert near(samples, exact(model, X, 20)[2:])
