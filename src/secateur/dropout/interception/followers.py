"""Meeting the dropout calls of a model again, as they were listed."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.dropout.interception.handlers import DropoutCall
from secateur.dropout.interception.rules import Dispatcher


class Unsuitable(Exception):
    """A way of taking samples does not fit this model; another one is tried."""


class Follower(Dispatcher):
    """Meets the dropout calls of a model as they were listed.

    Args:
        calls: in order; what is off in training has a rate of 0.
    """

    def __init__(self, calls: Sequence[DropoutCall]) -> None:
        super().__init__()
        self._calls, self._next = calls, 0

    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> DropoutCall | None:
        if self._next == len(self._calls) or self._calls[self._next].kind != kind:
            raise Unsuitable("the model makes other dropout calls from one pass to the next")
        call = self._calls[self._next]
        self._next += 1
        if call.seen is not None and rate is not None and float(rate) != call.seen:
            raise Unsuitable(f"the rate of {kind} in {call.path or 'the model'} is not what it was")
        return None if call.rate == 0 else call
