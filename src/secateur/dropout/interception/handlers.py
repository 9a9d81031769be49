"""Dropout calls, wherever they are written: how they are seen in a model that stays in `eval()`.

A `TorchFunctionMode` sees each torch function that the model calls. Those that would drop something, were the model in
training, are met by a handler: `Lister` writes them down, `Sampler` gives them the noise of a sample. Which functions
these are, and what each does, is in `functions`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.dropout.interception.recurrent_calls import Recurrence
from secateur.dropout.interception.rules import HANDLED, RANDOM
from secateur.dropout.noise import SAMPLING
from secateur.dropout.sampling.prefix import Boundary, Prefix, Unsuitable
from secateur.dropout.sampling.strategies import Alone, Combine, Folded, Mapped, Noise
from secateur.dropout.substitution import sweep


@dataclass(frozen=True)
class Call:
    """One dropout call of a model.

    Attributes:
        path: the module in whose code it stands, "" for the model itself.
        kind: what it is: "dropout", "alpha_dropout", "lstm", "attention" ...
        rate: fraction that is dropped, or None where no one rate says it.
        shape: of the tensor that it acts on, for the inputs given.
        line: of the code that calls it.
        seen: the rate that the call itself shows in `eval()`.
        repeats: along each dimension, how many elements of the batch there are: `shared=True` gives them one mask.
    """

    path: str
    kind: str
    rate: float | None
    shape: torch.Size
    line: int = 0
    seen: float | None = None
    repeats: tuple[int, ...] = ()

    @property
    def site(self) -> tuple[str, int, str]:
        """Where in the code it is."""
        return self.path, self.line, self.kind


class Handler(TorchFunctionMode):
    """What a model's torch functions go through."""

    def __init__(self) -> None:
        super().__init__()
        self.outer: tuple[str, bool] | None = None
        """Name and `training` of the Python function of torch that is being looked into."""
        self.direct = False
        """Calls without noise are made at once, not by `plain`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        handle = HANDLED.get(func)
        if handle is not None:
            return handle(self, func, args, kwargs or {})
        if self.direct:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self.plain(func, args, kwargs or {})

    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> Call | None:
        """Take note of a dropout call; the call with its rate, or None to leave it alone."""
        raise NotImplementedError

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that has no noise in it."""
        return func(*args, **kwargs)

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        """Run a recurrent layer that has no noise in it."""
        return recurrence.result

    def put(self, call: Call, x: Tensor, shape: Sequence[int], combine: Combine, axis: int = 0) -> Tensor:
        """Put noise into a tensor whose batch lies along `axis`; `shape` is that of the random numbers."""
        raise NotImplementedError

    def numbers(self, call: Call, like: Tensor, shape: Sequence[int], normal: bool) -> Tensor:
        """Give random numbers themselves."""
        raise NotImplementedError

    def write(self, x: Tensor, result: Tensor) -> Tensor:
        """Give what a call with `inplace=True` gives."""
        return result


class Lister(Handler):
    """Writes the dropout calls of a model down, and leaves them out.

    Args:
        names: the name of each module, by its id.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.calls: list[tuple[Call, bool]] = []
        """Each with whether the call itself asks for noise."""
        self.random: list[Call] = []
        """Calls of random functions that are no dropout."""
        self.moved = False
        """The run has drawn from a global generator."""
        self._names = names

    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> None:
        path, line = _where(self._names)
        rate = None if rate is None else float(rate)
        self.calls.append((Call(path, kind, rate, torch.Size(shape), line, rate), training))

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in RANDOM or (func == functional.rrelu and kwargs.get("training")):
            path, line = _where(self._names)
            self.random.append(Call(path, func.__name__, None, torch.Size(), line))
        return func(*args, **kwargs)


class Follower(Handler):
    """Meets the dropout calls of a model as they were listed.

    Args:
        calls: in order; what is off in training has a rate of 0.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self._calls, self._next = calls, 0

    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> Call | None:
        if self._next == len(self._calls) or self._calls[self._next].kind != kind:
            raise Unsuitable("the model makes other dropout calls from one pass to the next")
        call = self._calls[self._next]
        self._next += 1
        if call.seen is not None and rate is not None and float(rate) != call.seen:
            raise Unsuitable(f"the rate of {kind} in {call.path or 'the model'} is not what it was")
        return None if call.rate == 0 else call


