"""What runs on an accelerator, run on the CPU: without numpy the results are the same bits."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.support import bits


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(700, 500), nn.Conv1d(8, 5, 3), nn.Linear(31, 17)).to(dtype)


@pytest.fixture
def without_numpy(monkeypatch):
    return lambda: monkeypatch.setattr(bits, "on_cpu", lambda tensor: False)


CHOICES = {
    "magnitude": {},
    "random": {"score": "random"},
    "ties": {"score": lambda name, w: (w * 20).round()},
    "uniform": {"allocation": "uniform"},
    "lamp": {"allocation": "lamp"},
    "min_keep": {"allocation": sc.allocation.global_(min_keep=0.3)},
    "rows": {"pattern": "rows"},
    "blocks": {"pattern": sc.blocks(2, 2, tail="keep")},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_masks_and_weights(without_numpy, choice, dtype):
    ours, theirs = model(dtype), model(dtype)
    expected = sc.prune(ours, 0.6, **CHOICES[choice])
    without_numpy()
    assert sc.prune(theirs, 0.6, **CHOICES[choice]) == expected
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not bool((other[other == 0].signbit()).any())


def test_the_same_training(without_numpy):
    def run():
        trained = model()
        optimizer = torch.optim.Adam(trained.parameters(), weight_decay=0.1)
        pruner = sc.Pruner(trained, 0.8, schedule=sc.cubic(0, 6, every=2))
        pruner.attach(optimizer)
        for step in range(7):
            for i, weight in enumerate(trained.parameters()):
                weight.grad = torch.full_like(weight, 0.1 * (step + i))
            pruner.mask_gradients()
            optimizer.step()
        return pruner.finish(), list(trained.parameters()), sc.check(trained, pruner.masks)

    masks, weights, back = run()
    without_numpy()
    again, theirs, also = run()
    assert again == masks
    assert all(map(torch.equal, theirs, weights))
    assert back == also == {}
