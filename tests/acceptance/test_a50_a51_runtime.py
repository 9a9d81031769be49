"""A50: faster where it is measured so, dense where not, and the report says so. A51: an ordinary module in use."""

import copy
import io

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.runtime import native, tuning
from secateur.runtime.kernel_plans import Gain
from sparse_models import fake_times, off, thin

X = torch.randn(4, 64)


@pytest.fixture(params=["native", "torch"])
def library(request, monkeypatch):
    """With the native library, and without it."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no native library")


@pytest.fixture
def gaining(library, monkeypatch):
    """The clock says that sparse is faster: what follows is about results."""
    monkeypatch.setattr(tuning, "_CACHE", {})
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))


def build():
    torch.manual_seed(0)
    return thin(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)))


def test_a50_on_the_real_clock_no_layer_is_chosen_that_was_not_faster(library):
    """Whatever the clock said: each choice follows from its times, and the report tells them."""
    model = nn.Sequential(thin(nn.Linear(512, 512)), nn.ReLU(), nn.Linear(512, 512))
    fast = sc.accelerate(model, torch.randn(1, 512))
    first, last = sc.explain(fast).layers
    for timing in first.timings:
        assert not timing.sparse or timing.sparse_seconds < timing.dense_seconds
    assert bool(first.choices) == (type(fast[0]) is not nn.Linear)
    assert last.reason == "too dense: 0.00 % zeros"
    assert type(fast[2]) is nn.Linear
    text = str(sc.explain(fast))
    assert "dense: too dense" in text
    assert "the whole model" in text
    verdicts = ("faster: ", "no faster", "cannot tell whether it is faster")
    assert any(verdict in " ".join(text.split()) for verdict in verdicts)


def test_a50_a_layer_that_would_be_slower_is_left_dense_and_the_report_says_so(gaining, monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0) if name == "0" else (1.0, 2.0))
    fast = sc.accelerate(build(), X)
    assert isinstance(fast[0], nn.Linear)
    assert type(fast[0]) is not nn.Linear
    assert type(fast[2]) is nn.Linear
    assert "dense: not faster" in str(sc.explain(fast))


def test_a51_inference_mode(gaining):
    model = build()
    fast = sc.accelerate(model, X)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert off(fast(X), model(X)) <= 1e-5


def test_a51_deepcopy_and_pickle(gaining):
    fast = sc.accelerate(build(), X)
    kept = io.BytesIO()
    torch.save(fast, kept)
    kept.seek(0)
    for one in (copy.deepcopy(fast), torch.load(kept, weights_only=False)):
        assert one(X).equal(fast(X))
        assert [type(m) for m in one.modules()] == [type(m) for m in fast.modules()]
        assert one.plan == fast.plan


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 3, 4, 64), (0, 64), (999, 64)])
def test_a51_inputs_of_any_shape(gaining, shape):
    model, x = build(), torch.randn(shape)
    assert off(sc.accelerate(model, X)(x), model(x).detach()) <= 1e-5


def test_a51_state_dict(gaining):
    model = build()
    fast = sc.accelerate(model, X)
    mine, plain = fast.state_dict(), model.state_dict()
    assert list(mine) == list(plain)
    assert all(mine[name].equal(plain[name]) and mine[name].dtype is plain[name].dtype for name in plain)
    fresh = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    fresh.load_state_dict(mine, strict=True)
    assert fresh(X).equal(model(X))