class Sampler(Follower):
    """Gives the dropout calls of a model the noise of a sample, or of several.

    Args:
        way: how samples are taken.
        calls: the dropout calls.
        prefix: record what comes before the first dropout and stop there; or, if it is closed, play it.
        shared: one mask for the whole batch.
    """

    def __init__(self, way: Alone, calls: Sequence[Call], *, prefix: Prefix | None = None, shared: bool = False):
        super().__init__(calls)
        self._way, self._prefix, self._shared = way, prefix, shared
        self._begun = False
        self.direct = prefix is None

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._begun or self._prefix is None:
            return self._way.plain(func, args, kwargs)
        return self._prefix.run(func, args, kwargs)

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        if self._begun or self._prefix is None:
            return self._way.step(recurrence)
        result: tuple[Tensor, ...] = self._prefix.run(_result, (recurrence,), {})
        return result

    def put(self, call: Call, x: Tensor, shape: Sequence[int], combine: Combine, axis: int = 0) -> Tensor:
        self._begin()
        return self._way.put(self._noise(call, x.shape, shape, combine), x, axis)

    def numbers(self, call: Call, like: Tensor, shape: Sequence[int], normal: bool) -> Tensor:
        self._begin()
        wanted = self._noise(call, torch.Size(shape), shape, _second)
        return self._way.numbers(replace(wanted, normal=normal), like.device)

    def write(self, x: Tensor, result: Tensor) -> Tensor:
        return x.copy_(result) if self._way.exact else result

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self.direct = not isinstance(self._way, (Folded, Mapped))
        if self._prefix is not None and not self._prefix.closed:
            self._prefix.close()
            raise Boundary
        if self._prefix is not None:
            self._prefix.finish()

    def _noise(self, call: Call, now: torch.Size, shape: Sequence[int], combine: Combine) -> Noise:
        """What a call asks for, in one sample: `now` may have samples folded into it."""
        if not self._shared and not isinstance(self._way, Folded):
            return Noise(shape, combine, now)
        if len(now) != len(call.shape):
            raise Unsuitable(f"{call.kind} of another shape than in the first pass")
        skipped = len(call.shape) - len(shape)
        own = [
            before if size == there else size
            for size, there, before in zip(shape, now[skipped:], call.shape[skipped:], strict=True)
        ]
        repeats: tuple[int, ...] = ()
        if self._shared:
            repeats = tuple(n if size % n == 0 else 1 for size, n in zip(own, call.repeats[skipped:], strict=True))
            own = [size // n for size, n in zip(own, repeats, strict=True)]
        return Noise(own, combine, call.shape, repeats if any(n > 1 for n in repeats) else ())


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Let a model run under a handler."""
    token = SAMPLING.set(True)
    try:
        with handler:
            try:
                yield
            finally:
                sweep()
    finally:
        SAMPLING.reset(token)


def _where(names: Mapping[int, str]) -> tuple[str, int]:
    """The module of the model whose code is running, and its line: the first argument of a function on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        first = frame.f_code.co_varnames[:1]
        if frame.f_code.co_argcount and first:
            owner = frame.f_locals.get(first[0])
            if isinstance(owner, nn.Module) and id(owner) in names:
                return names[id(owner)], frame.f_lineno
        frame = frame.f_back
    return "", 0


def _result(recurrence: Recurrence) -> tuple[Tensor, ...]:
    return recurrence.result


def _second(x: Tensor, numbers: Tensor) -> Tensor:
    return numbers
