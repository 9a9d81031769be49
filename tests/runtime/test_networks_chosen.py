"""What accelerate does with networks: timed, chosen, told, kept, and given up."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import secateur as sc
from networks_by_hand import Basic, ResNet, lively, vgg
from secateur.errors import InputError
from secateur.runtime import networks, tuning
from secateur.runtime.forwards import Watch
from secateur.runtime.kernel_plans import Gain
from secateur.runtime.swapping import Sparse, Swapped
from sparse_models import assert_alike, fake_times, off

X = torch.randn(2, 3, 16, 16)
KIND = "network of 6 convolutions"


def small():
    return lively(ResNet(widths=(4, 8), depth=1))


@pytest.fixture
def no_clock(monkeypatch):
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    return lambda times: fake_times(monkeypatch, times)


def row(fast, name=""):
    return next(plan for plan in fast.plan.layers if plan.name == name)


def test_chosen_and_told(isa, network_calls, sparse_wins):
    model = small()
    fast = sc.accelerate(model, X)
    plan = row(fast)
    assert (plan.kind, plan.shape, plan.reason) == (KIND, (4, 3, 7, 7), "")
    assert [(t.bucket, t.sparse) for t in plan.timings] == [(9, True)]
    assert "network" in str(fast.plan)
    network_calls.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert network_calls == [8]
    assert isinstance(fast, networks.SparseNetwork)
    assert isinstance(fast, ResNet)
    back = sc.dense(fast)
    assert_alike(back, model)
    assert back(X).equal(model(X))
    assert isinstance(fast, networks.SparseNetwork)


def test_layers_too_small_alone_may_be_part(network_calls, no_clock):
    no_clock(lambda name, bucket: (2.0, 1.0) if name == "" else (1.0, 2.0))
    model = small()
    fast = sc.accelerate(model, X)
    assert {plan.reason for plan in fast.plan.layers if plan.name} == {"not faster"}
    assert type(fast.fc) is nn.Linear
    assert isinstance(fast.conv1, Sparse)
    network_calls.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert network_calls == [8]


def test_no_faster_as_one(no_clock):
    no_clock(lambda name, bucket: (1.0, 1.0) if name in ("", "conv1") else (2.0, 1.0))
    fast = sc.accelerate(small(), X)
    assert row(fast).reason == "not faster"
    assert type(fast) is ResNet
    assert type(fast.conv1) is nn.Conv2d


def test_by_row_class_and_by_the_whole_model(network_calls, no_clock, monkeypatch):
    no_clock(lambda name, bucket: (2.0, 1.0) if name or bucket > 8 else (1.0, 1.0))
    fast = sc.accelerate(small(), [X[:1], X])
    assert [t.sparse for t in row(fast).timings] == [False, True]
    network_calls.clear()
    fast(X[:1])
    assert network_calls == []
    fast(X)
    assert network_calls == [8]
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(1.0, 0.9, 1.1))
    fast = sc.accelerate(small(), X)
    assert {plan.reason for plan in fast.plan.layers} == {"the whole model was not faster"}
    assert not any(isinstance(module, Swapped) for module in fast.modules())


def test_plans_are_used_again(network_calls, no_clock, monkeypatch):
    no_clock(lambda name, bucket: (1.0, 2.0) if name == "conv1" else (2.0, 1.0))
    model = small()
    fast = sc.accelerate(model, X)
    monkeypatch.setattr(tuning, "times", None)
    monkeypatch.setattr(tuning, "gain", None)
    for plan in (fast.plan, json.loads(json.dumps(fast.plan.to_dict()))):
        again = sc.accelerate(model, X, plan=plan)
        network_calls.clear()
        assert again(X).equal(fast(X))
        assert network_calls == [8, 8]
        assert again.plan == fast.plan

    class Other(ResNet):
        def forward(self, x):
            return super().forward(x) * 2

    other = copy.deepcopy(model)
    other.__class__ = Other
    with pytest.raises(InputError, match=r"another model(.|\n)*Leave plan out"):
        sc.accelerate(other, X, plan=fast.plan)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(network_calls, sparse_wins, make):
    fast = sc.accelerate(small(), X)
    expected = fast(X)
    one = make(fast)
    network_calls.clear()
    assert one(X).equal(expected)
    assert network_calls == [8]
    assert sc.explain(one) == fast.plan


def test_inputs_that_are_looked_at_are_no_network(sparse_wins):
    fast = sc.accelerate(small(), X, check_inputs=True)
    assert row(fast).reason == "each layer looks at its inputs"
    assert type(fast) is ResNet


def test_rounded_weights(network_calls, sparse_wins):
    model = small()
    fast = sc.accelerate(model, X, values=torch.bfloat16)
    network_calls.clear()
    got = fast(X)
    assert network_calls == [8]
    assert off(got, ResNet.forward(fast, X)) <= 1e-6
    assert off(got, model(X).detach()) > 1e-5


class Turned(nn.Module):
    """Does something else where it is traced."""

    def __init__(self):
        super().__init__()
        self.block = Basic(3, 3)

    def forward(self, x):
        return self.block(x) if type(x) is torch.Tensor else -self.block(x)


class Listed(Turned):
    """Joins what it is given, if that is no tensor."""

    def forward(self, x):
        return self.block(x) if isinstance(x, torch.Tensor) else torch.cat(x, 1) + self.block(x)


@pytest.mark.parametrize("kind", [Turned, Listed])
def test_what_computes_something_else_is_given_up(sparse_wins, kind, monkeypatch):
    monkeypatch.setattr(Watch, "_code_is_fine", lambda *_: True)  # as if nothing were seen in its code
    model = lively(kind())
    with monkeypatch.context() as unseen:
        unseen.setattr(networks, "agree", lambda *_: True)
        wrong = sc.accelerate(model, X).plan
    for plan in (None, wrong):
        fast = sc.accelerate(model, X, plan=plan)
        assert row(fast).reason == "as one call it computes something else"
        assert type(fast) is kind
        assert off(fast(X), model(X).detach()) <= 1e-5


class Planned(nn.Module):
    """Has a `plan` that is none of ours."""

    def __init__(self):
        super().__init__()
        self.block, self.plan = Basic(3, 3), 1

    def forward(self, x):
        return self.block(x) * self.plan


def test_a_plan_of_the_model_itself_is_looked_at(network_calls, sparse_wins):
    model = lively(Planned())
    fast = sc.accelerate(model, X)
    fast(X)
    assert network_calls
    for scale in (2, 3):
        fast.plan = model.plan = scale
        assert off(fast(X), model(X).detach()) <= 1e-5


def test_blocks_of_a_model_that_cannot_be_traced(network_calls, sparse_wins):
    class Early(nn.Module):
        """Ends early for some inputs."""

        def __init__(self):
            super().__init__()
            self.first, self.second, self.never = Basic(3, 3), Basic(3, 4), Basic(3, 3)

        def forward(self, x):
            x = self.first(x)
            return x if x.sum() < 0 else self.second(x)

    model = lively(Early())
    fast = sc.accelerate(model, X)
    found = {plan.name: plan.reason for plan in fast.plan.layers if plan.kind.startswith("network")}
    assert found == {"first": "", "second": ""}
    network_calls.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert network_calls == [2, 3]


def test_runs_of_linear_beside_it_and_in_it(network_calls, sparse_wins):
    fast = sc.accelerate(lively(vgg()), X)
    assert (row(fast).reason, row(fast, "classifier[0:4]").reason) == ("", "")
    flat = [*fast.features, nn.Flatten(), *fast.classifier]
    model = lively(nn.Sequential(*sc.dense(nn.Sequential(*flat))))
    fast = sc.accelerate(model, X)
    assert row(fast, "[12:16]").reason == "part of a network"
    assert type(fast).__name__ == "SparseSequential"
    network_calls.clear()
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert network_calls == [5]


def test_dense_convolutions_are_no_network(sparse_wins):
    model = ResNet(widths=(4, 8), depth=1).eval()
    assert not any(plan.kind.startswith("network") for plan in sc.accelerate(model, X).plan.layers)


def test_without_the_library_there_is_none(without_native, sparse_wins):
    assert not any(plan.kind.startswith("network") for plan in sc.accelerate(small(), X).plan.layers)


def test_the_real_clock(monkeypatch):
    for name, value in (("_CACHE_BYTES", 1 << 20), ("_SECONDS", 0.01), ("_GAIN", ((0.01, 3),))):
        monkeypatch.setattr(tuning, name, value)
    model = small()
    fast = sc.accelerate(model, [X[:1], X])
    assert len(row(fast).timings) == 2
    assert off(fast(X), model(X).detach()) <= 1e-5
