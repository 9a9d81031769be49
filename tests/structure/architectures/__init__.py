"""Small architectures of many kinds, each for any width.

An architecture is a function of `w`, which turns a full width into the asked one. It returns the model and its inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Kind(NamedTuple):
    """An architecture, what share of what its half width saves must go at 0.5, and how much outputs may differ."""

    make: Callable
    least: float
    limit: float


KINDS: dict[str, Kind] = {}


def architecture(make=None, *, least=0.85, limit=1e-9):
    """Register an architecture under the name of its function."""
    if make is None:
        return lambda make: architecture(make, least=least, limit=limit)
    assert make.__name__ not in KINDS
    KINDS[make.__name__] = Kind(make, least, limit)
    return make


def build(name, width=1.0):
    """The model in eval mode, and its inputs."""
    torch.manual_seed(0)
    model, inputs = KINDS[name].make(lambda n: max(1, round(n * width)))
    return model.eval(), inputs


from structure.architectures import attention, images, pretrained, recurrent, sequences, tables  # noqa: E402, F401
