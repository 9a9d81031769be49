"""Other tensors in the place of parameters while a module runs, and the very parameters back afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

Stand = tuple[nn.Module, str, Tensor]
"""A module, the name of its parameter, and the tensor that stands in for it."""


class Swap:
    """What stands in for the parameters of one module during one forward.

    Holds what must be put back. An interruption that no hook sees (a KeyboardInterrupt) leaves it to the next call.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Any, int | str, Any, Tensor]] = []

    def put(self, host: nn.Module, stands: Iterable[Stand]) -> None:
        """Let `host` compute with these tensors; call `restore` first, so that they are made of the parameters."""
        for module, attribute, tensor in stands:
            if isinstance(host, nn.RNNBase):  # computes with a list of its weights, not with its attributes
                self._place(host._flat_weights, host._flat_weights_names.index(attribute), tensor)
            else:
                self._place(module._parameters, attribute, tensor)

    def _place(self, target: Any, key: int | str, new: Tensor) -> None:
        self._undo.append((target, key, target[key], new))
        target[key] = new

    def restore(self) -> None:
        """Put everything back, but for what somebody else has replaced meanwhile."""
        for target, key, old, new in self._undo:
            if target[key] is new:
                target[key] = old
        self._undo = []


def refresh(host: nn.Module) -> None:
    """Let a recurrent module see parameters that were replaced since its last forward, as it does itself."""
    if isinstance(host, nn.RNNBase):
        host._update_flat_weights()
