"""What a forward depends on: it is traced only if all of that can be watched, or cannot change.

The code of a forward, and all Python code that it calls, is looked at just before it runs for the first time.
"""

from __future__ import annotations

import builtins
import collections
import dis
import enum
import gc
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__: list[str] = []  # reached through secateur.accelerate alone

_OURS = frozenset({"torch", "secateur", "builtins"})
_NO_MATTER = _OURS | {
    *("inspect", "collections", "_collections_abc", "enum", "abc", "weakref", "_weakrefset", "types", "typing"),
    *("warnings", "importlib"),
}
"""Packages whose code does the same whether a value is a tensor or stands for one."""
_OTHERS = _OURS | sys.stdlib_module_names
_OPERATIONS = {
    *("PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH", "SETUP_ASYNC_WITH", "BEFORE_WITH", "BEFORE_ASYNC_WITH"),
    *("WITH_EXCEPT_START", "LOAD_SPECIAL", "IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"),
    *("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE", "MATCH_KEYS"),
}
"""`with`, `try`, `match`, `import` and `global`: what they do is lost in a graph, or differs without a tensor."""
_BUILTINS = ("isinstance issubclass type hasattr getattr callable id hash vars dir locals globals eval exec open print "
             "input __import__ setattr delattr")  # fmt: skip
_ASKING: tuple[Any, ...] = tuple(getattr(builtins, name) for name in _BUILTINS.split())
_NAMES = {"__class__", "__dict__", "__enter__", "__exit__", "enter_context", "is_tensor"}
"""Attributes that tell types, or are `with` in other words."""
_GIVES_TENSORS = {
    getattr(nn.Module, name).__code__
    for name in (
        "parameters",
        "buffers",
        "named_parameters",
        "named_buffers",
        "get_parameter",
        "get_buffer",
        "state_dict",
    )
}
"""Methods that give values in the place of which torch.fx puts nothing."""
_STATE, _NO_STATE = ("is_", "are_", "get_", "set_", "has_"), {"is_scripting", "is_tracing", "is_compiling"}
"""How torch's functions that tell or set a state begin, and those of them that are the same in each plain call."""
_SCALARS = (type(None), bool, int, float, complex, str, bytes, np.generic, type(...))
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, np.ufunc)
_HOLDERS = (list, set, dict, collections.OrderedDict, collections.defaultdict, collections.deque, tuple, frozenset)
_LOADS = {
    *("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"),
    *("LOAD_FROM_DICT_OR_GLOBALS", "LOAD_FROM_DICT_OR_DEREF"),
}
_STORES = ("STORE_DEREF", "DELETE_DEREF")
_CONSTANTS = ("LOAD_CONST", "LOAD_COMMON_CONSTANT")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_NO_STEPS = ("EXTENDED_ARG", "NOP", "CACHE", "PUSH_NULL")
"""What stands between instructions without a part in what is loaded."""
_NOTHING = object()


class _Plain:
    """An object with what each has, for its size."""


class Refused(Exception):
    """A forward depends on something that cannot be watched."""


def root(name: Any) -> str:
    """The package of a module, by the name of that."""
    return str(name).partition(".")[0]


def own_classes(value: Any) -> Iterator[type]:
    """The classes of an object that are neither Python's nor torch's nor of this package."""
    return (kind for kind in type(value).__mro__ if root(kind.__module__) not in _OTHERS)


def is_plain(value: Any) -> bool:
    """Whether all that an object holds is in its `__dict__`."""
    kind = type(value)
    slots = (one for base in kind.__mro__ for one in vars(base).values())
    small = kind.__basicsize__ <= _Plain.__basicsize__ and isinstance(getattr(value, "__dict__", None), dict)
    return small and not any(isinstance(one, types.MemberDescriptorType) for one in slots)


