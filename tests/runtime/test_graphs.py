"""Traces: what a forward does, found without any effect, or not at all."""

import copy
import operator
import random
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from networks_by_hand import Basic, ResNet, lively, vgg
from secateur.runtime import attributes, graphs
from sparse_models import sparse


class Forward(nn.Module):
    """A module whose forward is given."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.does = forward
        vars(self).update(attributes)
        self.register_buffer("count", torch.zeros(2))
        self.eval()

    def forward(self, x):
        return self.does(self, x)


def targets(graph):
    return [node.target for node in graph.nodes if node.op.startswith("call")]


def test_a_forward_as_it_is_called():
    graph = graphs.trace(Basic(4, 4).eval())
    assert targets(graph) == ["conv1", "bn1", "relu", "conv2", "bn2", operator.iadd, "relu"]
    assert [node.op for node in graph.nodes][::8] == ["placeholder", "output"]


def test_arguments_with_defaults_have_these():
    class Other(nn.Module):
        def forward(self, x, twice=False, *rest, add=None):
            return (x * 2 if twice else x).neg() if add is None else x + add

    assert targets(graphs.trace(Other().eval())) == ["neg"]


def two_inputs(self, x, y=None, /, *, z):
    return x


EFFECTS = {
    "attribute": lambda self, x: setattr(self, "calls", 1) or x,
    "removed": lambda self, x: delattr(self, "note") or x,
    "counter": lambda self, x: self.seen.update(calls=self.seen.get("calls", 0) + 1) or x,
    "list": lambda self, x: self.kept.append(x) or x,
    "inner list": lambda self, x: self.seen["inner"].append(1) or x,
    "of a config": lambda self, x: setattr(self.config, "last", 1) or x,
    "tensor": lambda self, x: (self.mean.add_(1) and x) or x,
    "Python's random": lambda self, x: x * random.random(),
    "NumPy's random": lambda self, x: x * np.random.rand(),
    "torch's random": lambda self, x: x + torch.rand(2, 1, 1),
    "constant": lambda self, x: x + torch.ones(2, 1, 1),
}


class Config:
    last = 0


@pytest.mark.parametrize("effect", EFFECTS)
def test_what_has_an_effect_is_no_graph_and_is_undone(effect):
    held = {"seen": {"inner": []}, "kept": [], "config": Config(), "mean": torch.zeros(1), "note": "a"}
    module = Forward(EFFECTS[effect], **held)
    before = {name: copy.copy(value) for name, value in vars(module).items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert graphs.trace(module) is None
    assert vars(module).keys() == before.keys()
    assert (module.seen, module.kept, vars(module.config), module.note) == ({"inner": []}, [], {}, "a")
    assert not module.mean.any()
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


UNKNOWN = {
    "control flow": lambda self, x: x if x.sum() > 0 else -x,
    "a loop": lambda self, x: sum(one for one in x),
    "an item set": lambda self, x: x.__setitem__(0, 1) or x,
    "NumPy": lambda self, x: torch.from_numpy(np.asarray(x)),
    "an error": lambda self, x: x + undefined,  # noqa: F821
    "a buffer replaced": lambda self, x: setattr(self, "count", self.count + 1) or x,
}


@pytest.mark.parametrize("forward", UNKNOWN)
def test_what_cannot_be_traced_is_no_graph(forward):
    module = Forward(UNKNOWN[forward])
    assert graphs.trace(module) is None
    assert module.count.equal(torch.zeros(2))


def test_two_inputs_are_no_graph():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    assert graphs.trace(Two()) is None


def test_a_time_differs_from_trace_to_trace():
    module = Forward(lambda self, x: x * time.perf_counter())
    assert graphs.fingerprint(graphs.trace(module)) != graphs.fingerprint(graphs.trace(module))


def test_in_place_is_told_from_out_of_place():
    def forward(self, x):
        y = self.conv(x)
        y += x
        y -= x
        y *= 2
        return y + x

    found = targets(graphs.trace(Forward(forward)))
    assert found == ["conv", operator.iadd, operator.isub, operator.imul, operator.add]


def test_buffers_are_read_and_written_when_it_runs():
    module = Forward(lambda self, x: (self.count.add_(1), self.conv(x))[1])
    graph = graphs.trace(module)
    assert [node.op for node in graph.nodes] == ["placeholder", "get_attr", "call_method", "call_module", "output"]
    assert not module.count.any()


def test_what_is_followed_and_what_is_called():
    model = sparse(lively(vgg()))
    assert attributes.is_leaf(model.classifier)
    assert attributes.is_leaf(model.features[0])
    assert not attributes.is_leaf(model.features)
    assert not attributes.is_leaf(nn.ModuleList([nn.ReLU()]))
    assert targets(graphs.trace(model))[-3:] == ["features.10", "flatten", "classifier"]
    found = attributes.inside(model)
    assert model.classifier in found
    assert model.features[0] in found
    assert model.classifier[0] not in found


def test_words_are_those_of_what_it_does():
    one, other = (graphs.trace(ResNet(widths=(4,)).eval()) for _ in range(2))
    assert graphs.fingerprint(one) == graphs.fingerprint(other)
    two = graphs.trace(ResNet(widths=(4,), depth=1).eval())
    assert graphs.fingerprint(one) != graphs.fingerprint(two)
    half, whole = (graphs.trace(Forward(lambda self, x, n=n: x * n)) for n in (0.5, 1.0))
    assert graphs.fingerprint(half) != graphs.fingerprint(whole)
    given = graphs.trace(Forward(lambda self, x: torch.sum(x, dim=[1, 2], dtype=torch.float64)))
    assert "0x" not in graphs.fingerprint(given)


def test_other_threads_go_on_meanwhile(monkeypatch):
    other, results, reached, go = (
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(),
        [],
        threading.Event(),
        threading.Event(),
    )

    def work():
        assert reached.wait(10)
        results.extend([other(torch.ones(1, 3)), other[0].weight])
        go.set()

    class Slow(graphs.Watch):
        def __enter__(self):
            reached.set()
            assert go.wait(10)
            return super().__enter__()

    monkeypatch.setattr(graphs, "Watch", Slow)
    thread = threading.Thread(target=work)
    thread.start()
    graph = graphs.trace(Forward(lambda self, x: self.conv(x)))
    thread.join()
    assert targets(graph) == ["conv"]
    assert results[0].equal(other(torch.ones(1, 3)))
    assert results[1] is other[0].weight


def test_what_other_threads_set_meanwhile_stays(monkeypatch):
    block, kept = Basic(4, 4).eval(), graphs._Tracer.trace
    block.config = {"calls": 1}

    def with_others(self, root):
        block.scale, block.config["calls"] = 2.0, 2
        return kept(self, root)

    monkeypatch.setattr(graphs._Tracer, "trace", with_others)
    assert graphs.trace(block) is not None
    assert (block.scale, block.config) == (2.0, {"calls": 2})


def test_what_cannot_be_copied_says_so():
    block = Basic(4, 4).eval()
    block.lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be copied"):
        graphs.trace(block)
