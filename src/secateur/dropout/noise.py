"""Where noise comes from: fresh random numbers in training, those of a sample in `secateur.dropout.sample`, or none.

All layers and methods of `secateur.dropout` get their random numbers from `drop`, `uniform` and `normal`: so `sample`
and `find` reach them in a model that stays in `eval()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from secateur.errors import InputError
from secateur.support import checks

SAMPLING: ContextVar[bool] = ContextVar("secateur.dropout.sampling", default=False)
"""Whether `sample` or `find` is running a model."""


def active(training: bool) -> bool:
    """Tell whether there is noise to add now: in training, and while `sample` or `find` runs the model."""
    if training or torch.compiler.is_compiling():  # dynamo reads no ContextVar; `sample` runs no compiled code
        return training
    return SAMPLING.get()


def require_rate(rate: float, name: str = "p") -> float:
    """Return a dropout rate as a float.

    Raises:
        InputTypeError: no number; InputError: outside [0, 1).
    """
    checks.number(name, rate, "a rate, the fraction that is dropped, such as 0.5")
    if not 0 <= rate < 1:
        raise InputError(
            f"{name} is {rate}: give a rate of at least 0 and below 1 (0.1 drops a tenth); at 1 nothing would be left"
        )
    return float(rate)


def drop(x: Tensor, rate: float, *, training: bool, kind: str, shape: Sequence[int] | None = None) -> Tensor:
    """Set random elements of `x` to zero and divide the others by `1 - rate`, so that the mean stays.

    Args:
        x: any shape.
        rate: probability that an element is dropped, 0 <= rate < 1.
        training: of the module; `x` itself is returned when it is False and no sample is being taken.
        kind: what `find` calls this noise.
        shape: of the mask, broadcast to `x`: a size of 1 shares the mask along that dimension.
    """
    if not active(training) or rate == 0:
        return x
    if has_torch_function_unary(x):
        found: Tensor = handle_torch_function(drop, (x,), x, rate, training=training, kind=kind, shape=shape)
        return found
    return x * mask_of(uniform_numbers(x, x.shape if shape is None else shape), rate, x.dtype)


def uniform(like: Tensor, shape: Sequence[int], *, kind: str, rate: float | None = None) -> Tensor:
    """Draw uniform numbers in [0, 1), float32, on the device of `like`; call it only when `active`.

    Args:
        like: gives the device.
        shape: of the result; under `sample`, of each sample's.
        kind: what `find` calls this noise.
        rate: what `find` says of it, if it has a rate.
    """
    if has_torch_function_unary(like):
        found: Tensor = handle_torch_function(uniform, (like,), like, shape, kind=kind, rate=rate)
        return found
    return uniform_numbers(like, shape)


def normal(like: Tensor, shape: Sequence[int], *, kind: str) -> Tensor:
    """Draw standard normal numbers, float32, on the device of `like`; call it only when `active`. As `uniform`."""
    if has_torch_function_unary(like):
        found: Tensor = handle_torch_function(normal, (like,), like, shape, kind=kind)
        return found
    return torch.empty(tuple(shape), dtype=torch.float32, device=like.device).normal_()


def mask_of(numbers: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """Turn uniform numbers into a mask of 0 and `1 / (1 - rate)`."""
    return (numbers >= rate).to(dtype).mul_(1 / (1 - rate))


def uniform_numbers(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw fresh uniform numbers from the global generator of the device."""
    return torch.empty(tuple(shape), dtype=torch.float32, device=like.device).uniform_()
