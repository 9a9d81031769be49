"""The handler that gives the dropout calls of a model the noise of a sample, or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.dropout.interception.followers import Follower, Unsuitable
from secateur.dropout.interception.handlers import Combine, DropoutCall
from secateur.dropout.interception.recurrent_calls import Recurrence
from secateur.dropout.sampling.prefix import Boundary, Prefix
from secateur.dropout.sampling.separation import Sized
from secateur.dropout.sampling.strategies import Alone, Folded, Mapped, Noise


class Sampler(Follower):
    """Gives the dropout calls of a model the noise of a sample, or of several.

    Args:
        way: how samples are taken.
        calls: the dropout calls.
        prefix: record what comes before the first dropout and stop there; or, if it is closed, play it.
        shared: one mask for the whole batch.
        made: takes the calls that are made behind the first dropout.
    """

    def __init__(
        self,
        way: Alone,
        calls: Sequence[DropoutCall],
        *,
        prefix: Prefix | None = None,
        shared: bool = False,
        made: list[Sized] | None = None,
    ) -> None:
        super().__init__(calls)
        self._way, self._prefix, self._shared, self._made = way, prefix, shared, made
        self._begun = False
        self.direct = prefix is None

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._begun or self._prefix is None:
            result = self._way.plain(func, args, kwargs)
            if self._begun and self._made is not None:
                self._made.append(Sized.of(func, args, kwargs, result))
            return result
        return self._prefix.run(func, args, kwargs)

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        if self._begun or self._prefix is None:
            return self._way.step(recurrence)
        result: tuple[Tensor, ...] = self._prefix.run(_result, (recurrence,), {})
        return result

    def put(self, call: DropoutCall, x: Tensor, shape: Sequence[int], combine: Combine, axis: int = 0) -> Tensor:
        self._begin()
        before = len(self._made or ())
        result = self._way.put(self._noise(call, x.shape, shape, combine), x, axis)
        if self._made is not None:
            del self._made[before:]  # of the noise, not of the model: inside attention they are seen
        return result

    def numbers(self, call: DropoutCall, like: Tensor, shape: Sequence[int], normal: bool) -> Tensor:
        self._begin()
        wanted = self._noise(call, torch.Size(shape), shape, _second)
        return self._way.numbers(replace(wanted, normal=normal), like.device)

    def write(self, x: Tensor, result: Tensor) -> Tensor:
        return x.copy_(result) if self._way.exact else result

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self.direct = self._made is None and not isinstance(self._way, (Folded, Mapped))
        if self._prefix is not None and not self._prefix.closed:
            self._prefix.close()
            raise Boundary
        if self._prefix is not None:
            self._prefix.finish()

    def _noise(self, call: DropoutCall, now: torch.Size, shape: Sequence[int], combine: Combine) -> Noise:
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


def _result(recurrence: Recurrence) -> tuple[Tensor, ...]:
    return recurrence.result


def _second(x: Tensor, numbers: Tensor) -> Tensor:
    return numbers
