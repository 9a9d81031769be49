"""secateur.runtime.tuner: which layers stay sparse, by what was measured."""

import torch
from torch import nn

import secateur as sc
from models import Mlp, build
from secateur.runtime import tuning
from secateur.runtime.kernel_plans import Gain
from sparse_models import fake_times, thin


def mlp():
    return thin(build(Mlp))


X = torch.randn(4, 12)


def kinds(model):
    return [type(module).__name__ for module in model.modules()]


def test_choices_by_example(backend, monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0) if bucket < 3 else (1.0, 2.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    fast = sc.accelerate(mlp(), [torch.randn(1, 12), (torch.randn(64, 12),), {"x": torch.randn(256, 12)}])
    first = fast.plan.layers[0]
    assert [(t.bucket, t.sparse) for t in first.timings] == [(0, True), (6, False), (8, False)]
    assert [b for b in range(10) if fast.first._choices >> b & 1] == [0, 1, 2]
    assert len(fast.plan.gains) == 3


def test_a_layer_that_is_slower_stays_dense_and_is_reported(backend, monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0) if name == "first" else (1.0, 1.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    fast = sc.accelerate(mlp(), X)
    assert kinds(fast) == ["Mlp", "SparseLinear", "Linear"]
    assert [layer.reason for layer in fast.plan.layers] == ["", "not faster"]
    assert "dense: not faster" in str(sc.explain(fast))


def test_a_model_that_is_no_faster_is_dense_again(backend, sparse_wins, monkeypatch):
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(1.02, 0.99, 1.05))
    model = thin(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1), 0.7)
    fast = sc.accelerate(model, torch.randn(2, 3, 16))
    assert kinds(fast) == kinds(model)
    assert {layer.reason for layer in fast.plan.layers} == {"the whole model was not faster"}
    assert "no faster (1.02x" in str(fast.plan)
    sc.dense(fast)


def test_only_the_sizes_that_gain_stay_sparse(backend, sparse_wins, monkeypatch):
    gains = iter([Gain(2.0, 1.9, 2.1), Gain(0.9, 0.8, 1.0)])
    monkeypatch.setattr(tuning, "gain", lambda *_: next(gains))
    fast = sc.accelerate(mlp(), [torch.randn(1, 12), torch.randn(64, 12)])
    assert [(t.bucket, t.sparse) for t in fast.plan.layers[0].timings] == [(0, True), (6, False)]


def test_a_machine_too_busy_to_tell_leaves_dense_and_says_so(sparse_wins, monkeypatch):
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(1.5, 0.9, 2.5))
    fast = sc.accelerate(mlp(), X)
    assert kinds(fast) == ["Mlp", "Linear", "Linear"]
    said = "cannot tell whether it is faster, as the times vary too much (1.50x, 95 % interval 0.90x to 2.50x)"
    assert f"{said}: left dense" in " ".join(str(fast.plan).split())
