"""Seeds and masks: what follows from a seed, and from nothing else."""

import random
import warnings

import numpy as np
import pytest
import torch
from sampling_cases import X, mlp, near, sample
from torch import nn
from zoo import bits

from secateur.errors import SecateurWarning

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]


def test_seeds():
    model = mlp()
    again = [sample(model, X, seed=7).samples for _ in range(3)]
    assert torch.equal(again[1], again[2])
    assert near(again[0], again[1])
    seeds = [sample(model, X, seed=seed).samples for seed in (0, 1, 2, 2**32, 2**63, -1)]
    assert len({bits(one[0]) for one in seeds}) == len(seeds)


def test_neighbours_have_nothing_in_common():
    """Sample i of one seed is no sample of the next, and the streams do not correlate."""
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    a, b = (sample(model, torch.ones(1, 2000), n=30, seed=seed).samples.squeeze(1) - 1 for seed in (0, 1))
    both = torch.cat([a, b])
    correlation = (both @ both.T / 2000).fill_diagonal_(0)
    assert correlation.abs().max() < 0.12


def test_no_seed_follows_the_global_generator():
    model = mlp()
    torch.manual_seed(0)
    a, b = sample(model, X, seed=None).samples, sample(model, X, seed=None).samples
    assert not near(a, b)
    torch.manual_seed(0)
    assert near(sample(model, X, seed=None).samples, a)


def test_a_seed_leaves_the_global_generators_alone():
    model = mlp()
    states = bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())
    sample(model, X)
    sample(model, X, seed=5)
    assert (bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())) == states


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_masks_do_not_depend_on_the_default_dtype(default):
    model = nn.Sequential(nn.Dropout(0.3)).eval()
    right = sample(model, X).samples
    torch.set_default_dtype(default)
    try:
        got = sample(model, X).samples
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, right)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_rate_of_what_is_dropped(rate):
    model = nn.Sequential(nn.Dropout(rate)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        got = sample(model, torch.ones(50, 100), n=20, seed=2).samples
    error = (rate * (1 - rate) / got.numel()) ** 0.5
    assert abs(float((got == 0).double().mean()) - rate) < 5 * error
    kept = got[got != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - rate)))


def test_each_element_of_a_batch_has_its_own_masks():
    model = mlp()
    got = sample(model, X[:1].expand(3, -1)).samples
    assert len({bits(row) for row in got[0]}) == 3
    assert torch.corrcoef(got[:, :, 0].T).triu(1).abs().max() < 0.8
