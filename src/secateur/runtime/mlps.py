"""Modules of any class whose whole forward is a run of Linear layers, plain or gated: one native call.

That is seen by a trace of the forward. Whatever is not plain inference, and whatever differs from what was traced, goes
through the module's own forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from secateur.runtime import activations, transformer_layers
from secateur.runtime.attributes import Attributes, inside
from secateur.runtime.chains import Chain, Fused, Gated, Span, Step, parts
from secateur.runtime.graphs import agree, trace
from secateur.runtime.linears import SparseLinear
from secateur.runtime.packed_layers import disturbed
from secateur.runtime.swapping import as_usual

__all__: list[str] = []  # reached through secateur.accelerate alone

Part = str | int | tuple["Part", "Part", "Part"]
"""A module by its name, a function by its number, or the three parts of what is gated."""

_MULTIPLY = (operator.mul, torch.mul, "mul")
_METHODS = {"relu": activations.RELU, "tanh": activations.TANH, "sigmoid": activations.SIGMOID}
_FUNCTIONS: tuple[Step, ...] = (
    nn.Identity().eval(),
    *(F.relu, F.relu6, F.gelu, nn.GELU("tanh").eval(), F.silu, torch.tanh, torch.sigmoid, F.hardswish),
)
"""By their numbers, to be called where the native call does not."""


class Traced:
    """What a module's forward was seen to be, and the attributes by which it was; a copy looks anew."""

    def __init__(self, found: tuple[Part, ...]) -> None:
        self.found = found
        self.attributes: Attributes | None = None
        self._inner: list[dict[str, Any]] = []

    def __reduce__(self) -> Any:
        return Traced, (self.found,)

    def holds(self, module: nn.Module) -> bool:
        """Whether the forward is still what it was seen to be."""
        if self.attributes is None:
            if not self.found or (now := read(module)) is None:
                return False
            if now != self.found:
                self.found = ()
                return False
            self.note(module)
        if module.training or disturbed(self._inner):
            return False
        return self.attributes is not None and (self.attributes.same(module) or self.attributes.same_but_notes(module))

    def note(self, module: nn.Module) -> None:
        """Take the attributes as they are now for those by which the forward is what it was seen to be."""
        self.attributes = Attributes(module)
        self._inner = [vars(one) for one in inside(module)[1:]]


class SparseMlp(Fused):
    """A module whose forward is one chain."""

    _traced: Traced

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        if kind.__module__.startswith("torch.") or any(one.takes(kind) for one in transformer_layers.FUSED):
            return False
        slots = any("__slots__" in vars(base) for base in kind.__mro__[:-1])
        return type(kind) is type and not slots and as_usual(kind)

    @classmethod
    def place(cls, module: Any, span: Span) -> str:
        return ":"

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        traced = module.__dict__.get("_traced")
        found = traced.found if isinstance(traced, Traced) else read(module) or ()
        return [step_of(module, part) for part in found]

    def fuse(self, choices: Mapping[Span, int]) -> list[Chain]:
        self._traced = Traced(())
        self._traced = Traced(read(self) or ())
        found = super().fuse(choices)
        self._traced.note(self)
        return found

    def steps(self) -> list[Step]:
        self._traced.attributes = None  # among which these are
        return super().steps()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that it was."""
        usual = len(args) == 1 and not kwargs and type(args[0]) is Tensor and not torch.compiler.is_compiling()
        if not usual or not self._traced.holds(self):
            return super().forward(*args, **kwargs)
        chains = [step for step in self._made[1] if isinstance(step, Chain)]
        if not all(chain._choices for chain in chains):  # so it is only while examples are looked at
            agrees = agree(super().forward(args[0].clone()), self._stepwise(args[0].clone()))
            for chain in chains:
                chain.agrees = chain.agrees and agrees
        return self._stepwise(args[0])

    def _stepwise(self, x: Tensor) -> Tensor:
        for step in self._made[1]:
            x = step(x)
        return x

    def restore(self) -> None:
        self.__dict__.pop("_traced", None)
        super().restore()


def read(module: nn.Module) -> tuple[Part, ...] | None:
    """What a module's forward does, if layers that it owns and what lies between are all of it; empty if they are not.

    Returns:
        None if that cannot be seen now: of a module in training, or with hooks inside.
    """
    owned = [child for child in module._modules.values() if isinstance(child, SparseLinear)]
    if len(owned) < 2:
        return ()
    if module.training or disturbed(map(vars, inside(module)[1:])):
        return None
    try:
        graph = trace(module)
    except ValueError:  # more attributes than can be watched
        return ()
    found = [] if graph is None else _chain(graph, module)
    layers = [part for part in parts([step_of(module, one) for one in found]) if isinstance(part, nn.Linear)]
    return tuple(found) if all(layer in owned for layer in layers) else ()


def _chain(graph: fx.Graph, module: nn.Module) -> list[Part]:
    """The parts of a graph that is a chain, or none."""
    x, *_, output = graph.nodes
    found: list[Part] = []
    node: Any = output.args[0]
    while node is not x:
        if not isinstance(node, fx.Node) or len(node.users) != 1:
            return []
        part = _gated(node, x, module) if node.target in _MULTIPLY else part_of(node, module)
        if part is None:
            return []
        found.append(part)
        node = x if isinstance(part, tuple) else node.args[0]
    plain = not found or not isinstance(found[-1], tuple)
    whole = len(x.users) == (1 if plain else 2) and len(graph.nodes) == 2 + sum(map(_nodes, found))
    return found[::-1] if whole else []


def _nodes(part: Part) -> int:
    return 4 if isinstance(part, tuple) else 1


def _gated(node: fx.Node, x: fx.Node, module: nn.Module) -> Part | None:
    """The parts of `activation(gate(x)) * up(x)`, in whatever order, of two layers."""
    for one, other in (node.args, node.args[::-1]) if len(node.args) == 2 and not node.kwargs else ():
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or not one.args or one is other:
            continue
        gate: Any = one.args[0]
        if not isinstance(gate, fx.Node) or gate.args != (x,) or other.args != (x,):
            continue
        found = part_of(gate, module), part_of(one, module), part_of(other, module)
        apart = gate.target != other.target and all(len(n.users) == 1 for n in (one, gate, other))
        if None not in found and apart:
            return found  # type: ignore[return-value]
    return None


def part_of(node: fx.Node, module: nn.Module) -> Part | None:
    """A node with one input: a layer, or an activation."""
    if node.op == "call_module":
        layer: Any = module.get_submodule(str(node.target))
        known = isinstance(layer, SparseLinear) or activations.number(layer) is not None
        return str(node.target) if known and len(node.args) == 1 and not node.kwargs else None
    if node.op == "call_method":
        return _METHODS.get(str(node.target)) if len(node.args) == 1 and not node.kwargs else None
    return _called(node.target, *node.args, **node.kwargs) if node.op == "call_function" else None  # type: ignore[arg-type]


def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int | None:
    """The number of a call of a function."""
    given = {name: value for name, value in kwargs.items() if name != "inplace" or value}
    if function is F.gelu and len(args) == 1 and [*given] == ["approximate"]:
        return {"none": activations.GELU, "tanh": activations.GELU_TANH}.get(given["approximate"])
    if function is F.dropout and len(args) == 1 and given.get("training") is False:
        return activations.NONE
    return activations.number(function) if len(args) == 1 and not given else None


def step_of(module: nn.Module, part: Part) -> Any:
    if isinstance(part, tuple):
        return Gated(*(step_of(module, one) for one in part))
    return _FUNCTIONS[part] if isinstance(part, int) else module.get_submodule(part)
