"""A module's forward as a graph, by torch.fx: what it does step by step, for modules that hold sparse convolutions.

A trace must have no effect on the module, must come out the same twice, and must depend only on what is watched or
cannot change. What cannot be traced so is left alone.
"""

from __future__ import annotations

import collections
import copy
import operator
import random
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.runtime.chains import Fused
from secateur.runtime.convolutions import SparseConv2d
from secateur.runtime.forwards import Refused, Watch, own_classes
from secateur.runtime.swapping import plain_class
from secateur.runtime.weight_checks import version

__all__: list[str] = []  # reached through secateur.accelerate alone

_AGREES = 1e-3  # of the largest value: rounding is a thousand times less, another function is more
_MOST = 100_000  # attributes that are looked at; a module has about thirty
NETWORK = "_secateur_network"
"""The attribute in which a module keeps what belongs to its network."""
_KEEPERS = (NETWORK, "_traced")
"""Attributes in which modules keep what was traced, and with it what is here."""
_NOTES_ABOVE, _NOTES = ("forward", "_secateur"), ("_packed_from", "_trusted")
"""What secateur itself sets: in a module that keeps one of these, and in sparse layers. No forward reads it."""
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
    kind = plain_class(module)
    if kind.__module__.startswith("torch.nn.") and not module._modules:
        return not isinstance(module, _LISTS)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # which has no forward: what it holds is called
        return False
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
        None if the forward cannot be traced, has an effect on the module or on random numbers, or depends on something
        that is neither watched nor of a kind that cannot change.

    Raises:
        ValueError: the module has too many attributes.
    """
    for one in module.modules():
        if isinstance(one, Fused):
            one.steps()  # which it notes, and would otherwise while it is traced
    before, numbers = Attributes(module), _Numbers()
    held = [(tensor, version(tensor), tensor.detach().clone()) for tensor in before.tensors()]
    watch = Watch(inside(module))
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = _Tracer(module, watch).trace(module)
        except Exception:  # whatever the code of a user raises when it is given no tensor
            graph = None
    written = [(tensor, value) for tensor, number, value in held if version(tensor) != number]
    if before.same(module) and numbers.same() and not written:
        return None if watch.refused else graph
    before.put_back(module)
    numbers.put_back()
    for tensor, value in written:
        tensor.detach().copy_(value)
    return None


def fingerprint(graph: fx.Graph) -> str:
    """All that a graph does, in words: equal for equal graphs, in any process."""
    return "\n".join(f"{n.name} {n.op} {_name(n.target)} {_spelled(n.args)} {_spelled(n.kwargs)}" for n in graph.nodes)


def agree(one: Any, other: Any) -> bool:
    """Whether two results are of the same function, up to rounding."""
    if not isinstance(one, Tensor):
        return type(one) is type(other) and (one is other or bool(one == other))
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype is not other.dtype:
        return False
    if not one.is_floating_point():
        return one.equal(other)
    most = one.abs().nan_to_num(0, 0, 0).amax().item() if one.numel() else 0.0
    return torch.allclose(one, other, rtol=_AGREES, atol=_AGREES * most, equal_nan=True)


class Attributes:
    """What the attributes of a module and of those inside hold, and the containers among them: to notice changes.

    So for the classes of a user that they are of, and for objects among the attributes and their classes.

    It holds neither the module nor its attributes, but what these hold, so that the module may keep it.

    Raises:
        ValueError: there is too much to look at.
    """

    def __init__(self, module: nn.Module) -> None:
        found: dict[int, Any] = {}
        modules = inside(module)
        left: list[Any] = [one.__dict__ for one in modules]
        classes: dict[type, None] = {}
        typed: dict[int, Any] = {}
        entries = 0
        for one in modules:
            _note_classes(one, classes, left)
        while left:
            if id(one := left.pop()) in found:
                continue
            found[id(one)] = one
            if (entries := entries + len(one)) > _MOST:
                raise ValueError("too many attributes")
            for value in _flat(_values(one)):
                if (inner := _contents(value)) is not None:
                    left.append(inner)
                    if inner is not value:
                        typed[id(value)] = value
                        _note_classes(value, classes, left)
        del found[id(module.__dict__)]
        self._own = {name: _ANYTHING if name in _KEEPERS else value for name, value in module.__dict__.items()}
        self._empty = [one for one in found.values() if not one]  # most hooks, which are soonest looked at so
        self._live = [one for one in found.values() if one]
        self._kept = [*map(_plain_copy, self._live)]
        self._type, self._typed = type(module), [*modules[1:], *typed.values()]
        self._types = [*map(type, self._typed)]
        self._classes = [*classes]
        self._spaces = [*map(vars, classes)]
        self._kept_spaces = [*map(dict, self._spaces)]

    def same(self, module: nn.Module) -> bool:
        """Whether nothing was set, added or removed."""
        try:
            own = module.__dict__ == self._own and type(module) is self._type
            inside = own and not any(self._empty) and self._live == self._kept
            return inside and [*map(type, self._typed)] == self._types and self._spaces == self._kept_spaces
        except Exception:  # of tensors, arrays and objects of users that were replaced
            return False

    def same_but_notes(self, module: nn.Module) -> bool:
        """Whether nothing changed but what secateur notes; takes that as it is now."""
        plans = module.__dict__.get("plan"), self._own.get("plan")  # a model may have one of its own
        ours = all(plan is None or _is_ours(plan) for plan in plans)
        _take_over(module.__dict__, self._own, (*_NOTES_ABOVE, "plan") if ours else _NOTES_ABOVE)
        for live, kept in zip(self._live, self._kept, strict=True):
            if isinstance(live, dict) and "_packed_from" in live:
                _take_over(live, kept, _NOTES)
        return self.same(module)

    def tensors(self) -> list[Tensor]:
        """The tensors among them that are neither parameters nor packed."""
        named = [(name, value) for one in (self._own, *self._live) for name, value in _items(one)]
        tensors = [(name, value) for name, value in named if isinstance(value, Tensor)]
        return [t for name, t in tensors if not isinstance(t, nn.Parameter) and not name.startswith("packed_")]

    def put_back(self, module: nn.Module) -> None:
        """Undo what was set, added or removed."""
        keepers = {name: value for name, value in vars(module).items() if name in _KEEPERS}
        empty: list[tuple[Any, Any]] = [(one, type(one)()) for one in self._empty]
        both = [(vars(module), self._own | keepers), *empty, *zip(self._live, self._kept, strict=True)]
        for live, kept in both:
            live.clear()
            live.extend(kept) if isinstance(live, list | collections.deque) else live.update(kept)
        for kind, space, kept in zip(self._classes, self._spaces, self._kept_spaces, strict=True):
            for name in [name for name in space if name not in kept]:
                delattr(kind, name)
            for name in [name for name, value in kept.items() if space.get(name, _MISSING) is not value]:
                setattr(kind, name, kept[name])


class _Anything:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


_ANYTHING = _Anything()
_MISSING = object()


def _note_classes(value: Any, classes: dict[type, None], left: list[Any]) -> None:
    """Add a user's classes of an object, and what their attributes hold."""
    for kind in own_classes(value):
        if kind not in classes:
            classes[kind] = None
            left.append([one for one in _flat(vars(kind).values()) if _contents(one) is not None])


