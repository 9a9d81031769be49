"""What a forward may depend on: what can be watched, or cannot change. All else is no graph."""

import collections
import contextlib
import dataclasses
import enum
import functools
import gc
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.runtime import graphs

FLAG, OPTIONS, ask = True, {"skip": True}, isinstance


class Base(nn.Module):
    """A module with one attribute, of any kind."""

    def __init__(self, kept=None):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(2, 2, 1), kept
        self.register_buffer("count", torch.zeros(2))
        self.eval()

    def forward(self, x):
        return x if self.kept else self.conv(x)


def of(forward, kept=None):
    """A module of a class of its own, with this forward."""
    return type("Own", (Base,), {"forward": forward, "__module__": __name__})(kept)


@dataclasses.dataclass
class Slots:
    __slots__ = ("skip",)
    skip: bool


@contextlib.contextmanager
def around():
    yield


def helper(self, x):
    return x if torch.is_tensor(x) else self.conv(x)


def memory(self, x, seen={}):
    return x if seen else self.conv(x)


def with_type(self, x):
    match x:
        case torch.Tensor():
            return x
    return self.conv(x)


def with_autocast(self, x):
    with torch.autocast("cpu"):
        return self.conv(x)


def with_try(self, x):
    try:
        return self.conv(x.missing)
    except AttributeError:
        return x


def with_import(self, x):
    from math import pi

    return self.conv(x) * pi


def closed(value):
    return lambda self, x: x if value else self.conv(x)


def scaled(self, x):
    return x * self.forward.scale


scaled.scale = 2.0


def helped(x):
    return x


helped.scale = 2.0


class Scaled:
    scale = 2.0


def class_by_another_name(self, x):
    kind = Scaled
    return x * kind.scale


def function_by_another_name(self, x):
    one = helped
    return one(x) * one.scale


def by_another_name(self, x):
    backend = torch.backends.mkldnn
    return x if backend.enabled else self.conv(x)


def many_names():
    """A forward with more names than fit into a byte, before those that it must not read."""
    lines = [f"    self.kept.name{i}" for i in range(300)]
    space = {"sys": sys, "__name__": __name__}
    exec("\n".join(["def forward(self, x):", *lines, "    return x if sys.flags else self.conv(x)"]), space)
    return space["forward"]


class Names:
    def __init__(self):
        vars(self).update({f"name{i}": i for i in range(300)})


CODE = {
    "isinstance": lambda self, x: x if isinstance(x, torch.Tensor) else self.conv(x),
    "isinstance by another name": lambda self, x: x if ask(x, torch.Tensor) else self.conv(x),
    "type": lambda self, x: x if type(x) is torch.Tensor else self.conv(x),
    "class": lambda self, x: x if x.__class__ is torch.Tensor else self.conv(x),
    "hasattr": lambda self, x: self.conv(x) if hasattr(x, "missing") else x,
    "is_tensor": helper,
    "is_tensor in a helper": lambda self, x: helper(self, x),
    "match": with_type,
    "words": lambda self, x: x if str(x.dtype) == "torch.float32" else self.conv(x),
    "format": lambda self, x: x if f"{x.dtype}" == "torch.float32" else self.conv(x),
    "the same": lambda self, x: x if x.dtype is torch.float32 else self.conv(x),
    "try": with_try,
    "import": with_import,
    "autocast": with_autocast,
    "autocast around": torch.autocast("cpu")(lambda self, x: self.conv(x)),
    "no_grad around": torch.no_grad()(lambda self, x: self.conv(x)),
    "its own around": around()(lambda self, x: self.conv(x)),
    "entered": lambda self, x: contextlib.ExitStack().enter_context(torch.no_grad()) or self.conv(x),
    "grad mode": lambda self, x: self.conv(x) if torch.is_grad_enabled() else x,
    "autocast mode": lambda self, x: x if torch.is_autocast_enabled("cpu") else self.conv(x),
    "threads": lambda self, x: x * torch.get_num_threads(),
    "a global": lambda self, x: x if FLAG else self.conv(x),
    "a global dict": lambda self, x: x if OPTIONS["skip"] else self.conv(x),
    "a closure": closed(True),
    "a default": memory,
    "data of a module": lambda self, x: x if sys.flags else self.conv(x),
    "an attribute of itself": scaled,
    "an attribute of a function": lambda self, x: x * helped.scale,
    "an attribute of a function by another name": function_by_another_name,
    "a class by another name": class_by_another_name,
    "an object of a class": lambda self, x: x * Scaled().scale,
    "a backend by another name": by_another_name,
    "a backend": lambda self, x: x if torch.backends.mkldnn.enabled else self.conv(x),
    "its parameters": lambda self, x: self.conv(x) * next(self.parameters()).sum().item(),
}


