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
from secateur.runtime.chains import Chain, Fused, Gated, Span, Step, parts
from secateur.runtime.graphs import agree, trace
from secateur.runtime.linears import SparseLinear
from secateur.runtime.packed_layers import PackedLayers, disturbed
from secateur.runtime.swapping import as_usual, held_at
from secateur.runtime.traced import Traced, disturbed_inside, is_usual

__all__: list[str] = []  # reached through secateur.accelerate alone

Part = str | int | tuple["Part", "Part", "Part"]
"""A module by its name, a function by its number, or the three parts of what is gated."""

_MULTIPLY = (operator.mul, torch.mul, "mul")
_METHODS = {"relu": activations.RELU, "tanh": activations.TANH, "sigmoid": activations.SIGMOID}
_FUNCTIONS: tuple[Step, ...] = (
    nn.Identity().eval(),
    *(F.relu, F.relu6, F.gelu, nn.GELU("tanh").eval(), F.silu, torch.tanh, torch.sigmoid, F.hardswish, F.hardsigmoid),
)
"""By their numbers, to be called where the native call does not."""


class TracedMlp(Traced[tuple[Part, ...], bool]):
    """What a module's forward was seen to be: these parts, or none."""

    def look(self, module: nn.Module) -> tuple[tuple[Part, ...], bool] | None:
        parts = read(module)
        return None if parts is None else (parts, True)


class TracedRun(Fused):
    """A module of any class in which a trace has shown a run: one chain."""

    _traced: Traced[Any, Any]

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        if kind.__module__.startswith("torch.") or any(one.takes(kind) for one in transformer_layers.FUSED):
            return False
        slots = any("__slots__" in vars(base) for base in kind.__mro__[:-1])
        return type(kind) is type and not slots and as_usual(kind)

    def steps(self) -> list[Step]:
        self._traced.forget()  # the attributes among which these are
        return super().steps()

    def restore(self) -> None:
        self.__dict__.pop("_traced", None)
        super().restore()

    def _stepwise(self, x: Tensor) -> Tensor:
        for step in self._made[1]:
            x = step(x)
        return x

    def _compared(self, x: Tensor, own: Callable[[Tensor], Any], stepwise: Callable[[Tensor], Any]) -> Any:
        """What the steps give; while examples are looked at, whether its own code gives the same is noted."""
        chains = [step for step in self._made[1] if isinstance(step, Chain)]
        if not all(chain._choices for chain in chains):  # so it is only then
            agrees = agree(own(x.clone()), stepwise(x.clone()))
            for chain in chains:
                chain.agrees = chain.agrees and agrees
        return stepwise(x)


class SparseMlp(TracedRun):
    """A module whose forward is one chain."""

    _traced: TracedMlp

    @classmethod
    def place(cls, module: Any, span: Span) -> str:
        return ":"

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        traced = module.__dict__.get("_traced")
        found = traced.words if isinstance(traced, TracedMlp) else read(module) or ()
        return [step_of(module, part) for part in found]

    def fuse(self, choices: Mapping[Span, int]) -> list[PackedLayers]:
        self._traced = TracedMlp(())
        self._traced = TracedMlp(read(self) or ())
        found = super().fuse(choices)
        if self._traced.words:
            self._traced.note(self, True)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that it was."""
        if not is_usual(args, kwargs) or disturbed(()) or not self._traced.found(self):
            return super().forward(*args, **kwargs)
        return self._compared(args[0], super().forward, self._stepwise)


def read(module: nn.Module) -> tuple[Part, ...] | None:
    """What a module's forward does, if layers that it owns and what lies between are all of it; empty if they are not.

    Returns:
        None if that cannot be seen now: of a module in training, or with hooks inside.
    """
    owned = [child for child in module._modules.values() if isinstance(child, SparseLinear)]
    if len(owned) < 2:
        return ()
    if disturbed_inside(module):
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
        layer = held_at(module, str(node.target))
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
    """What computes a part of a module's forward: a layer of it, a function, or what is gated."""
    if isinstance(part, tuple):
        return Gated(*(step_of(module, one) for one in part))
    return _FUNCTIONS[part] if isinstance(part, int) else held_at(module, part)
