"""A call of torch.lstm, gru, rnn_tanh or rnn_relu, taken apart so that noise comes between its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Between = Callable[[Tensor, int], Tensor]
"""Puts noise on what one layer gives to the next; the number is the dimension of the batch."""
Step = Callable[["Recurrence"], tuple[Tensor, ...]]
"""Runs a call: output, then the last states."""


@dataclass(frozen=True)
class Recurrence:
    """The arguments of one call, by name.

    Attributes:
        func: `torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`.
        x: input `[time, batch, features]`, batch first, or the data of a packed sequence `[sum of lengths, features]`.
        batch_sizes: of a packed sequence, else None.
        states: h, or h and c, each `[layers * directions, batch, hidden]`.
        weights: of all layers and directions, as torch orders them.
        rate: of the dropout between layers.
    """

    func: Callable[..., Any]
    x: Tensor
    batch_sizes: Tensor | None
    states: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    biases: bool
    layers: int
    rate: float
    training: bool
    bidirectional: bool
    batch_first: bool

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...]) -> Recurrence:
        """Read the positional arguments of a call."""
        packed = isinstance(args[3], (list, tuple))  # (data, batch_sizes, hx, params, ...)
        x, *rest = args
        batch_sizes = rest.pop(0) if packed else None
        hx, weights, biases, layers, rate, training, bidirectional, *batch_first = rest
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        options = biases, layers, rate, training, bidirectional, bool(batch_first and batch_first[0])
        return cls(func, x, batch_sizes, states, tuple(weights), *options)

    @property
    def batch_axis(self) -> int:
        """The dimension of `x` and of the output along which sequences lie (those of packed data: the only one)."""
        return 0 if self.batch_first or self.batch_sizes is not None else 1

    @property
    def result(self) -> tuple[Tensor, ...]:
        """What the call gives, without dropout: output and last states."""
        states = self.states[0] if self.func in (torch.gru, torch.rnn_tanh, torch.rnn_relu) else list(self.states)
        options = self.biases, self.layers, 0.0, False, self.bidirectional
        if self.batch_sizes is not None:
            found = self.func(self.x, self.batch_sizes, states, list(self.weights), *options)
        else:
            found = self.func(self.x, states, list(self.weights), *options, self.batch_first)
        return tuple(found)

    def layer(self, index: int, x: Tensor) -> Recurrence:
        """One of the layers, on the input `x`."""
        directions = 2 if self.bidirectional else 1
        each = len(self.weights) // self.layers
        states = tuple(state[index * directions : (index + 1) * directions] for state in self.states)
        if self.batch_sizes is None:
            states = _widened(states, x.shape[self.batch_axis])
        weights = self.weights[index * each : (index + 1) * each]
        return replace(self, x=x, states=states, weights=weights, layers=1)

    def with_noise(self, step: Step, between: Between) -> tuple[Tensor, ...]:
        """Run layer after layer, with noise between two of them; output and last states."""
        x, last = self.x, []
        for index in range(self.layers):
            x, *states = step(self.layer(index, x))
            last.append(states)
            if index < self.layers - 1:
                x = between(x, self.batch_axis)
        batch = max(states[0].shape[1] for states in last)
        return x, *(torch.cat(states) for states in zip(*(_widened(states, batch) for states in last), strict=True))


def _widened(states: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """Repeat states for a batch into which samples were folded after they were computed."""
    return tuple(s if s.shape[1] == batch else s.repeat(1, batch // s.shape[1], 1) for s in states)
