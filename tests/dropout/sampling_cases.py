"""What the tests of samples share: small models, samples taken in full passes, and what counts as equal."""

import pytest
import torch
from torch import nn
from zoo import ZOO, Model, linear

import secateur as sc
from secateur.dropout.interception.isolation import undisturbed
from secateur.dropout.sampling.passes import Run
from secateur.support.inputs import arguments

sample = sc.dropout.sample

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

WAYS = "alone", "mapped", "folded"

FREE = [entry for entry in ZOO if entry.free]

ONE_BY_ONE = {
    "in place, into a view",
    "added in place to what came before",
    "added in place to the input",
    "a branch on a value",
}
"""Models of which no way takes several samples a pass."""

MIXED = {"centred over the batch", "masked logits", "columns of other sizes"}
"""Models that mix the batch: the only ones whose sizes show that samples cannot be folded into it."""


def zoo(entries):
    return pytest.mark.parametrize("entry", entries, ids=[entry.name for entry in entries])


def mlp(p=0.5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(linear(), nn.Tanh(), nn.Dropout(p), linear()).eval()


def seeded(forward, **parts):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(forward, **{name: part() if callable(part) else part for name, part in parts.items()}).eval()


def planned(model, inputs, output=None, seed=0, shared=False):
    run = Run(model, arguments(inputs), output, seed, shared)
    run.look()
    return run


def exact(model, inputs, n, output=None, seed=0, shared=False):
    """Samples one by one, each in a full pass."""
    with undisturbed():
        run = planned(model, inputs, output, seed, shared)
        return torch.cat([run.some("exact", [i])[0] for i in range(n)])


def in_steps(samples, size):
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def taken(run, way, samples, size, replay):
    """Samples in one of the ways, a few a pass."""
    parts = in_steps(samples, 1 if way == "alone" else size)
    return torch.cat([run.some(way, part, replay=replay)[0] for part in parts])


def near(got, right, accuracy=None, columns=True):
    """Equal to rounding, in each column of the last dimension."""
    if accuracy is None:
        accuracy = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[right.dtype]
    assert got.shape == right.shape
    assert got.dtype == right.dtype
    finite = right.isfinite()
    assert torch.equal(got[~finite], right[~finite])
    got, right = (t.double().where(finite, 0).reshape(-1, right.shape[-1]) for t in (got, right))
    bound = accuracy * (right.abs().amax(0) if columns else right.abs().max())
    return bool(((got - right).abs() <= bound).all())


class Out(nn.Module):
    def __init__(self, inner, time=False):
        super().__init__()
        self.inner, self.time = inner, time

    def forward(self, x):
        return self.inner(x)[0].transpose(0, 1) if self.time else self.inner(x)[0]


class SelfAttention(nn.Module):
    def __init__(self, mha):
        super().__init__()
        self.mha = mha

    def forward(self, x):
        return self.mha(x, x, x)


def half(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