def _take_over(live: dict[str, Any], kept: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        kept.pop(name, None)
        kept.update({name: live[name]} if name in live else {})


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


class _Wordless:
    """Has no words: by them a value that is not known yet would be told from others."""

    def __repr__(self) -> str:
        raise Refused

    def __format__(self, spec: str) -> str:
        raise Refused


class _Proxy(_Wordless, fx.Proxy):
    """Stands for a value while the forward runs."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)


class _Attribute(_Wordless, fx.proxy.Attribute):
    """Stands for an attribute of such a value."""


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _one in _IN_PLACE:  # which torch.fx takes for `a = a + b`: then another name for the same tensor is not changed
    setattr(_Proxy, f"__{_one}__", _in_place(_one))


class _Tracer(fx.Tracer):
    """Traces a call with one positional argument, on this thread alone."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, watch: Watch) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._top, self._watch = module, watch

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        self._watch.step()
        return super().create_proxy(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        def watched(*args: Any) -> Any:
            with self._watch:
                return root_fn(*args)

        return watched, [self._top, self.create_proxy("placeholder", "x", (), {})]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:  # another model, in use meanwhile
            return forward(*args, **kwargs)
        self._watch.enter(m)
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
    if _is_ours(value):  # our own checks look at it
        return None
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else None


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("secateur.")


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and those in tuples among them."""
    for value in values:
        if isinstance(value, tuple | frozenset):
            yield from _flat(value)
        else:
            yield value


def _values(container: Any) -> Any:
    if not isinstance(container, dict):
        return container
    return (value for name, value in container.items() if name not in _NO_PART)


def _items(container: Any) -> list[tuple[str, Any]]:
    named = container.items() if isinstance(container, dict) else enumerate(container)
    return [(str(name), value) for name, value in named]


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
