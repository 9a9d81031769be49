"""What comes before the first dropout: computed once, and the model does not notice."""

import pytest
import torch
from sampling_cases import X, exact, near, sample, seeded
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from zoo import linear

from secateur.dropout.sampling.monte_carlo import _PLANS

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]


def test_a_model_that_keeps_what_it_computed():
    def forward(self, x):
        self.before = self.a(x)
        self.after = self.drop(self.before)
        return self.a(self.after)

    model = seeded(forward, a=linear, drop=nn.Dropout)
    right = exact(model, X, 9)
    for room in (2**30, 3000):
        for _ in range(2):
            assert near(sample(model, X, n=9, max_memory=room).samples, right)
    assert not hasattr(model, "before")  # samples are no calls of the user's
    model(X)
    assert torch.equal(model.after, model.before)


def test_writing_into_a_buffer_that_is_read():
    """A ring buffer in eval(): each sample starts from the same."""

    def forward(self, x):
        self.state.mul_(0.5).add_(self.a(x))
        return self.drop(self.state)

    model = seeded(forward, a=linear, drop=nn.Dropout)
    model.register_buffer("state", torch.zeros(4, 8))
    got = sample(model, X, n=9).samples
    right = model.a(X).detach() * 2
    kept = got != 0
    assert near(got.where(kept, 0), (right.expand_as(got) * kept).contiguous())


class Uses(TorchFunctionMode):
    """Counts the rows that meet a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.rows = weight, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args[1] is self.weight:
            self.rows += len(args[0])
        return func(*args, **(kwargs or {}))


def test_what_comes_before_the_first_dropout_is_computed_once():
    model = nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 8), nn.Dropout(0.5), linear()).eval()
    sample(model, X, n=64, max_memory=9000)
    ((plan),) = _PLANS[model].values()
    assert plan.chunk < 64
    with Uses(model[0].weight) as first_layer, Uses(model[3].weight) as last_layer:
        sample(model, X, n=64, max_memory=9000)
    assert first_layer.rows == len(X)
    if plan.way == "folded":
        assert 0 <= last_layer.rows - 64 * len(X) < plan.chunk * len(X)  # the last pass is as large as the others
