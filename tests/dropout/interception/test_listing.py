"""Noise that no seed reaches: each source is written down, with its place, and no generator is moved."""

import pickle
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import Model, linear, scripted

import secateur as sc
from secateur.dropout.interception.isolation import undisturbed
from secateur.dropout.interception.listing import Generators, listed

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def unreached(forward, **parts):
    model = Model(forward, drop=nn.Dropout(0.3), **parts).eval()
    found = sc.dropout.find(model, X)
    assert [(call.kind, call.rate) for call in found] == [("dropout", 0.3)]
    return [one.what.partition(" (line")[0] for one in found.unreached]


def helper(x):
    return x * torch.rand_like(x) + torch.rand_like(x)


@torch.no_grad()
def _loop(x):
    for _ in range(5):
        x = x + torch.randn_like(x)
    return x


PYTHON = "Python's random"
HIDDEN = {
    "two on one line": (lambda s, x: x * torch.rand_like(x) + torch.rand_like(x), ["rand_like", "rand_like"]),
    "two kinds on one line": (lambda s, x: x * torch.rand(8) + torch.randn(8), ["rand", "randn"]),
    "two in a function that is called": (lambda s, x: helper(x), ["rand_like", "rand_like"]),
    "one in a loop": (lambda s, x: _loop(x), ["randn_like"]),
    "a function of torch": (lambda s, x: F.dropout(x, 0.5), ["dropout"]),
    "two functions of torch": (lambda s, x: F.dropout(F.dropout(x, 0.5), 0.2), ["dropout", "dropout"]),
    "of torch and of Python": (lambda s, x: x * torch.rand(8) * random.random(), ["rand", PYTHON]),
    "of Python and of numpy": (lambda s, x: x * random.random() + np.random.rand(), ["numpy.random", PYTHON]),
    "of Python, on two lines": (lambda s, x: twice(x), [PYTHON, PYTHON]),
    "a generator of numpy": (lambda s, x: x * s.rng.random(), ["rng"]),
    "a generator of Python": (lambda s, x: x * s.own.random(), ["own"]),
}  # fmt: skip


def twice(x):
    x = x * random.random()
    return x + random.random()


def named(whats):
    return sorted(what.removeprefix("random numbers of ") for what in whats)


def made():
    return {"rng": np.random.default_rng(0), "own": random.Random(0)}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("place", ["before", "after"])
def test_each_source_of_training_is_named(name, place):
    """Before the dropout and after it."""
    noise, right = HIDDEN[name]

    def forward(self, x):
        if self.training and place == "before":
            x = noise(self, x)
        x = self.drop(x)
        return noise(self, x) if self.training and place == "after" else x

    assert named(unreached(forward, **made())) == sorted(right)


@pytest.mark.parametrize("name", [name for name in HIDDEN if "dropout" not in HIDDEN[name][1]])
@pytest.mark.parametrize("place", ["before", "after"])
def test_each_source_of_eval_is_named(name, place):
    noise, right = HIDDEN[name]

    def forward(self, x):
        x = noise(self, x) if place == "before" else x
        x = self.drop(x)
        return noise(self, x) if place == "after" else x

    assert named(unreached(forward, **made())) == sorted(right)


def test_noise_of_eval_and_other_noise_of_training():
    def forward(self, x):
        x = self.drop(x) + torch.randn(8)
        return x * torch.rand(8) + random.random() if self.training else x

    assert named(unreached(forward)) == ["Python's random", "rand", "randn"]


def test_two_modules_with_the_same_noise():
    class Noisy(nn.Module):
        def forward(self, x):
            return x * random.random() if self.training else x

    found = sc.dropout.find(nn.Sequential(nn.Dropout(), Noisy(), Noisy()).eval(), X)
    assert [one.path for one in found.unreached] == ["1", "2"]


def test_two_dropouts_on_one_line_keep_their_rates():
    def forward(self, x):
        return F.dropout(F.dropout(x, 0.5) if self.training else x, 0.2, self.training)

    found = sc.dropout.find(Model(forward).eval(), X)
    assert [call.rate for call in found] == [0.2]
    assert len(found.unreached) == 1


def test_what_is_scripted_is_seen_beside_what_is_not():
    inner = scripted(_scripted)

    def forward(self, x):
        x = self.drop(x)
        return inner(x) * torch.rand(8) if self.training else x

    assert unreached(forward) == ["rand_like", "rand"]


def _scripted(x):
    return x * torch.rand_like(x)


def test_no_generator_is_moved():
    def forward(self, x):
        noise = torch.rand(8) + random.random() + np.random.rand() + self.rng.random() + self.own.random()
        return self.drop(x) + noise + torch.rand(8, generator=self.torch)

    parts = made()
    model = Model(forward, drop=nn.Dropout(0.3), torch=torch.Generator(), **parts).eval()

    def states():
        kept = random.getstate(), np.random.get_state(), parts["rng"].bit_generator.state, parts["own"].getstate()
        return pickle.dumps(kept), torch.get_rng_state().tolist(), model.torch.get_state().tolist()

    before = states()
    sc.dropout.find(model, X)
    assert states() == before


def test_other_threads_are_not_blamed():
    """They draw from the generators of all; what counts is what this thread asks torch for."""
    model, stop = nn.Sequential(linear(), nn.Dropout(0.5), linear()).eval(), threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(10)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        found = [sc.dropout.find(model, X).unreached for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert found == [()] * 20


def test_generators_tell_which_were_drawn_from():
    model = nn.Sequential(Model(lambda s, x: x, **made()))
    generators = Generators(model)
    assert generators.drawn() == []
    model[0].rng.random()
    random.random()
    assert sorted(generators.drawn()) == ["0.rng", "Python's random"]
    assert generators.drawn() == []
    generators.put_back()
    assert sorted(generators.drawn()) == ["0.rng", "Python's random"]


def test_a_list_says_where_each_call_stands():
    model = nn.Sequential(linear(), nn.Dropout(0.3)).eval()
    with undisturbed():
        lister, answer = listed(model, ((X,), {}))
    ((call, asks),) = lister.calls
    assert (call.path, call.kind, call.rate, asks) == ("1", "dropout", 0.3, False)
    assert torch.equal(answer, model[0](X))
