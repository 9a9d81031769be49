"""Methods that begin with a run of Linear layers, as the feed-forward part of BERT's layers does: one call and a rest.

A method that only calls modules, one after the other, is looked at as the forward of a module that holds these. What
follows the run is done as the trace says. Whatever is not plain inference, and whatever differs from what was traced,
goes through the method itself.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from secateur.runtime import sources
from secateur.runtime.attributes import FOLLOWED
from secateur.runtime.chains import Span, Step
from secateur.runtime.graphs import fingerprint, trace
from secateur.runtime.linears import SparseLinear
from secateur.runtime.mlps import Part, TracedRun, part_of, step_of
from secateur.runtime.packed_layers import PackedLayers, disturbed
from secateur.runtime.swapping import plain_class, read_from_instances
from secateur.runtime.traced import Traced, disturbed_inside, is_usual

__all__: list[str] = []  # reached through secateur.accelerate alone

Rest = Callable[[Tensor, Tensor], Any]
"""What a method gives, by what it was given and what the run gave."""

_STRAIGHT = (
    *(ast.Assign, ast.Return, ast.Expr, ast.Call, ast.keyword),
    *(ast.Name, ast.Attribute, ast.Constant, ast.Load, ast.Store),
)
"""What the body of a method may consist of: nothing but calls, whose results have names."""


class Reading(NamedTuple):
    """What a method was seen to do: the parts of a run, and the rest in words."""

    method: str
    run: tuple[Part, ...]
    rest: str


class TracedMethod(Traced[Reading | None, Rest]):
    """What a method of a module was seen to do: nothing that counts, or a run and a rest.

    What is watched is not the module but another one, which holds no more than what the method calls.
    """

    _held: nn.Module | None = None

    def look(self, module: nn.Module) -> tuple[Reading, Rest] | None:
        return None if self.words is None else _look(module, self.words.method)

    def forget(self) -> None:
        super().forget()
        self._held = None

    def note(self, module: nn.Module, found: Rest) -> None:
        super().note(module, found)
        self._held = module

    def rest(self, module: SparseMethod, name: str) -> Rest | None:
        """What follows the run, if the method of this name is still what it was seen to be."""
        if self.words is None or self.words.method != name:
            return None
        if self._held is None:  # of a copy, or as the steps are other ones
            module.steps()
            self._held = _hold(module, name)
        return self.found(self._held) if self._held is not None and _in_place(module, self._held) else None


class SparseMethod(TracedRun):
    """A module with a method that begins with a chain."""

    _traced: TracedMethod

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in _candidates(cls.plain):
            setattr(cls, name, _instead(cls.plain, name))

    @classmethod
    def place(cls, module: Any, span: Span) -> str:
        reading = _reading(module)
        return "" if reading is None else reading.method

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        reading = _reading(module)
        return [] if reading is None else [step_of(module, part) for part in reading.run]

    def fuse(self, choices: Mapping[Span, int]) -> list[PackedLayers]:
        self._traced = TracedMethod(None)
        seen = read(self)
        self._traced = TracedMethod(None if seen is None else seen[1])
        found = super().fuse(choices)
        if seen is not None:
            held, _, rest = seen
            self._traced.note(held, rest)
        return found


def _instead(plain: type[nn.Module], name: str) -> Callable[..., Any]:
    """What a SparseMethod has in the place of a method."""
    given = getattr(plain, name)

    @functools.wraps(given)
    def method(self: SparseMethod, *args: Any, **kwargs: Any) -> Any:
        own = getattr(plain, name)
        usual = own is given and is_usual(args, kwargs) and not disturbed(())
        rest = self._traced.rest(self, name) if usual else None
        if rest is None:
            return own(self, *args, **kwargs)
        return self._compared(args[0], functools.partial(own, self), lambda x: rest(x, self._stepwise(x)))

    return method


def _reading(module: Any) -> Reading | None:
    """What a module's method is taken to do, or else is seen to do now."""
    traced = vars(module).get("_traced")
    if isinstance(traced, TracedMethod):
        return traced.words
    seen = read(module)
    return None if seen is None else seen[1]


