"""What the attributes of modules hold, looked at once and compared later: to notice what changed since."""

from __future__ import annotations

import collections
import copy
import gc
import operator
import types
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime import native
from secateur.runtime.convolutions import SparseConv2d
from secateur.runtime.forwards import own_classes, root
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
    """Whether it is a convolution of images with a packed matrix, and the weight of that is still there."""
    there = isinstance(module, SparseConv2d) and "packed_weight" in module._buffers
    return there and module._parameters.get("weight") is not None


def followed(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """The layers for which a trace of a module goes into those that hold them; its class may say other ones."""
    found: tuple[type[nn.Module], ...] = getattr(type(module), FOLLOWED, _CONVOLUTIONS)
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

    The classes of these modules that are a user's count, too, and so do objects among the attributes and their classes,
    and the code and the defaults of functions among all these. Of torch's classes, only which forward they have does.

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
        functions: dict[types.FunctionType, None] = {}
        entries = 0
        for one in modules:
            _note_classes(one, classes, left)
        while left:
            if id(one := left.pop()) in found:
                continue
            if not isinstance(one, tuple):  # that of a class's attributes
                found[id(one)] = one
            if (entries := entries + len(one)) > _MOST:
                raise ValueError("too many attributes")
            for value in map(_function_of, _flat(_values(one))):
                if isinstance(value, types.FunctionType) and root(value.__module__) != "torch":
                    functions[value] = None
                    left += [value.__kwdefaults__] if value.__kwdefaults__ else []
                elif (inner := _contents(value)) is not None:
                    left.append(inner)
                    if inner is not value:
                        typed[id(value)] = value
                        _note_classes(value, classes, left)
        del found[id(module.__dict__)]
        self._own = {name: _ANYTHING if name in _KEEPERS else value for name, value in module.__dict__.items()}
        self._live = [*found.values()]
        self._classes = {kind: dict(vars(kind)) for kind in classes}
        self._type, self._typed = type(module), [*modules[1:], *typed.values()]
        self._types = [*map(type, self._typed)]
        kinds: set[type[nn.Module]] = {*map(type, modules)}
        self._forwards = [(kind, kind.forward) for kind in kinds]
        self._functions = [*functions]
        self._coded = [*map(_code_of, self._functions)]
        self._code_ids = _ids_of_all(self._coded)
        self._keep([*map(_plain_copy, self._live)])

    def _keep(self, kept: list[Any]) -> None:
        """Take copies of containers for what these held."""
        self._kept = kept
        both = [*zip(self._live, kept, strict=True), *((_space(kind), own) for kind, own in self._classes.items())]
        others = [(live, _ids(copied)) for live, copied in both if not _follows(live)]
        followed = [(live, copied) for live, copied in both if _follows(live)]
        self._look = native.Dictionaries(self._own, followed, _ANYTHING), others

    def same(self, module: nn.Module) -> bool:
        """Whether nothing was set, added or removed; but a number or a word may have been set to what it was."""
        if type(module) is not self._type or [*map(type, self._typed)] != self._types:
            return False
        if any(kind.forward is not forward for kind, forward in self._forwards):
            return False
        if _ids_of_all(map(_code_of, self._functions)) != self._code_ids:
            return False
        dictionaries, others = self._look
        if dictionaries.same(module.__dict__) and all(_ids(one) == ids for one, ids in others):
            return True
        spaces = ((_space(kind), kept) for kind, kept in self._classes.items())
        both = [(module.__dict__, self._own), *zip(self._live, self._kept, strict=True), *spaces]
        if not all(_alike(_items(live), _items(kept)) for live, kept in both):
            return False
        self._own |= {name: value for name, value in module.__dict__.items() if name not in _KEEPERS}
        self._classes = {kind: dict(vars(kind)) for kind in self._classes}
        self._keep([*map(_plain_copy, self._live)])  # as others of the same value are there now
        return True

    def same_but_notes(self, module: nn.Module) -> bool:
        """Whether nothing changed but what secateur notes; takes that as it is now."""
        plans = module.__dict__.get("plan"), self._own.get("plan")  # a model may have one of its own
        ours = all(plan is None or _is_ours(plan) for plan in plans)
        self._own = _with(module.__dict__, self._own, (*_NOTES_ABOVE, "plan") if ours else _NOTES_ABOVE)
        both = zip(self._live, self._kept, strict=True)
        noted = (isinstance(live, dict) and "_packed_from" in live for live in self._live)
        self._keep([_with(*one, _NOTES) if note else one[1] for one, note in zip(both, noted, strict=True)])
        return self.same(module)

    def tensors(self) -> list[Tensor]:
        """The tensors among them that are neither parameters nor packed."""
        named = [(str(name), value) for one in (self._own, *self._live) for name, value in _items(one)]
        tensors = [(name, value) for name, value in named if isinstance(value, Tensor)]
        return [t for name, t in tensors if not isinstance(t, nn.Parameter) and not name.startswith("packed_")]

    def put_back(self) -> None:
        """Undo what was set, added or removed, but for the module's own attributes."""
        for live, kept in zip(self._live, self._kept, strict=True):
            live.clear()
            live.extend(kept) if isinstance(live, list | collections.deque) else live.update(kept)
        for kind, kept in self._classes.items():
            space = vars(kind)
            for name in [name for name in space if name not in kept]:
                delattr(kind, name)
            for name in [name for name, value in kept.items() if space.get(name, _ANYTHING) is not value]:
                setattr(kind, name, kept[name])
        for function, (code, defaults, named) in zip(self._functions, self._coded, strict=True):
            if any(map(operator.is_not, _code_of(function), (code, defaults, named))):
                function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, named


_ANYTHING = object()
"""In the place of what is not compared."""
_code_of = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_ATOMS = (bool, int, float, complex, str, bytes, torch.device)
"""Of which another object with the same words is the same value."""


def _note_classes(value: Any, classes: dict[type, None], left: list[Any]) -> None:
    """Add a user's classes of an object, and what their attributes hold."""
    for kind in own_classes(value):
        if kind not in classes:
            classes[kind] = None
            left.append(tuple(vars(kind).values()))


def _with(live: dict[str, Any], kept: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What was kept, but with what there is now of these names."""
    new = {name: live[name] if name in names else kept[name] for name in live if name in names or name in kept}
    return new | {name: value for name, value in kept.items() if name not in names and name not in new}


def _space(kind: type) -> dict[str, Any]:
    """The dictionary behind the attributes of a class."""
    found: dict[str, Any] = gc.get_referents(vars(kind))[0]
    return found


def _follows(container: Any) -> bool:
    """Whether the library may compare a container: one whose order it sees."""
    return type(container) is dict or (type(container) is collections.OrderedDict and not container)


def _ids(container: Any) -> list[int]:
    named = chain.from_iterable(container.items()) if isinstance(container, dict) else container
    return sorted(map(id, named)) if isinstance(container, set) else [*map(id, named)]


def _ids_of_all(codes: Iterable[tuple[Any, ...]]) -> list[int]:
    return [*map(id, chain.from_iterable(codes))]


def _alike(now: Any, before: Any) -> bool:
    """Whether it is the same object, or one that nothing tells from it."""
    if now is before or before is _ANYTHING:
        return True
    if type(now) is not type(before):  # such as True and 1, which are equal
        return False
    if isinstance(now, tuple):
        return len(now) == len(before) and all(map(_alike, now, before))
    return type(now) in _ATOMS and repr(now) == repr(before)


def _function_of(value: Any) -> Any:
    """The function behind an attribute of a class."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else value


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
    """What a container holds, without what has no part in a forward and what layers and modules of ours note."""
    if not isinstance(container, dict):
        return container
    ours = "_seen" if "_packed_from" in container else "_made" if "_traced" in container else ""
    return (value for name, value in container.items() if name not in _NO_PART and name != ours)


def _items(container: Any) -> tuple[tuple[Any, Any], ...]:
    if isinstance(container, dict):
        return tuple(container.items())
    return tuple(enumerate(sorted(container, key=id) if isinstance(container, set) else container))


def _plain_copy(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else copy.copy(container)
