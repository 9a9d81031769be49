"""What the attributes of modules hold, looked at once and compared later: to notice what changed since."""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from secateur.runtime.convolutions import SparseConv2d
from secateur.runtime.forwards import own_classes
from secateur.runtime.swapping import plain_class

__all__: list[str] = []  # reached through secateur.accelerate alone

_MOST = 100_000  # attributes that are looked at; a module has about thirty
NETWORK = "_secateur_network"
"""The attribute in which a module keeps what belongs to its network."""
FOLLOWED = "_secateur_followed"
"""The attribute of a class that tells the layers a trace of it is after."""
_KEEPERS = (NETWORK, "_traced")
"""Attributes in which modules keep what was traced, and with it what is here."""
_NOTES_ABOVE, _NOTES = ("forward", "_secateur"), ("_packed_from", "_trusted")
"""What secateur itself sets: in a module that keeps one of these, and in sparse layers. No forward reads it."""
_CONVOLUTIONS = (SparseConv2d, nn.BatchNorm2d)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NO_PART = {
    *("_backward_hooks", "_backward_pre_hooks", "_non_persistent_buffers_set", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
}
"""Containers of each module that have no part in a forward, or none without those that are looked at."""


def packed(module: nn.Module) -> bool:
    """Whether it is a convolution of images with a packed matrix."""
    return isinstance(module, SparseConv2d) and "packed_weight" in module._buffers


def followed(root: nn.Module) -> tuple[type[nn.Module], ...]:
    """The layers for which a trace of a module goes into those that hold them; its class may say other ones."""
    found: tuple[type[nn.Module], ...] = getattr(type(root), FOLLOWED, _CONVOLUTIONS)
    return found


def is_leaf(module: nn.Module, layers: tuple[type[nn.Module], ...] = _CONVOLUTIONS) -> bool:
    """Whether a graph has a call of it, not what happens inside: torch's layers, and what holds none to be followed."""
    kind = plain_class(module)
    if kind.__module__.startswith("torch.nn.") and not module._modules:
        return not isinstance(module, _LISTS)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # which has no forward: what it holds is called
        return False
    return any(True for _ in module.parameters()) and not any(isinstance(one, layers) for one in module.modules())


def inside(module: nn.Module) -> list[nn.Module]:
    """A module and all in it, but not what is in leaves."""
    found, left, layers = {module: None}, [module], followed(module)
    while left:
        for child in left.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                left += [] if is_leaf(child, layers) else [child]
    return list(found)


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