def read(module: nn.Module) -> tuple[nn.Module, Reading, Rest] | None:
    """The first method of a module that begins with a run of packed layers: a module to watch, and what it does.

    Returns:
        None if there is none, or that cannot be seen now: of modules in training, or with hooks.
    """
    for name in _candidates(plain_class(module)):
        held = _hold(module, name)
        if held is None or sum(isinstance(one, SparseLinear) for one in held.modules()) < 2:
            continue
        if disturbed_inside(held):
            return None
        if (seen := _look(held, name)) is not None:
            return held, *seen
    return None


def _look(held: nn.Module, name: str) -> tuple[Reading, Rest] | None:
    """What a method does, which is the forward of a module; None if it begins with no run."""
    try:
        graph = trace(held)
    except ValueError:  # more attributes than can be watched
        return None
    run = None if graph is None else _split(graph, held)
    if graph is None or not run:
        return None
    return Reading(name, tuple(run), fingerprint(graph)), fx.GraphModule(held, graph).forward


def _candidates(kind: type[nn.Module]) -> tuple[str, ...]:
    """Methods of one tensor that the forward of a class names, and that do nothing but call modules one by one."""
    forward: Any = inspect.unwrap(kind.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return tuple(name for name in names if _calls(getattr(kind, name, None)))


def _calls(method: Any) -> frozenset[str]:
    """The names of the modules that a method calls; empty if it does anything but call modules one after the other."""
    if not inspect.isfunction(method) or method.__code__.co_argcount != 2 or method.__defaults__ or method.__closure__:
        return frozenset()
    if method.__code__.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS) or method.__kwdefaults__:
        return frozenset()
    tree = sources.tree(method.__code__)
    nodes = [node for part in (tree.body if tree else ()) for node in ast.walk(part)]
    own = method.__code__.co_varnames[0]
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    called = [one.attr for one in calls if isinstance(one, ast.Attribute) and sources.is_name(one.value, own)]
    others = sum(isinstance(node, ast.Attribute) or sources.is_name(node, own) for node in nodes) != 2 * len(called)
    if others or len(called) != len(calls) or not all(isinstance(node, _STRAIGHT) for node in nodes):
        return frozenset()
    return frozenset(called)


def _hold(module: nn.Module, name: str) -> nn.Module | None:
    """A module whose forward is a method of this one, and that holds the modules that it calls."""
    plain = plain_class(module)
    method = getattr(plain, name)
    names = _calls(method)
    if not all(isinstance(module._modules.get(one), nn.Module) for one in names):
        return None
    kind = type(name, (nn.Module,), {"forward": method, "__module__": method.__module__, FOLLOWED: (SparseLinear,)})
    held: nn.Module = kind().eval()
    held._modules.update((one, module._modules[one]) for one in sorted(names))
    return held if _in_place(module, held) else None


def _in_place(module: nn.Module, held: nn.Module) -> bool:
    """Whether a module has those that are held, and would call these."""
    own, modules = vars(module), module._modules
    fine = all(modules.get(name) is one and name not in own for name, one in held._modules.items())
    return fine and read_from_instances(plain_class(module), held._modules)


def _split(graph: fx.Graph, held: nn.Module) -> list[Part]:
    """The parts of the run that a graph begins with, which are taken out: what they give becomes its second input."""
    x, *nodes = graph.nodes
    found: list[Part] = []
    last = x
    for node in nodes:
        part = part_of(node, held) if node.args == (last,) and node.op != "output" else None
        if part is None or (not found and not isinstance(step_of(held, part), SparseLinear)):
            break
        if found and len(last.users) != 1:
            break
        found.append(part)
        last = node
    if found:
        with graph.inserting_after(x):
            given = graph.placeholder("given")
        last.replace_all_uses_with(given)
        for node in reversed(nodes[: len(found)]):
            graph.erase_node(node)
    return found
