"""Tensors that hold one number throughout, as gates, norms and low ranks do when they are new.

Such numbers hide what is wrong: zero times a wrong scale is zero, and parts of what is all one read the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def constant(t: Tensor) -> bool:
    """Whether all numbers of a tensor are the same: of more than one, or of one that is zero."""
    some = t.flatten()[:2]
    if t.is_meta or not len(some) or not bool((some == some[0]).all()):
        return False
    return bool((t == some[0]).all()) if t.numel() > 1 else not bool(some.any())


def varied(t: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor like a constant one, with different numbers near its own."""
    draw = torch.randn if t.ndim > 1 else torch.rand
    drawn = draw(t.shape, generator=generator).to(t)
    if bool(t.any()):
        return t * (1 + 0.1 * drawn)
    return drawn * (0.1 if t.ndim < 2 else math.sqrt(len(t) / t.numel()))