class Watch:
    """While it is entered, code that runs on this thread is looked at; raises `Refused` inside of it.

    Args:
        modules: those whose attributes are watched.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.refused = False
        self._modules = {id(module): module for module in modules}
        self._seen: set[types.CodeType] = set()
        self._nested: set[types.CodeType] = set()
        self._names: set[str] = set()
        self._reached: list[Any] = []
        self._modes = _modes()
        self._former: Any = None

    def __enter__(self) -> Watch:
        self._former, self._base = sys.getprofile(), sys._getframe(1)
        self._require(self._names_are_watched({"forward"}))
        self._collecting = gc.isenabled()
        gc.disable()  # its callbacks, which are no part of a forward, would run on this thread
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self.refused |= any(map(self._may_read, self._reached))  # by all names, as it may have others meanwhile
        if self._collecting:
            gc.enable()
        del self._base
        if self._former is not None and not callable(self._former):  # cProfile, which starts itself
            self._former.enable()
        else:
            sys.setprofile(self._former)

    def enter(self, module: nn.Module) -> None:
        """Look at a module that is called, or followed."""
        self._require(id(module) in self._modules)

    def step(self) -> None:
        """Look at a step of the graph: it must run as the others."""
        self._require(_modes() == self._modes)

    def _require(self, fine: bool) -> None:
        if not fine:
            self.refused = True  # as the code in between may go on after an exception
            raise Refused

    def _called(self, frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code in self._seen:
            return
        if code in _GIVES_TENSORS and frame.f_back is not None:
            self._require(root(frame.f_back.f_globals.get("__name__")) in _OURS)
        if root(frame.f_globals.get("__name__")) not in _NO_MATTER and not self._of_torch(frame):
            self._seen.add(code)
            self._require(self._code_is_fine(code, frame))

    def _of_torch(self, frame: types.FrameType) -> bool:
        """Whether it is Python's own code that torch calls, or runs because torch imports something."""
        back: types.FrameType | None = frame
        name, python = root(frame.f_globals.get("__name__")), True
        while back is not None and back is not self._base and name != "importlib":
            python = python and name in sys.stdlib_module_names
            back = back.f_back
            name = root(back.f_globals.get("__name__")) if back is not None else ""
            if python and name in _OURS:
                return True
        return name == "importlib"

    def _code_is_fine(self, code: types.CodeType, frame: types.FrameType) -> bool:
        self._nested.update(_inner(code))
        if not _NAMES.isdisjoint(code.co_names) or not self._loads_are_fine(code, frame):
            return False
        functions = (vars(kind).get(code.co_name) for one in self._modules.values() for kind in own_classes(one))
        found = [one for one in functions if isinstance(one, types.FunctionType) and one.__code__ is code]
        return all(map(_settled, found)) and self._names_are_watched(set(code.co_names))

    def _loads_are_fine(self, code: types.CodeType, frame: types.FrameType) -> bool:
        """Whether globals, variables of functions around, and what is read from modules and classes, do not change."""
        value: Any = _NOTHING
        constant = False
        for one in dis.get_instructions(code):
            if one.opname in _NO_STEPS:
                continue
            if isinstance(value, types.ModuleType) and one.opname not in _ATTRIBUTES:
                return False  # by another name what is read from it is not seen
            if one.opname == "IS_OP" and not constant:  # what stands for a value is not the same as that
                return False
            constant = one.opname in _CONSTANTS
            if one.opname in _OPERATIONS or (one.opname in _STORES and one.argval in code.co_freevars):
                return False
            before, value = value, _NOTHING
            if one.opname in _LOADS:
                value = self._loaded(one, code, frame)
            elif one.opname in _ATTRIBUTES and isinstance(before, types.ModuleType | type):
                value = getattr(before, one.argval, _NOTHING)
                name = getattr(before, "__name__", "")
                if type(value) is float and name in ("math", "torch", "numpy"):
                    continue
            self._reached.append(value)
            if value is not _NOTHING and not _settled(value) and id(value) not in self._modules:
                return False
        return True

    def _loaded(self, one: dis.Instruction, code: types.CodeType, frame: types.FrameType) -> Any:
        name = one.argval
        if "DEREF" in one.opname:
            outer = name in code.co_freevars and code not in self._nested
            return frame.f_locals.get(name, _NOTHING) if outer else _NOTHING
        return frame.f_globals.get(name, frame.f_builtins.get(name, _NOTHING))

    def _names_are_watched(self, names: set[str]) -> bool:
        """Whether what the attributes of these names hold is watched, or cannot change."""
        new = names - self._names
        self._names |= names
        for module in self._modules.values():
            own = vars(module)
            self._reached += [own[name] for name in new & own.keys()]
            if not all(self._watched(own[name]) for name in new & own.keys() if not name.startswith("_secateur")):
                return False
            for space in map(vars, own_classes(module)):
                self._reached += [getattr(space[name], "__func__", space[name]) for name in new & space.keys()]
                if not all(self._of_class(space[name]) for name in new & space.keys()):
                    return False
        return True

    def _may_read(self, value: Any) -> bool:
        """Whether code reads attributes of a function, or data of a class, which are not watched, if it is one."""
        if isinstance(value, types.FunctionType):
            return root(value.__module__) not in _OURS and not self._names.isdisjoint(vars(value))
        if not isinstance(value, type):
            return False
        watched = {kind for module in self._modules.values() for kind in type(module).__mro__}
        kinds = (kind for kind in value.__mro__ if kind not in watched and root(kind.__module__) not in _OTHERS)
        read = (space[name] for space in map(vars, kinds) for name in self._names & space.keys())
        return any(not hasattr(type(one), "__get__") for one in read)

    def _of_class(self, value: Any) -> bool:
        if isinstance(value, property):  # whose function is looked at when it runs
            return True
        return self._watched(value.__func__ if isinstance(value, staticmethod | classmethod) else value)

    def _watched(self, value: Any, around: tuple[int, ...] = ()) -> bool:
        if id(value) in around:
            return True
        if isinstance(value, nn.Module):
            return id(value) in self._modules
        if isinstance(value, Tensor):  # torch.fx would take its value of now
            return False
        if isinstance(value, type):
            return root(value.__module__) in _OURS and _settled(value)
        if _constant(value) or _settled(value) or root(type(value).__module__) == "secateur":
            return True
        around = (*around, id(value))  # of which some hold themselves
        if isinstance(value, types.MethodType):
            return self._watched(value.__self__, around) and self._watched(value.__func__)
        if type(value) in _HOLDERS:
            held = [*value, *value.values()] if isinstance(value, dict) else value
            return all(self._watched(one, around) for one in held)
        return is_plain(value) and all(self._watched(one, around) for one in vars(value).values())


