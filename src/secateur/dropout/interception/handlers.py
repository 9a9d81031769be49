"""Handlers of the dropout calls of a model that stays in `eval()`.

A `TorchFunctionMode` sees each torch function that the model calls. `rules` knows which of them would drop something in
training, and asks a handler what to do. One handler lists the calls, another gives them the noise of a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.dropout.interception.recurrent_calls import Recurrence
from secateur.dropout.noise import SAMPLING
from secateur.dropout.substitution import sweep

Combine = Callable[[Tensor, Tensor], Tensor]
"""Puts random numbers into a tensor, element by element: of both, with one dimension of samples in front."""


@dataclass(frozen=True)
class DropoutCall:
    """One dropout call of a model.

    Attributes:
        path: the module in whose code it stands, "" for the model itself.
        kind: what it is: "dropout", "alpha_dropout", "lstm", "attention" ...
        rate: fraction that is dropped, or None where no one rate says it.
        shape: of the tensor that it acts on, for the inputs given.
        line: of the code that calls it.
        seen: the rate that the call itself shows in `eval()`.
        position: of the call within that line and within the functions that the line calls.
        repeats: along each dimension, how many elements of the batch there are: `shared=True` gives them one mask.
    """

    path: str
    kind: str
    rate: float | None
    shape: torch.Size
    line: int = 0
    seen: float | None = None
    position: tuple[int, ...] = ()
    repeats: tuple[int, ...] = ()

    @property
    def site(self) -> tuple[str, int, str, tuple[int, ...]]:
        """Where in the code it is."""
        return self.path, self.line, self.kind, self.position


class Handler(TorchFunctionMode, ABC):
    """What a model's torch functions go through."""

    def __init__(self) -> None:
        super().__init__()
        self.outer: tuple[str, bool] | None = None
        """Name and `training` of the Python function of torch that is being looked into."""
        self.direct = False
        """Calls without noise are made at once, not by `plain`."""

    @abstractmethod
    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> DropoutCall | None:
        """Take note of a dropout call; the call with its rate, or None to leave it alone."""

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that has no noise in it."""
        return func(*args, **kwargs)

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        """Run a recurrent layer that has no noise in it."""
        return recurrence.result

    def put(self, call: DropoutCall, x: Tensor, shape: Sequence[int], combine: Combine, axis: int = 0) -> Tensor:
        """Put noise into a tensor whose batch lies along `axis`; `shape` is that of the random numbers."""
        raise NotImplementedError

    def numbers(self, call: DropoutCall, like: Tensor, shape: Sequence[int], normal: bool) -> Tensor:
        """Give random numbers themselves."""
        raise NotImplementedError

    def write(self, x: Tensor, result: Tensor) -> Tensor:
        """Give what a call with `inplace=True` gives."""
        return result


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
