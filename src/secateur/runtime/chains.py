"""Runs of sparse Linear layers, of an nn.Sequential first of all, with what lies between: one native call for each.

Between its layers the activations stay as the kernels want them, and Python is entered once. Whatever is not plain
inference goes through the modules, one after the other.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.runtime import activations, products
from secateur.runtime.linears import SparseLinear
from secateur.runtime.packed_layers import PackedLayers
from secateur.runtime.swapping import Swapped

__all__: list[str] = []  # reached through secateur.accelerate alone

Span = tuple[int, int]
"""First step of a run, and the one behind its last."""

_IN_TURN = nn.Sequential.forward, nn.Sequential.__iter__

Step = Callable[[Tensor], Tensor]
"""A module, or a function that is an activation."""


@dataclass(frozen=True)
class Gated:
    """A step: two layers of one input, the second multiplied by the activation of the first."""

    gate: nn.Module
    activation: Step
    up: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = self.activation(self.gate(x)) * self.up(x)
        return product


class Singly:
    """Modules, and functions, that are called one after the other."""

    def __init__(self, modules: Sequence[Step]) -> None:
        self.modules = tuple(modules)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules:
            x = module(x)
        return x


class Chain(PackedLayers, Singly):
    """Modules that one native call computes for the row classes in `_choices`: the first one is a SparseLinear."""

    plain: ClassVar[type[Singly]] = Singly

    def __init__(self, modules: Sequence[Step], choices: int = 0) -> None:
        Singly.__init__(self, modules)
        PackedLayers.__init__(self, parts(modules), choices)
        numbers = _numbers(modules)
        ends = zip(self.layers, numbers, strict=True)
        through = [int(layer.weight.shape[0]) for layer, number in ends if not number & activations.GATE]
        self.widths = (int(self.layers[0].weight.shape[1]), *through)
        self._ends = (self.widths[0], self.widths[-1])
        self._activations = (ctypes.c_int32 * len(numbers))(*numbers)
        self._handles = self._pointers(), 0

    def __repr__(self) -> str:
        return f"{self.modules} as {[layer._choices for layer in self.layers]}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., first width] to [..., last width]."""
        if self._ready(x):
            given = (len(self.layers), self._blobs, self._handles, self._biases, self._activations, self._choices)
            out = products.chain(x, self._ends, *given)
            if out is not None:
                return out
        return Singly.forward(self, x)

    def _laid(self) -> None:
        chosen = [code.choices for code in self._codes if code is not None]
        handles = self._pointers(*(None if code is None else code.handle for code in self._codes))
        self._handles = handles, functools.reduce(operator.and_, chosen) if chosen else 0


class Fused(Swapped):
    """A module that calls steps one after the other, some of whose runs are chains."""

    _fused: Mapping[Span, int] = MappingProxyType({})
    """Row classes of the runs that are fused."""
    _made: tuple[list[Step], list[Step]] = ([], [])
    """The steps as they were, and what is called in their place."""
    _derived: ClassVar[tuple[str, ...]] = ("_made",)
    """Attributes that come of the steps, and are no part of the state."""

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        """Whether modules of this class, which is a plain one, call their steps so."""
        raise NotImplementedError

    @classmethod
    def place(cls, module: Any, span: Span) -> str:
        """Where a run is, in words."""
        return f"{span[0]}:{span[1]}"

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        """The steps of such a module, plain or not."""
        raise NotImplementedError

    @classmethod
    def spans(cls, module: Any, steps: Sequence[Step]) -> list[Span]:
        """Where the runs of such a module are among its steps."""
        return [*runs(steps)]

    @classmethod
    def join(cls, steps: Sequence[Step], choices: int = 0) -> PackedLayers:
        """What stands for a run: one call for these row classes."""
        return Chain(steps, choices)

    def fuse(self, choices: Mapping[Span, int]) -> list[PackedLayers]:
        """Fuse these runs for these row classes; gives what stands there now."""
        self._fused = dict(choices)
        return [step for step in self.steps() if isinstance(step, PackedLayers)]

    def steps(self) -> list[Step]:
        """The steps, and one call in the place of each fused run that is still there."""
        modules, end = self.sequence(self), 0
        steps: list[Step] = []
        for a, b in self.spans(self, modules):
            if (a, b) in self._fused:
                steps += [*modules[end:a], self.join(modules[a:b], self._fused[a, b])]
                end = b
        steps += modules[end:]
        self._made = (modules, steps)
        return steps

    def _through(self, x: Any) -> Any:
        """What the last step gives."""
        modules, steps = self._made
        if self.sequence(self) != modules:
            steps = self.steps()
        for step in steps:
            x = step(x)
        return x

    def restore(self) -> None:
        """Become the plain module again."""
        for name in ("_fused", *self._derived):
            self.__dict__.pop(name, None)
        super().restore()

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, given, state, *rest = super().__reduce_ex__(protocol)
        return made, given, {name: value for name, value in state.items() if name not in self._derived}, *rest


class SparseSequential(Fused, nn.Sequential):
    """An nn.Sequential some of whose runs are chains."""

    plain = nn.Sequential

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        """Those with nothing of their own around the calls, as may come later."""
        return issubclass(kind, nn.Sequential) and (kind.forward, kind.__iter__) == _IN_TURN

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        return [*module._modules.values()]

    def forward(self, input: Any) -> Any:
        """As nn.Sequential."""
        if torch.compiler.is_compiling() or not self.takes(self.plain):
            return super().forward(input)  # type: ignore[no-untyped-call]
        return self._through(input)


def runs(modules: Sequence[Step]) -> Iterator[Span]:
    """Where the steps begin and end that one native call can compute, with two packed Linear layers or more.

    Behind each layer there may be one activation, Dropout and Identity.

    >>> list(runs([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)]))  # not packed
    []
    """
    start, count, width, active = 0, 0, -1, False
    for i in range(len(modules) + 1):
        module: Any = modules[i] if i < len(modules) else None
        number = activations.number(module)
        if number is not None and not (number and active):
            active |= number > 0
            continue
        ends = _ends(module)
        if ends is None or ends[0] != width:
            if count > 1:
                yield start, i
            start, count, width = i, 0, -1
        active = False
        if ends is not None:
            count, width = count + (2 if isinstance(module, Gated) else 1), ends[1]


def parts(steps: Iterable[Step]) -> list[Step]:
    """The steps, and in the place of each that is gated what it consists of."""
    split = ((s.gate, s.activation, s.up) if isinstance(s, Gated) else (s,) for s in steps)
    return [part for some in split for part in some]


def _numbers(steps: Iterable[Step]) -> list[int]:
    """For each layer, in its place, what the native library does after it: one layer may have several places."""
    numbers: list[int] = []
    for step in steps:
        if isinstance(step, Gated):
            numbers += [activations.GATE | (activations.number(step.activation) or activations.NONE), activations.NONE]
        elif isinstance(step, SparseLinear):
            numbers.append(activations.NONE)
        else:
            numbers[-1] |= activations.number(step) or activations.NONE
    return numbers


def _ends(step: Any) -> tuple[int, int] | None:
    """Features that go in and come out, of a packed layer or two that are gated; else None."""
    if isinstance(step, Gated):
        ends = _ends(step.gate)
        return ends if activations.number(step.activation) is not None and ends == _ends(step.up) else None
    if isinstance(step, SparseLinear) and "packed_weight" in step._buffers:
        weight = step._parameters.get("weight")
        return None if weight is None else (weight.shape[1], weight.shape[0])
    return None