def _modes() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled())


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """The codes of functions within a function, whose outer variables are those of the call."""
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield one
            yield from _inner(one)


def _constant(value: Any) -> bool:
    """Whether it is data that cannot change."""
    if isinstance(value, tuple | frozenset):
        return type(value) in (tuple, torch.Size, frozenset) and all(map(_constant, value))
    if isinstance(value, (enum.Enum, *_OF_TORCH)):
        return True
    return isinstance(value, _SCALARS) and not hasattr(value, "__dict__")


def _settled(value: Any) -> bool:
    """Whether a value is code, or an object of torch without state, that tells nothing of types or of states."""
    if isinstance(value, (types.ModuleType, *_OF_TORCH)):
        return True
    if isinstance(value, type):
        return value is not type and not (root(value.__module__) == "torch" and _of_state(value))
    if not isinstance(value, _FUNCTIONS):
        return False
    if any(value is one for one in _ASKING):
        return False
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__
        free = owner is None or isinstance(owner, types.ModuleType | type) or root(type(owner).__module__) == "torch"
        return free and not _of_state(value)
    if not isinstance(value, types.FunctionType):
        return True
    if root(value.__module__) in _OURS:
        return not _of_state(value)
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    wrapped = getattr(value, "__wrapped__", None)  # torch.fx wraps those of `math`
    return isinstance(wrapped, types.BuiltinFunctionType | None) and all(_constant(v) or _settled(v) for v in defaults)


def _of_state(value: Any) -> bool:
    name = value.__name__
    return name.startswith(_STATE) and name not in _NO_STATE
