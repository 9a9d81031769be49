"""secateur.runtime.tuner: which layers stay sparse, by what was measured."""

import copy
import pickle

import pytest
import torch
from torch import nn

import secateur as sc
from models import build
from secateur.errors import SecateurWarning
from secateur.runtime import tuning
from secateur.runtime.kernel_plans import Gain
from secateur.runtime.swapping import Sparse
from secateur.runtime.tuner import Tuning
from sparse_models import Apart, fake_times, off, thin


def mlp():
    return thin(build(Apart))


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
    assert kinds(fast) == ["Apart", "SparseLinear", "Linear"]
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
    assert kinds(fast) == ["Apart", "Linear", "Linear"]
    said = "cannot tell whether it is faster, as the times vary too much (1.50x, 95 % interval 0.90x to 2.50x)"
    assert f"{said}: left dense" in " ".join(str(fast.plan).split())


def interrupt(*_):
    raise KeyboardInterrupt("by hand")


def test_an_interrupt_before_anything_was_timed_is_one(backend, monkeypatch):
    fake_times(monkeypatch, interrupt)
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt, match="by hand"):
        sc.accelerate(model, X)
    assert kinds(model) == ["Apart", "Linear", "Linear"]
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_interrupted_between_layers_what_was_timed_stands_and_is_not_timed_again(backend, monkeypatch):
    asked = []

    def once(name, bucket):
        asked.append(name)
        return interrupt() if asked == ["first", "first", "second"] else (2.0, 1.0)

    fake_times(monkeypatch, once)
    monkeypatch.setattr(tuning, "_TOGETHER", 0.0)
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    with pytest.warns(SecateurWarning, match=r"1 of 2 layers .* were timed and keep .*, and second stay dense"):
        fast = sc.accelerate(mlp(), X)
    assert kinds(fast) == ["Apart", "SparseLinear", "Linear"]
    assert kinds(sc.accelerate(mlp(), X)) == ["Apart", "SparseLinear", "SparseLinear"]
    assert asked[3:] == ["second", "second"]


def test_interrupted_between_examples_what_was_timed_stands(backend, monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: interrupt() if bucket == 6 else (2.0, 1.0))
    model = mlp()
    with pytest.warns(SecateurWarning, match=r"2 of 2 layers .* keep what was chosen\. .* on 2 of 2 examples"):
        fast = sc.accelerate(model, [X, torch.randn(64, 12)])
    assert kinds(fast) == ["Apart", "SparseLinear", "SparseLinear"]
    assert [[t.bucket for t in layer.timings] for layer in fast.plan.layers] == [[2], [2]]
    assert "not compared, as the tuning was interrupted" in str(fast.plan)
    assert off(fast(X), model(X).detach()) <= 1e-5


def test_interrupted_while_the_model_is_compared_what_was_compared_counts(backend, sparse_wins, monkeypatch):
    gains = iter([Gain(0.9, 0.8, 1.0)])
    monkeypatch.setattr(tuning, "gain", lambda *_: next(gains, None) or interrupt())
    rest = r"not compared with the plain one on 1 of 2 examples\. To tune the rest"
    with pytest.warns(SecateurWarning, match=rest):
        fast = sc.accelerate(mlp(), [torch.randn(1, 12), torch.randn(64, 12)])
    assert [(t.bucket, t.sparse) for t in fast.plan.layers[0].timings] == [(0, False), (6, True)]
    again = sc.accelerate(mlp(), [torch.randn(1, 12), torch.randn(64, 12)], plan=fast.plan.to_dict())
    assert again.plan == fast.plan
    assert fast.plan.interrupted
    assert fast.plan.table().notes[:2] == [
        "the whole model, example 0: no faster (0.90x, 95 % interval 0.80x to 1.00x): left dense",
        "the whole model, example 1: not compared, as the tuning was interrupted",
    ]


