"""Writing down what is random in one forward of a model: its dropout calls, and noise that is none."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.dropout.interception.handlers import DropoutCall, handling
from secateur.dropout.interception.rules import Dispatcher
from secateur.measurement.costs import devices
from secateur.support.inputs import Arguments


class Lister(Dispatcher):
    """Writes the dropout calls of a model down, and leaves them out.

    Args:
        names: the name of each module, by its id.
        others: generators to be watched at each call.
    """

    def __init__(self, names: Mapping[int, str], others: Generators | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[DropoutCall, bool]] = []
        """Each with whether the call itself asks for noise."""
        self.noise: list[DropoutCall] = []
        """Random numbers that are drawn all the same."""
        self._names, self._others = names, others

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.note()
        return super().__torch_function__(func, types, args, kwargs)

    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> None:
        rate = None if rate is None else float(rate)
        self.calls.append((self._here(kind, rate, shape), training))

    def note(self) -> None:
        """Write down which of the other generators have been drawn from since the last call."""
        for name in self._others.drawn() if self._others is not None else ():
            self.drawn(f"random numbers of {name}")

    def drawn(self, kind: str) -> None:
        """Write down that random numbers are drawn here."""
        self.noise.append(self._here(kind, None, ()))

    def _here(self, kind: str, rate: float | None, shape: Sequence[int]) -> DropoutCall:
        path, line, position = _where(self._names)
        return DropoutCall(path, kind, rate, torch.Size(shape), line, rate, position)


class _Seeded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operator of torch that draws random numbers, whoever calls it: Python, C++ or torch.jit."""

    supports_higher_order_operators = True

    def __init__(self, seen: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import dynamo, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            name = func.overloadpacket.__name__
            if not name.startswith(_WITHOUT_DROPOUT):
                self._seen(name)
        return func(*args, **(kwargs or {}))


_WITHOUT_DROPOUT = "_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_rnn", "miopen_rnn"
"""Operators that are random only by their dropout, which the handler has met and left out."""


class Generators:
    """Sources of random numbers that are not torch's: of Python, of numpy, and those that a module holds."""

    def __init__(self, model: nn.Module) -> None:
        self._sources: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
            "Python's random": (random.getstate, random.setstate),
            "numpy.random": (np.random.get_state, np.random.set_state),
        }
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                source = _source(value)
                if source is not None:
                    self._sources[f"{path}.{name}".strip(".")] = source
        self._kept = {name: get() for name, (get, _) in self._sources.items()}
        self._last = {name: pickle.dumps(state) for name, state in self._kept.items()}

    def drawn(self) -> list[str]:
        """Name those that have been drawn from since the last call, or since the beginning."""
        now = {name: pickle.dumps(get()) for name, (get, _) in self._sources.items()}
        last, self._last = self._last, now
        return [name for name, state in now.items() if state != last[name]]

    def put_back(self) -> None:
        """Give all of them the state that they had."""
        for name, (_, put) in self._sources.items():
            put(self._kept[name])


def _source(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return (lambda: bits.state), (lambda state: setattr(bits, "state", state))
    return None


def listed(model: nn.Module, call: Arguments, *, original: nn.Module | None = None) -> tuple[Lister, Any]:
    """Run a model and list what is random in it; what it gives, too.

    Args:
        original: what the model is a copy of: the parts of it that still run have names too.
    """
    names = {
        id(module): name.replace("_orig_mod.", "").removesuffix("_orig_mod")
        for one in (original, model)
        if one is not None
        for name, module in one.named_modules()
    }
    lister, answer, hidden = _listed(model, call, names)
    if hidden:  # of another generator than torch's: once more, to see where
        lister.noise = _listed(model, call, names, watch=True)[0].noise
    return lister, answer


def _listed(
    model: nn.Module, call: Arguments, names: Mapping[int, str], *, watch: bool = False
) -> tuple[Lister, Any, bool]:
    with _random_state(model) as others:
        lister = Lister(names, others if watch else None)
        with handling(lister), _Seeded(lister.drawn):
            answer = model(*call[0], **call[1])
        lister.note()
        return lister, answer, bool(others.drawn())


@contextmanager
def _random_state(model: nn.Module) -> Iterator[Generators]:
    """Put random numbers back afterwards: the global ones of torch, Python and numpy, and those that a module holds."""
    cuda = [device for device in devices(model) if device.type == "cuda"]
    others = Generators(model)
    held = {v: v.get_state() for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Generator)}
    with torch.random.fork_rng(devices=cuda):
        try:
            yield others
        finally:
            others.put_back()
            for generator, state in held.items():
                generator.set_state(state)


def _where(names: Mapping[int, str]) -> tuple[str, int, tuple[int, ...]]:
    """The module of the model whose code is running, its line, and the position within.

    It is the first argument of a function on the stack. What torch and this library do in between is left out.
    """
    frame: FrameType | None = sys._getframe(1)
    position: list[int] = []
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in ("torch", "secateur"):
            position.append(frame.f_lasti)
        first = frame.f_code.co_varnames[:1]
        if frame.f_code.co_argcount and first:
            owner = frame.f_locals.get(first[0])
            if isinstance(owner, nn.Module) and id(owner) in names:
                return names[id(owner)], frame.f_lineno, tuple(position)
        frame = frame.f_back
    return "", 0, tuple(position)
