"""A62, A63: samples of dropout that really differ, as in training; and no dropout call that goes unseen."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc

sys.path.insert(0, str(Path(__file__).parents[1] / "dropout"))
from zoo import ZOO

X = torch.randn(8, 6, 12, generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(12, 16, 2, dropout=0.5, batch_first=True, **options)
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def tagger(kind=nn.LSTM, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tagger(kind, **options)


KINDS = [(nn.LSTM, {}), (nn.LSTM, {"bidirectional": True}), (nn.GRU, {}), (nn.RNN, {})]


def test_a62_what_torch_does():
    """The reason for it: under vmap all samples of one pass are the same, and nobody says so."""
    model = tagger().train()
    with torch.no_grad():
        same = torch.vmap(lambda i: model(X) + 0 * i, randomness="different")(torch.arange(5))
    assert torch.equal(same, same[:1].expand_as(same)), "torch does it right now: the sentence in the docs can go"


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a62_samples_differ(kind, options):
    model = tagger(kind, **options).eval()
    samples = sc.dropout.sample(model, X, n=20).samples
    for i in range(20):
        for j in range(i):
            assert (samples[i] - samples[j]).abs().mean() > 0.01
    assert not model.training


def loop(model, x, n):
    """What people write."""
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.stack([model.train()(x) for _ in range(n)])


def ratio(model, n):
    ours = sc.dropout.sample(model.eval(), X, n=n).std
    return (ours / loop(model, X, n).std(0)).mean()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a62_std_of_a_loop(kind, options):
    """Of 600 passes: the mean over 240 outputs is out by about 0.4 %."""
    assert abs(ratio(tagger(kind, **options), 600) - 1) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a62_std_of_4000_passes(kind, options):
    assert abs(ratio(tagger(kind, **options), 4000) - 1) < 0.01


class Everywhere(nn.Module):
    """All that a walk over modules does not see, in one model."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)
        self.p = 0.2

    def forward(self, x):
        x = F.dropout(x, 0.4, self.training)
        x = self.mha(x, x, x, need_weights=False)[0]
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=self.p if self.training else 0.0)
        return self.lstm(x)[0]


def test_a63_functional_calls_are_found():
    model = Everywhere().eval()
    assert not any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules())
    found = sc.dropout.find(model, torch.randn(3, 4, 8))
    assert [(call.path, call.kind, call.rate) for call in found.calls] == [
        ("", "dropout", 0.4),
        ("mha", "attention", 0.1),
        ("", "attention", 0.2),
        ("lstm", "lstm", 0.3),
    ]
    assert not found.unreached


def test_a63_what_is_out_of_reach_is_named():
    class Own(Everywhere):
        def forward(self, x):
            x = super().forward(x)
            return x * (torch.rand_like(x) > 0.5) if self.training else x

    model = Own().eval()
    (one,) = sc.dropout.find(model, torch.randn(3, 4, 8)).unreached
    assert "rand_like (line" in str(one)
    with pytest.warns(sc.errors.SecateurWarning, match=r"sample leaves noise out: rand_like \(line \d+\) in the model"):
        sc.dropout.sample(model, torch.randn(3, 4, 8), n=5)


def test_a63_all_of_the_zoo_is_found_or_named():
    """100 %: every call of every model, beside what a walk over modules would see."""
    calls = modules = 0
    for entry in ZOO:
        model, inputs, _ = entry.build()
        found = sc.dropout.find(model, inputs)
        assert [(call.path, call.kind, call.rate) for call in found.calls] == entry.calls, entry.name
        assert [(one.path, one.what.split(" (")[0]) for one in found.unreached] == entry.named, entry.name
        calls += len(entry.calls) + len(entry.named)
        modules += sum(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    assert len(ZOO) >= 16
    assert calls > 1.5 * modules


@pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.free], ids=lambda entry: entry.name)
def test_a63_each_call_that_is_found_is_sampled(entry):
    """No call is found and then left out: samples differ where the model in training does."""
    model, inputs, output = entry.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.errors.SecateurWarning)
        std = sc.dropout.sample(model, inputs, n=100, output=output).std.nan_to_num()
    assert (std > 0).double().mean() > 0.6  # ReLU and states of the first layer do not move
