"""The few collective operations; in a process that works alone they do nothing."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

_Array = TypeVar("_Array", bound=npt.NDArray[Any])
_TEXT = 4096


def rank() -> int:
    """This process's place among those that work together, 0 if it is alone."""
    return distributed.get_rank() if _together() else 0


def size() -> int:
    """How many processes work together, 1 if this one is alone."""
    return distributed.get_world_size() if _together() else 1


def total(array: _Array) -> _Array:
    """Add up the arrays (of one shape and dtype) of all processes, in place; each process waits for the others."""
    if size() > 1:
        distributed.all_reduce(torch.from_numpy(array))
    return array


def from_first(text: str) -> str:
    """Return the text (at most 4,096 bytes) that the process of rank 0 holds."""
    box = np.zeros(_TEXT, np.uint8)
    if rank() == 0:
        encoded = np.frombuffer(text.encode(), np.uint8)
        box[: encoded.size] = encoded
    return bytes(total(box)).rstrip(b"\0").decode()


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
