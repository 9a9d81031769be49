"""What a model computes before its first dropout: recorded once, then played back instead of computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import TensorWeakRef

from secateur.dropout.interception.followers import Unsuitable


class Boundary(BaseException):
    """Raised at the first dropout to end a pass that only records; no model catches it by accident."""


class Prefix:
    """The calls of torch functions up to the first dropout, and those results that are still in use there.

    A handler passes the calls of a first pass to `run` and `close`s at the first dropout. From then on each pass plays.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._next = 0
        self.closed = False

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and record it or, once closed, return what was recorded."""
        if not self.closed:
            result = func(*args, **kwargs)
            self._calls.append((func, tree_map(_weaken, result)))
            return result
        if self._next == len(self._calls) or self._calls[self._next][0] != func:
            raise Unsuitable("the model does not make the same calls in each pass")
        self._next += 1
        result = self._calls[self._next - 1][1]
        return tree_map(_itself, result) if type(result) in (list, dict) else result  # the model may change it

    def close(self) -> None:
        """End the recording: only what somebody still holds is kept."""
        self._calls = [(func, tree_map(_strengthen, result)) for func, result in self._calls]
        leaves = (leaf for _, result in self._calls for leaf in tree_leaves(result))
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_meta}
        self._versions = [(tensor, tensor._version) for tensor in tensors.values()]
        self.closed = True

    def rewind(self) -> None:
        """Start to play again."""
        self._next = 0

    def finish(self) -> None:
        """See at the first dropout that all was played."""
        if self._next != len(self._calls):
            raise Unsuitable("the model does not make the same calls in each pass")

    @property
    def intact(self) -> bool:
        """False if the rest of the model has written into what was recorded: then it cannot be played again."""
        return all(tensor._version == version for tensor, version in self._versions)


class _Reference:
    """A result, for as long as somebody holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Callable[[], Tensor | None] = TensorWeakRef(tensor)  # a bare weakref spoils tensors in torch 2.9
        self._shape, self._dtype = tensor.shape, tensor.dtype

    def settled(self) -> Tensor:
        """The tensor or, where nobody needs its values any more, a stand-in that has only its shape."""
        tensor = self._tensor()
        return torch.empty(self._shape, dtype=self._dtype, device="meta") if tensor is None else tensor


def _itself(leaf: Any) -> Any:
    return leaf


def _weaken(leaf: Any) -> Any:
    return _Reference(leaf) if isinstance(leaf, Tensor) else leaf


def _strengthen(leaf: Any) -> Any:
    return leaf.settled() if isinstance(leaf, _Reference) else leaf
