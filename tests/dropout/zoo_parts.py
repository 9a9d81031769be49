"""What the models of the zoo are made of, and their list, which each of them joins; free of pytest."""

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Entry(NamedTuple):
    """One model of the zoo.

    Attributes:
        name: of the case.
        build: gives the model in `eval()`, its inputs, and what takes a tensor out of its answer (None: it is one).
        calls: path, kind and rate of each dropout call, in order.
        named: path and function of each that is out of reach.
        free: nothing is out of reach.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any, Callable[[Any], Any] | None]]
    calls: list[tuple[str, str, float | None]]
    named: list[tuple[str, str]]

    @property
    def free(self) -> bool:
        return not self.named


ZOO: list[Entry] = []


def entry(name, calls, named=()):
    """Add what a function makes: a model, its inputs, and possibly what takes a tensor out of its answer."""

    def add(make):
        def build():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(map(ord, name)))
                model, inputs, *output = make()
            if "eval" not in vars(model):  # an exported graph has no mode
                model.eval()
            return model, inputs, output[0] if output else None

        ZOO.append(Entry(name, build, list(calls), list(named)))
        return make

    return add


class Model(nn.Module):
    """A forward function, and what it uses."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


@contextmanager
def deprecated_jit():
    """torch.jit is deprecated; people have models of it all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit", FutureWarning)  # from torch 2.14 on
        yield


def scripted(part):
    with deprecated_jit():
        return torch.jit.script(part)


def first(answer):
    return answer[0]


def linear(inputs=8, outputs=8):
    return nn.Linear(inputs, outputs)


def vectors(batch=4):
    return torch.randn(batch, 8)


def sequences(batch=4, time=5):
    return torch.randn(batch, time, 8)
