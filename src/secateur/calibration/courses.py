"""How far weights go in each step of a recovery, and back again where they got worse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.errors import NotFiniteError

_WARM_UP = 0.1  # of the steps: Adam's first estimates are poor
_MORE = 1.25  # times the least loss is a rise; Adam's first steps may bring a small one that goes by
_SMALLEST = 1e-3  # the size that a tensor of zeros, such as a new bias, is taken to have


class Course:
    """Adam on copies in float32, which share memory where they can: gradients of the user's stay as they are.

    Entered, it has pruned weights be zero. When it is left the weights are the best that were checked, after a failure
    those of before.

    Args:
        trained: by name.
        kept: by the id of a weight, which of it stays.
        steps: how many are to be made.
        lr: how far a weight may move in a step, relative to the root mean square of its tensor.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], kept: Mapping[int, Tensor], steps: int, lr: float) -> None:
        self._trained = list(trained.values())
        self._kept = [kept.get(id(weight)) for weight in self._trained]
        self._copies = [weight.detach().float() for weight in self._trained]
        self._peaks = [lr * _size(copy) for copy in self._copies]
        self._adam = torch.optim.Adam([{"params": [copy]} for copy in self._copies])
        self._rates = [_rate(step, steps) for step in reversed(range(steps))]
        self._before = [weight.detach().clone() for weight in self._trained]
        self._best, self._least, self._factor = self._before, math.inf, 1.0
        self._first: float | None = None

    @property
    def gained(self) -> bool:
        """Whether some weights were better than the first ones that were checked."""
        return self._first is not None and self._least < self._first

    @torch.no_grad()
    def __enter__(self) -> Course:
        for copy, weight, mask in zip(self._copies, self._trained, self._kept, strict=True):
            if mask is not None:
                weight.copy_(copy.masked_fill_(~mask.to(copy.device), 0))
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._put(self._before if failed else self._best)

    def step(self, loss: Tensor) -> float:
        """Make a step, and return the loss."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _no_number(value)
        gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        for copy, gradient, mask in zip(self._copies, gradients, self._kept, strict=True):
            copy.grad = None if gradient is None else gradient.float()
            if copy.grad is not None and mask is not None:
                copy.grad = copy.grad.masked_fill(~mask.to(copy.device), 0)  # NaN times 0 would be NaN
        rate = self._factor * self._rates.pop()
        for group, peak in zip(self._adam.param_groups, self._peaks, strict=True):
            group["lr"] = rate * peak
        self._adam.step()
        with torch.no_grad():
            for weight, copy in zip(self._trained, self._copies, strict=True):
                weight.copy_(copy)
        return value

    def check(self, loss: float) -> None:
        """Take note of how good the weights are; where they got worse, go back to the best, for half as large steps."""
        if self._first is None:
            if not math.isfinite(loss):
                raise _no_number(loss)
            self._first = loss
        if loss < self._least:
            self._least = loss
            self._best = [weight.detach().clone() for weight in self._trained]
        elif not loss <= _MORE * self._least:  # NaN is no gain
            self._put(self._best)
            self._factor /= 2
            self._adam.state.clear()

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        for old, weight, copy in zip(weights, self._trained, self._copies, strict=True):
            weight.copy_(old)
            copy.copy_(old)


def _no_number(loss: float) -> NotFiniteError:
    return NotFiniteError(f"the loss is {loss}: look for NaN or inf in the batches, or give a lower lr")


def _size(weight: Tensor) -> float:
    """The root mean square of the numbers that are not zero."""
    count = int(weight.count_nonzero())
    return max(float(weight.norm()) / math.sqrt(count), _SMALLEST) if count else _SMALLEST


def _rate(step: int, steps: int) -> float:
    """The share of the rate at a step."""
    rising = max(round(_WARM_UP * steps), 1)
    return min((step + 1) / rising, 0.5 + 0.5 * math.cos(math.pi * step / steps))