@pytest.mark.parametrize("what", CODE)
def test_code_that_sees_more_than_is_watched_is_no_graph(what):
    mode = torch.is_grad_enabled()
    assert graphs.trace(of(CODE[what])) is None
    assert torch.is_grad_enabled() is mode


HELD = {
    "slots": lambda: Slots(True),
    "slots in a list": lambda: [Slots(True)],
    "an array": lambda: np.ones(1),
    "a tensor": lambda: torch.ones(1),
    "a tensor in a dict": lambda: {"scale": torch.ones(1)},
    "another module": lambda: [Base()],
    "a generator": lambda: iter([1, 2]),
    "a generator of numbers": lambda: np.random.default_rng(0),
    "arguments": lambda: functools.partial(F.gelu, approximate="tanh"),
}


@pytest.mark.parametrize("kind", HELD)
def test_an_attribute_that_cannot_be_watched_is_no_graph_where_it_is_read(kind):
    assert graphs.trace(Base(HELD[kind]())) is None
    assert graphs.trace(of(lambda self, x: self.conv(x), HELD[kind]())) is not None


def test_code_with_many_names_is_read_alike():
    assert graphs.trace(of(many_names(), Names())) is None


def test_numbers_are_not_drawn():
    module = of(lambda self, x: self.conv(x) * self.kept.random(), np.random.default_rng(0))
    assert graphs.trace(module) is None
    assert module.kept.random() == np.random.default_rng(0).random()


class Mode(enum.Enum):
    SKIP = 1


class Config:
    skip = True


WATCHED = {
    "nothing": lambda: None,
    "a word": lambda: "same",
    "a mode": lambda: Mode.SKIP,
    "a dict in a tuple": lambda: ({"skip": [1]},),
    "a queue": lambda: collections.deque([1]),
    "an object": Config,
    "a function": lambda: F.relu,
    "a size": lambda: torch.Size([1]),
    "a scalar": lambda: np.float32(2),
}


@pytest.mark.parametrize("kind", WATCHED)
def test_an_attribute_that_can_be_watched_may_be_read(kind):
    assert graphs.trace(Base(WATCHED[kind]())) is not None


PLAIN = {
    "math": lambda self, x: self.conv(x) * math.sqrt(2 / math.pi),
    "functions": lambda self, x: F.relu(torch.add(self.conv(x), x)),
    "a loop": lambda self, x: [layer(x) for layer in (self.conv, self.conv)][1],
    "a type of torch": lambda self, x: self.conv(x).to(torch.float32),
    "a function that has an attribute": lambda self, x: helped(self.conv(x)),
    "is not None": lambda self, x: self.conv(x) if self.kept is None else x,
    "scripting": lambda self, x: x if torch.jit.is_scripting() else self.conv(x),
}


@pytest.mark.parametrize("what", PLAIN)
def test_what_people_write_is_traced(what):
    assert graphs.trace(of(PLAIN[what])) is not None


def test_what_watched_calls_before_does_so_again():
    seen = []

    def former(frame, event, argument):
        seen.append(event)

    sys.setprofile(former)
    try:
        assert graphs.trace(Base()) is not None
        assert sys.getprofile() is former
    finally:
        sys.setprofile(None)
    assert seen


def test_a_class_is_as_it_was_after_a_trace():
    module = of(lambda self, x: self.step(x))
    kind = type(module)
    kind.calls = 0

    @classmethod
    def step(cls, x):
        cls.calls += 1
        cls.more = 1
        return x

    kind.step = step
    assert graphs.trace(module) is None
    assert kind.calls == 0
    assert not hasattr(kind, "more")


def test_what_collects_garbage_meanwhile_is_no_part_of_a_forward():
    seen = []

    def told(phase, info):
        seen.append(isinstance(phase, str) and type(info))

    many = of(lambda self, x: [[self.conv(x)] for _ in range(50)][-1][0])
    before = gc.get_threshold()
    gc.callbacks.append(told)
    gc.set_threshold(1)  # at nearly every object that is made
    try:
        found = graphs.trace(many)
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(told)
    assert found is not None
    assert seen
    assert gc.isenabled()
