"""Running a model and leaving it as it was: its mode, its buffers, its inputs, compiled code, random numbers."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import InputTypeError, StateError
from secateur.support.inputs import Arguments

_COMPILING = (
    "compiled code has called this, and torch.compile cannot trace it: call it outside of the compiled function, "
    "on a compiled model if you like"
)
_PLAIN = Tensor, bool, int, float, str, type(None), torch.dtype, torch.device


def require_rest(model: nn.Module) -> None:
    """See that running a model changes nothing in it.

    Raises:
        InputTypeError: no module; StateError: it is in training mode, or a normalisation in it is; compiled code calls.
    """
    if torch.compiler.is_compiling():
        raise StateError(_COMPILING)
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    # the flag of an exported graph says nothing, and a frozen one has none
    if getattr(model, "training", False) and "train" not in vars(model):
        raise StateError("the model is in training mode: call model.eval() first; its dropout is switched on for you")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            raise StateError(f"{name} is in training mode and would change its statistics: call model.eval() first")


class _Eager:
    """Holds compiled code back while somebody runs a model: the stance of torch.compile is one for all threads."""

    def __init__(self) -> None:
        self._lock, self._users, self._stack = threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                try:
                    self._stack.enter_context(torch.compiler.set_stance("force_eager"))
                except RuntimeError as error:
                    raise StateError(_COMPILING) from error
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._stack.close()


_eager = _Eager()


@contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, and no compiled code, in which no call is seen.

    Raises:
        StateError: code that `torch.compile` compiles has called this.
    """
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes a second to import
            stack.enter_context(_eager())
        yield


def fresh(call: Arguments) -> Arguments:
    """Copy some inputs: a model may write into tensors, or append to a cache."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        with suppress(Exception):  # what cannot be copied is passed on as it is
            return leaf if isinstance(leaf, _PLAIN) else copy.deepcopy(leaf, {id(t): t.clone() for t in _held(leaf)})
        return leaf

    found: Arguments = tree_map(copied, call)
    return found


def _held(thing: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors that something holds, which deepcopy refuses if they have a history of gradients."""
    if isinstance(thing, Tensor):
        yield thing
    elif depth:
        parts = thing if isinstance(thing, (list, tuple)) else getattr(thing, "__dict__", {}).values()
        for part in parts:
            yield from _held(part, depth - 1)


def written(given: Arguments, call: Arguments) -> bool:
    """Tell whether a model writes into its inputs, from copies that it has seen; or may, as far as one can tell."""
    pairs = zip(tree_leaves(given), tree_leaves(call), strict=True)
    return _may_change(call) or any(a._version or b.is_inference() for a, b in pairs if isinstance(a, Tensor))


def _may_change(thing: Any) -> bool:
    """Whether something has a state of its own, as a cache of keys and values has."""
    if isinstance(thing, Mapping):
        return any(map(_may_change, thing.values()))
    if isinstance(thing, (list, tuple)):
        return any(map(_may_change, thing))
    return not isinstance(thing, _PLAIN)


class Buffers:
    """The buffers of a model, to be put back if a forward writes into them (a counter, a ring buffer)."""

    def __init__(self, model: nn.Module) -> None:
        plain = (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))
        places = [(m._buffers, name, b) for m in plain for name, b in m._buffers.items() if b is not None]
        self._kept = [(*place, place[2]._version, place[2].clone()) for place in places if not place[2].is_inference()]

    def put_back(self) -> bool:
        """Restore what has changed; tell whether anything had."""
        changed = False
        for i, (place, name, buffer, version, copied) in enumerate(self._kept):
            if buffer._version != version:
                buffer.copy_(copied)
                self._kept[i] = (place, name, buffer, buffer._version, copied)
                changed = True
            if place[name] is not buffer:
                place[name] = buffer
                changed = True
        return changed


@contextmanager
def buffers_kept(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Put the buffers of a model back afterwards, if it is one that writes into them."""
    buffers = Buffers(model) if wanted else None
    try:
        yield
    finally:
        if buffers is not None:
            buffers.put_back()
