"""A module's forward as a graph, by torch.fx: what it does step by step, for modules that hold sparse convolutions.

A trace must have no effect on the module, and must come out the same twice. What cannot be traced so is left alone.
"""

from __future__ import annotations

import collections
import copy
import operator
import random
import threading
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.runtime.chains import Fused
from secateur.runtime.convolutions import SparseConv2d
from secateur.runtime.swapping import Swapped
from secateur.runtime.weight_checks import version

__all__: list[str] = []  # reached through secateur.accelerate alone

_MOST = 100_000  # attributes that are looked at; a module has about thirty
_NOTES = {
    "_packed_from": ("_packed_from", "_trusted"),
    "_secateur_network": ("forward", "_secateur", "plan"),
    "_traced": ("_secateur", "plan"),
}
"""What secateur notes in modules that have such an attribute, and what does not matter here."""
_ONE_AT_A_TIME = threading.Lock()  # torch.fx replaces methods of nn.Module while it traces
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NO_PART = {
    *("_backward_hooks", "_backward_pre_hooks", "_non_persistent_buffers_set", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
}
"""Containers of each module that have no part in a forward, or none without those that are looked at."""
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


def packed(module: nn.Module) -> bool:
    """Whether it is a convolution of images with a packed matrix."""
    return isinstance(module, SparseConv2d) and "packed_weight" in module._buffers


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph has a call of it, not what happens inside: torch's layers, and what holds no convolution."""
    kind = module.plain if isinstance(module, Swapped) else type(module)
    if kind.__module__.startswith("torch.nn.") and not module._modules:
        return not isinstance(module, _LISTS)
    followed = (SparseConv2d, nn.BatchNorm2d)
    return any(True for _ in module.parameters()) and not any(isinstance(one, followed) for one in module.modules())


def inside(module: nn.Module) -> list[nn.Module]:
    """A module and all in it, but not what is in leaves."""
    found, left = {module: None}, [module]
    while left:
        for child in left.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                left += [] if is_leaf(child) else [child]
    return list(found)


def trace(module: nn.Module) -> fx.Graph | None:
    """The graph of `forward(x)` of a module in evaluation mode.

    Returns:
        None if the forward cannot be traced, or has an effect on the module or on random numbers.

    Raises:
        ValueError: the module has too many attributes.
    """
    for one in module.modules():
        if isinstance(one, Fused):
            one.steps()  # which it notes, and would otherwise while it is traced
    before, numbers = Attributes(inside(module)), _Numbers()
    followed = Attributes(one for one in inside(module) if one is module or not is_leaf(one))
    held = [(tensor, version(tensor), tensor.detach().clone()) for tensor in followed.tensors()]
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = _Tracer(module).trace(module)
        except Exception:  # whatever the code of a user raises when it is given no tensor
            graph = None
    written = [(tensor, value) for tensor, number, value in held if version(tensor) != number]
    if before.same() and numbers.same() and not written:
        return graph
    before.put_back()
    numbers.put_back()
    for tensor, value in written:
        tensor.detach().copy_(value)
    return None


def fingerprint(graph: fx.Graph) -> str:
    """All that a graph does, in words: equal for equal graphs, in any process."""
    return "\n".join(f"{n.name} {n.op} {_name(n.target)} {_spelled(n.args)} {_spelled(n.kwargs)}" for n in graph.nodes)


class Attributes:
    """What the attributes of modules hold, and what the containers among them hold: to notice changes.

    Raises:
        ValueError: there is too much to look at.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found: dict[int, Any] = {}
        left: list[Any] = [module.__dict__ for module in modules]
        entries = 0
        while left:
            if id(one := left.pop()) in found:
                continue
            found[id(one)] = one
            if (entries := entries + len(one)) > _MOST:
                raise ValueError("too many attributes")
            left += [inner for inner in map(_contents, _values(one)) if inner is not None]
        self._empty = [one for one in found.values() if not one]  # most hooks, which are soonest looked at so
        self._live = [one for one in found.values() if one]
        self._kept = [*map(_plain_copy, self._live)]

    def same(self) -> bool:
        """Whether nothing was set, added or removed."""
        try:
            return not any(self._empty) and self._live == self._kept
        except Exception:  # of tensors, arrays and objects of users that were replaced
            return False

    def same_but_notes(self) -> bool:
        """Whether nothing changed but what secateur notes; takes that as it is now."""
        for live, kept in zip(self._live, self._kept, strict=True):
            for name in (name for mark in _NOTES if isinstance(live, dict) and mark in live for name in _NOTES[mark]):
                kept.pop(name, None)
                kept.update({name: live[name]} if name in live else {})
        return self.same()

    def tensors(self) -> list[Tensor]:
        """The tensors among them that are no parameters."""
        values = [value for one in self._live for value in _values(one)]
        return [value for value in values if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]

    def put_back(self) -> None:
        """Undo what was set, added or removed."""
        for one in self._empty:
            one.clear()
        for live, kept in zip(self._live, self._kept, strict=True):
            live.clear()
            live.extend(kept) if isinstance(live, list | collections.deque) else live.update(kept)


class _Numbers:
    """The states of the generators of random numbers."""

    def __init__(self) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._numpy: Any = np.random.get_state()

    def same(self) -> bool:
        kind, words, *rest = self._numpy
        now, new_words, *new_rest = np.random.get_state()
        numpy = kind == now and np.array_equal(words, new_words) and rest == new_rest
        return numpy and self._python == random.getstate() and self._torch.equal(torch.get_rng_state())

    def put_back(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)


class _Proxy(fx.Proxy):
    """Stands for a value while the forward runs."""


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _one in _IN_PLACE:  # which torch.fx takes for `a = a + b`: then another name for the same tensor is not changed
    setattr(_Proxy, f"__{_one}__", _in_place(_one))


class _Tracer(fx.Tracer):
    """Traces a call with one positional argument, on this thread alone."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._top = module

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        return root_fn, [self._top, self.create_proxy("placeholder", "x", (), {})]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:  # another model, in use meanwhile
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _contents(value: Any) -> Any:
    """The container in which a value keeps what may change; None if it has none."""
    if isinstance(value, dict | list | set | collections.deque):
        return value
    if isinstance(value, Tensor | nn.Module | type | types.ModuleType | types.FunctionType):
        return None
    if type(value).__module__.startswith("secateur."):  # whose own checks look at it
        return None
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else None


def _values(container: Any) -> Any:
    if not isinstance(container, dict):
        return container
    return (value for name, value in container.items() if name not in _NO_PART)


def _plain_copy(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else copy.copy(container)


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def _spelled(value: Any) -> str:
    """Arguments in words, without the addresses of objects."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_spelled(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_spelled, value)) + ")"
    return _name(value) if callable(value) else repr(value)