def test_interrupted_while_a_run_is_timed_its_layers_stay_what_they_are(isa, monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: interrupt() if name.endswith("]") else (2.0, 1.0))
    model = thin(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8)))
    with pytest.warns(SecateurWarning, match="interrupted: 2 of 3 layers") as told:
        fast = sc.accelerate(model, X)
    assert ", and [0:3] run layer by layer. The whole" in str(told[0].message)
    assert "stay dense" not in str(told[0].message)
    assert kinds(fast) == ["Sequential", "SparseLinear", "ReLU", "SparseLinear"]


def test_layers_that_run_in_a_run_alone_say_so(isa, monkeypatch):
    many = [X[:1], torch.randn(64, 12)]
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0) if name.endswith("]") and bucket == 0 else (1.0, 2.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    model = nn.Sequential(
        *(thin(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), 0.5) for _ in range(2))
    )
    fast = sc.accelerate(model, many)
    where = [[t.within for t in layer.timings] for layer in fast.plan.layers]
    assert where == [["0[0:3]", ""]] * 2 + [["1[0:3]", ""]] * 2 + [["", ""]] * 2
    rows = fast.plan.table().rows
    assert (rows[0][0], rows[0][-1], rows[1][-1]) == ("{0,1}.{0,2}", "in {0,1}[0:3]", "dense: not faster")
    assert sc.accelerate(model, X[:1], plan=fast.plan.to_dict()).plan == fast.plan


def test_interrupted_when_nothing_was_left_it_asks_for_nothing(isa, monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: (1.0, 2.0))
    monkeypatch.setattr(Tuning, "_leave_to_networks", interrupt)
    with pytest.warns(SecateurWarning, match="2 of 2 layers and runs of layers were timed") as told:
        fast = sc.accelerate(mlp(), X)
    assert "To tune the rest" not in str(told[0].message)
    assert not fast.plan.interrupted
    assert fast.plan.table().notes[-2] == "the whole model: no faster, all of it dense"


def test_layers_that_were_not_timed_say_so(sparse_wins, monkeypatch):
    measured = tuning.times
    monkeypatch.setattr(tuning, "times", lambda model, given: interrupt() if len(given) > 1 else measured(model, given))

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(12, 12), nn.Linear(12, 10), nn.Linear(10, 8)

        def forward(self, x, far=False):
            return self.three(self.two(x)) if far else self.one(x)

    with pytest.warns(SecateurWarning, match=r"1 of 3 layers .*, and two, three stay dense\."):
        fast = sc.accelerate(thin(Either()), [X, (X, True)])
    assert kinds(fast) == ["Either", "SparseLinear", "Linear", "Linear"]
    assert [layer.reason for layer in fast.plan.layers] == ["", *["not timed: the tuning was interrupted"] * 2]
    assert "dense: not timed: the tuning was interrupted" in " ".join(str(fast.plan).split())


class Impatient(nn.Sequential):
    """Interrupts, as Ctrl-C would, in one of the calls of all copies together."""

    left = 0

    def forward(self, x):
        Impatient.left -= 1
        if Impatient.left == 0:
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:the tuning was interrupted")
@pytest.mark.parametrize("call", [*range(1, 12), 20, 30])
def test_wherever_it_is_interrupted_the_model_is_whole(monkeypatch, call):
    monkeypatch.setattr(tuning, "_CACHE_BYTES", 64)
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)
    monkeypatch.setattr(tuning, "_GAIN", ((1e-4, 6),))
    model = nn.Sequential(thin(Impatient(nn.Linear(12, 12))), thin(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 8))))
    model.train()
    Impatient.left = call
    try:
        fast = sc.accelerate(model, [X, X[:1]])
    except KeyboardInterrupt:
        fast = None
    assert (fast is None) == (call < 4)  # two to look, one for the inputs of the first example
    Impatient.left = 0
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    assert not any(isinstance(module, Sparse) for module in model.modules())
    if fast is not None:
        assert not any("forward" in vars(module) for module in fast.modules())
        for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), sc.dense(fast)):
            assert off(one(X), model(X).detach()) <= 1e-5
