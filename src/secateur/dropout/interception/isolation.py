"""Running a model and leaving it as it was: its mode, its buffers, its inputs, compiled code, random numbers."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur import anatomy
from secateur.computed_weights import require_values
from secateur.errors import InputTypeError, StateError
from secateur.support.inputs import Arguments

_COMPILING = (
    "compiled code has called this, and torch.compile cannot trace it: call it outside of the compiled function, "
    "on a compiled model if you like"
)
_PLAIN = Tensor, bool, int, float, str, type(None), torch.dtype, torch.device


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiled_code() -> None:
    """Raise outside of what is compiled: torch 2.9 cannot trace the raise itself, and hides the message."""
    raise StateError(_COMPILING)


def require_rest(model: nn.Module) -> None:
    """See that running a model changes nothing in it.

    Raises:
        InputTypeError: no module; StateError: it is in training mode, or a normalisation in it is; compiled code calls.
        InputError: a parameter or buffer that is lazy, or on the meta device.
    """
    if torch.compiler.is_compiling():
        _refuse_compiled_code()
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    # the flag of an exported graph says nothing, and a frozen one has none
    if getattr(model, "training", False) and "train" not in vars(model):
        raise StateError("the model is in training mode: call model.eval() first; its dropout is switched on for you")
    for name, module in model.named_modules():
        if anatomy.keeps_statistics(module) and module.training:
            raise StateError(f"{name} is in training mode and would change its statistics: call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        require_values(name, tensor)


class _Eager:
    """Switches compiled code off while a model runs in here; torch.compile has one such setting for all threads."""

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


def twin(model: nn.Module, shared: Iterable[Tensor]) -> nn.Module:
    """Copy a model but for some tensors: what the copy writes into itself, other threads do not see in the model."""
    kept = [*shared, *(t for t, _ in held(model) if t.grad_fn is not None)]  # deepcopy refuses what has a history
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it copies inside an exported model
            return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    except Exception:  # of a lock, a file, a generator: then modules are copied, and what else they hold is shared
        return _shallow(model, {})


def _shallow(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        copied = done[id(module)] = copy.copy(module)
        copied._parameters = dict(module._parameters)
        copied._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        copied._modules = {name: None if m is None else _shallow(m, done) for name, m in module._modules.items()}
    return done[id(module)]


def held(model: nn.Module) -> list[tuple[Tensor, int]]:
    """The buffers of a model and other tensors that its modules hold, each with how often it has been written into."""
    found: list[Any] = []
    for module in model.modules():
        found += module._buffers.values()
        for name, value in vars(module).items():
            if isinstance(value, (Tensor, list, tuple, dict)) and name not in _REGISTERED:
                found += tree_leaves(value)
    return [(leaf, -1 if leaf.is_inference() else leaf._version) for leaf in found if isinstance(leaf, Tensor)]


_REGISTERED = {"_parameters", "_buffers", "_modules"}


def changed(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    """Tell whether a model holds other tensors than before, or has written into them."""
    return [(id(tensor), version) for tensor, version in before] != [(id(tensor), version) for tensor, version in after]
