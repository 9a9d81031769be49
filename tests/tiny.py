"""A tiny classifier, its data, and a loop, for tests of the Pruner."""

import io

import pytest
import torch
from torch import nn


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def batch(step):
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)


def train(model, optimizer, steps, each=lambda step: None):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        each(step)


def interrupted(build, at, end):
    """Train what `build` makes, to `at`, save it, and go on to the end: once without a break, once from what was saved.

    Returns model, optimizer and pruner of both.
    """
    first, second = build(), build()
    model, optimizer, pruner = first
    pruner.attach(optimizer)
    train(model, optimizer, range(at))
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in first], file)
    train(model, optimizer, range(at, end))
    file.seek(0)
    for thing, state in zip(second, torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(state)
    model, optimizer, pruner = second
    pruner.attach(optimizer)
    train(model, optimizer, range(at, end))
    return first, second


def raw(model):
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(raw(one), raw(other), strict=True))


def mostly_slow(cases, *quick):
    """Parameters of a test, by their ids, of which all but some are marked slow."""
    return [
        pytest.param(case, id=name, marks=() if name in quick else pytest.mark.slow) for name, case in cases.items()
    ]
