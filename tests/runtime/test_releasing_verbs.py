"""The verbs that take a model, given one whose dense weights were released: they work, or say what to do."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import dropout
from secateur.errors import SecateurError

X = torch.randn(64, 24)
BATCHES = [(X,)]


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 16))
    sc.prune(model, 0.8)
    return model


MASKS = sc.prune(net(), 0.8)
STATISTICS = sc.calibrate(net(), BATCHES)
REFUSE = {
    "prune": lambda fast, folder: sc.prune(fast, 0.9),
    "Pruner": lambda fast, folder: sc.Pruner(fast, 0.9),
    "weights": lambda fast, folder: sc.weights(fast),
    "remask": lambda fast, folder: sc.remask(fast, MASKS),
    "rewind": lambda fast, folder: sc.rewind(fast, net().state_dict(), MASKS),
    "calibrate": lambda fast, folder: sc.calibrate(fast, BATCHES),
    "oneshot": lambda fast, folder: sc.oneshot(fast, STATISTICS, 0.9),
    "sequential": lambda fast, folder: sc.oneshot(fast, BATCHES, 0.9, sequential=True),
    "refit": lambda fast, folder: sc.refit(fast, MASKS, STATISTICS),
    "scan": lambda fast, folder: sc.scan(fast, lambda model: 1.0, [0.5]),
    "recommend": lambda fast, folder: sc.recommend(fast, lambda model: 1.0),
    "recover": lambda fast, folder: sc.recover(fast, net(), BATCHES, steps=1),
    "accumulate": lambda fast, folder: sc.accumulate(fast, BATCHES, lambda model, batch: model(*batch).sum()),
    "accelerate": lambda fast, folder: sc.accelerate(fast, X),
    "load": lambda fast, folder: (
        sc.save(net(), folder / "it.safetensors"),
        sc.load(folder / "it.safetensors", into=fast),
    ),
    "shrink": lambda fast, folder: sc.shrink(fast, X, 0.5),
    "units": lambda fast, folder: sc.prune(fast, 0.5, pattern=sc.units(fast, X)),
    "sample": lambda fast, folder: dropout.sample(fast, X, n=2, seed=0),
    "find": lambda fast, folder: dropout.find(fast, X),
    "closed_form": lambda fast, folder: dropout.closed_form(fast, X),
    "variational": lambda fast, folder: dropout.variational(fast, n_data=9.0, warmup=1),
}


@pytest.fixture
def released(sparse_wins):
    fast = sc.accelerate(net(), X, keep_dense=False)
    assert fast[0].weight.is_meta
    return fast


@pytest.mark.parametrize("verb", REFUSE)
def test_what_needs_the_weights_says_where_they_are(released, tmp_path, verb):
    before, state = released(X), {name: tensor.clone() for name, tensor in released.state_dict().items()}
    with pytest.raises(SecateurError, match=r"sc\.dense\("):
        REFUSE[verb](released, tmp_path)
    assert released(X).equal(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in released.state_dict().items())


def test_what_reads_them_has_them_rebuilt(released, tmp_path):
    plain = net()
    masks = sc.prune(plain, 0.8)
    assert sc.report(released, masks) == sc.report(plain, masks)
    assert sc.report(released) == sc.report(plain)
    assert sc.check(released, masks) == sc.check(plain, masks)
    sc.save(released, tmp_path / "it.safetensors")
    assert all(
        torch.equal(tensor, plain.state_dict()[name]) for name, tensor in sc.load(tmp_path / "it.safetensors").items()
    )


def test_a_layer_with_two_names_counts_once(sparse_wins):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.other = nn.Linear(24, 24)

        def forward(self, x):
            return self.other(self.one(x))

    model = Twice()
    sc.prune(model, 0.8)
    fast = sc.accelerate(model, X, keep_dense=False)
    assert sc.report(fast).lines == sc.report(model).lines
    told = sc.measure(fast, X, seconds=0.01)
    assert told.parameters == sum(p.numel() for p in model.parameters())
