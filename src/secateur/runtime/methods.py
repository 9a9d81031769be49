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
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.runtime import sources, transformer_layers
from secateur.runtime.attributes import FOLLOWED, Attributes, inside
from secateur.runtime.chains import Chain, Fused, Span, Step
from secateur.runtime.graphs import agree, fingerprint, trace
from secateur.runtime.linears import SparseLinear
from secateur.runtime.mlps import Part, SparseMlp, part_of, step_of
from secateur.runtime.packed_layers import PackedLayers, disturbed
from secateur.runtime.swapping import plain_class

__all__: list[str] = []  # reached through secateur.accelerate alone

_STRAIGHT = (
    *(ast.Assign, ast.Return, ast.Expr, ast.Call, ast.keyword),
    *(ast.Name, ast.Attribute, ast.Constant, ast.Load, ast.Store),
)
"""What the body of a method may consist of: nothing but calls, whose results have names."""


class Method:
    """A method of a module that begins with a run, as it was seen to be; a copy looks anew.

    Args:
        name: of the method; empty if there is none.
        found: the parts of the run.
        words: what the rest does.
    """

    def __init__(self, name: str = "", found: tuple[Part, ...] = (), words: str = "") -> None:
        self.name, self.found, self.words = name, found, words
        self.held: nn.Module | None = None
        self.rest: Callable[[Tensor, Tensor], Any] | None = None
        self.attributes: Attributes | None = None
        self._inner: list[dict[str, Any]] = []

    def __reduce__(self) -> Any:
        return Method, (self.name, self.found, self.words)

    def note(self) -> None:
        """Take the attributes as they are now for those by which the method is what it was seen to be."""
        if self.held is not None:
            self.attributes = Attributes(self.held)
            self._inner = [vars(one) for one in inside(self.held)[1:]]

    def holds(self, module: SparseMethod) -> bool:
        """Whether the method is still what it was seen to be."""
        if self.attributes is None and not self._look_again(module):
            return False
        held, attributes = self.held, self.attributes
        if held is None or attributes is None or not _in_place(module, held) or disturbed(self._inner):
            return False
        return attributes.same(held) or attributes.same_but_notes(held)

    def _look_again(self, module: SparseMethod) -> bool:
        if not self.found or (now := read(module)) is None:
            return False
        if (now.name, now.found, now.words) != (self.name, self.found, self.words):
            self.found = ()
            return False
        self.held, self.rest = now.held, now.rest
        module.steps()
        self.note()
        return True


class SparseMethod(Fused):
    """A module with a method that begins with a chain."""

    _traced: Method

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in _candidates(cls.plain):
            setattr(cls, name, _instead(cls.plain, name))

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        return SparseMlp.takes(kind)

    @classmethod
    def place(cls, module: Any, span: Span) -> str:
        return (_kept(module) or read(module) or Method()).name

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        method = _kept(module) or read(module) or Method()
        return [step_of(module, part) for part in method.found]

    def fuse(self, choices: Mapping[Span, int]) -> list[PackedLayers]:
        self._traced = Method()
        self._traced = read(self) or Method()
        found = super().fuse(choices)
        self._traced.note()
        return found

    def steps(self) -> list[Step]:
        self._traced.attributes = None  # among which these are
        return super().steps()

    def restore(self) -> None:
        self.__dict__.pop("_traced", None)
        super().restore()

    def _as_one(self, x: Tensor) -> Any:
        """What the method gives."""
        out = x
        for step in self._made[1]:
            out = step(out)
        rest = self._traced.rest
        return out if rest is None else rest(x, out)


FUSED: tuple[type[Fused], ...] = (*transformer_layers.FUSED, SparseMlp, SparseMethod)
"""What modules that contain runs become."""


def _instead(plain: type[nn.Module], name: str) -> Callable[..., Any]:
    """What a SparseMethod has in the place of a method."""
    given = getattr(plain, name)

    @functools.wraps(given)
    def method(self: SparseMethod, *args: Any, **kwargs: Any) -> Any:
        now, traced = getattr(plain, name), self._traced
        usual = len(args) == 1 and not kwargs and type(args[0]) is Tensor and not torch.compiler.is_compiling()
        if not usual or now is not given or traced.name != name or not traced.holds(self):
            return now(self, *args, **kwargs)
        chains = [step for step in self._made[1] if isinstance(step, Chain)]
        if not all(chain._choices for chain in chains):  # so it is only while examples are looked at
            agrees = agree(now(self, args[0].clone()), self._as_one(args[0].clone()))
            for chain in chains:
                chain.agrees = chain.agrees and agrees
        return self._as_one(args[0])

    return method


def read(module: nn.Module) -> Method | None:
    """The first method of a module that begins with a run of packed layers, and what it does.

    Returns:
        None if there is none, or that cannot be seen now: of modules in training, or with hooks.
    """
    for name in _candidates(plain_class(module)):
        held = _hold(module, name)
        if held is None or sum(isinstance(one, SparseLinear) for one in held.modules()) < 2:
            continue
        if disturbed(map(vars, inside(held)[1:])):
            return None
        try:
            graph = trace(held)
        except ValueError:  # more attributes than can be watched
            continue
        if graph is not None and (found := _split(graph, held)):
            method = Method(name, tuple(found), fingerprint(graph))
            method.held = held
            if not _gives_placeholder(graph):
                method.rest = fx.GraphModule(held, graph).forward
            return method
    return None


def _kept(module: Any) -> Method | None:
    found = vars(module).get("_traced")
    return found if isinstance(found, Method) else None


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
    called = [one.attr for one in calls if isinstance(one, ast.Attribute) and _is_name(one.value, own)]
    others = sum(isinstance(node, ast.Attribute) or _is_name(node, own) for node in nodes) != 2 * len(called)
    if others or len(called) != len(calls) or not all(isinstance(node, _STRAIGHT) for node in nodes):
        return frozenset()
    return frozenset(called)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _hold(module: nn.Module, name: str) -> nn.Module | None:
    """A module whose forward is a method of this one, and that holds the modules that it calls."""
    plain = plain_class(module)
    method = getattr(plain, name)
    names = _calls(method)
    if not all(isinstance(module._modules.get(one), nn.Module) and not hasattr(plain, one) for one in names):
        return None
    kind = type(name, (nn.Module,), {"forward": method, "__module__": method.__module__, FOLLOWED: (SparseLinear,)})
    held: nn.Module = kind().eval()
    held._modules.update((one, module._modules[one]) for one in sorted(names))
    return held if _in_place(module, held) else None


def _in_place(module: nn.Module, held: nn.Module) -> bool:
    """Whether a module has those that are held, and would call these."""
    own, modules = vars(module), module._modules
    return all(modules.get(name) is one and name not in own for name, one in held._modules.items())


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


def _gives_placeholder(graph: fx.Graph) -> bool:
    """Whether a graph gives its second input, and does nothing else."""
    _, given, *rest = graph.nodes
    return len(rest) == 1 and rest[0].args == (given,)
