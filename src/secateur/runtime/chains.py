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
from torch.nn.modules import module as everywhere

from secateur.runtime import activations, native, products
from secateur.runtime.linears import SparseLinear
from secateur.runtime.swapping import Swapped
from secateur.runtime.weight_checks import Watch, pointers, seen_to_differ, version

__all__: list[str] = []  # reached through secateur.accelerate alone

Span = tuple[int, int]
"""First step of a run, and the one behind its last."""

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


class Chain(Singly):
    """Modules that one native call computes for the row classes in `_choices`: the first one is a SparseLinear."""

    plain: ClassVar[type[Singly]] = Singly

    def __init__(self, modules: Sequence[Step], choices: int = 0) -> None:
        super().__init__(modules)
        self._choices = choices
        self.agrees = True
        """Whether the module that it stands in gave the same for all examples."""
        found = parts(modules)
        own = [part for part in found if isinstance(part, nn.Module)]
        self._own = [module.__dict__ for module in own]
        self._settings = [(m.__dict__, name, value) for m in own for name, value in activations.settings(m).items()]
        self.layers = [part for part in found if isinstance(part, SparseLinear)]
        numbers = _numbers(modules)
        ends = zip(self.layers, numbers, strict=True)
        through = [layer.out_features for layer, number in ends if not number & activations.GATE]
        self.widths = (self.layers[0].in_features, *through)
        self._ends = (self.widths[0], self.widths[-1])
        self._activations = (ctypes.c_int32 * len(numbers))(*numbers)
        self._pointers = ctypes.c_void_p * len(numbers)
        self._blobs = self._biases = self._pointers()
        self._made: list[native.Code | None] = []
        self._codes = self._pointers(), 0
        self._known: list[tuple[Any, ...]] = []
        self._tensors: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._addresses = [0]  # which no tensors have, so the first call renews all
        self._strides: list[tuple[int, ...]] = []
        self._watches: list[Watch] = []
        self._watched: tuple[Any, Any] = (None, None)

    def __repr__(self) -> str:
        return f"{self.modules} as {[layer._choices for layer in self.layers]}"

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    has_code: ClassVar[bool] = False
    """Its code is that of its layers, which was chosen before."""

    def choose(self, choices: int, generated: int = 0) -> None:
        """Run as one native call for these row classes."""
        self._choices = choices

    def rows(self, x: Tensor) -> int:
        """The rows of its first layer."""
        return self.layers[0].rows(x)

    def observe(self, x: Tensor) -> None:
        """Nothing to learn from an example."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., first width] to [..., last width]."""
        if self._ready(x):
            given = (len(self.layers), self._blobs, self._codes, self._biases, self._activations, self._choices)
            out = products.chain(x, self._ends, *given)
            if out is not None:
                return out
        return super().forward(x)

    def _ready(self, x: Tensor) -> bool:
        """Whether the modules may be passed over; raises a StateError as their own `_ready` does."""
        if disturbed(self._own):
            return False
        for own, name, value in self._settings:
            if own.get(name) != value:
                return False
        if not self.layers[0]._takes_input(x):
            return False
        if not self._in_place():
            return self._renew()
        if seen_to_differ(self._watches, self._watched):
            for layer in self.layers:  # to say which it is
                layer.require_fresh()
        return True

    def _in_place(self) -> bool:
        """Whether all tensors are where they were, and none was written to as far as torch counts."""
        try:
            for parameters, buffers, weight, number, bias, packed in self._known:
                if (
                    parameters["weight"] is not weight
                    or weight._version != number
                    or parameters["bias"] is not bias
                    or buffers["packed_weight"] is not packed
                ):
                    return False
        except (KeyError, RuntimeError):  # parameters gone, or made in inference mode
            return False
        at = [*map(Tensor.data_ptr, self._tensors)]
        return at == self._addresses and [*map(Tensor.stride, self._weights)] == self._strides

    def _renew(self) -> bool:
        """Take the addresses of all tensors as they are now; raises a StateError if weights have changed."""
        known: list[tuple[Any, ...]] = []
        for layer in self.layers:
            layer.current()
            weight = layer.weight
            known.append((layer._parameters, layer._buffers, weight, version(weight), layer.bias, layer.packed_weight))
        self._blobs = self._pointers(*(packed.data_ptr() for *_, packed in known))
        self._biases = self._pointers(*(None if bias is None else bias.data_ptr() for *_, bias, _ in known))
        self._tensors = [tensor for _, _, weight, _, *rest in known for tensor in (weight, *rest) if tensor is not None]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._weights = [weight for _, _, weight, *_ in known]
        self._strides = [weight.stride() for weight in self._weights]
        watched = [layer for layer in self.layers if layer._packed_from is not None and layer._packed_from.watches]
        self._watches = [layer._packed_from.watches[0] for layer in watched]  # type: ignore[union-attr]
        addresses = [layer.weight.data_ptr() for layer in watched]
        self._watched = pointers(addresses), pointers([one.address for one in self._watches])
        self._known = known
        self._made = [layer._codes.get("weight") for layer in self.layers]  # kept, as it is called by its address
        chosen = [code.choices for code in self._made if code is not None]
        handles = self._pointers(*(None if code is None else code.handle for code in self._made))
        self._codes = handles, functools.reduce(operator.and_, chosen) if chosen else 0
        return True


class Fused(Swapped):
    """A module that calls steps one after the other, some of whose runs are chains."""

    _fused: Mapping[Span, int] = MappingProxyType({})
    """Row classes of the runs that are fused."""
    _made: tuple[list[Step], list[Step]] = ([], [])
    """The steps as they were, and what is called in their place; no part of the state."""

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        """Whether modules of this class, which is a plain one, call their steps so."""
        raise NotImplementedError

    @classmethod
    def place(cls, span: Span) -> str:
        """Where a run is, in words."""
        return f"{span[0]}:{span[1]}"

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        """The steps of such a module, plain or not."""
        raise NotImplementedError

    def fuse(self, choices: Mapping[Span, int]) -> list[Chain]:
        """Fuse these runs for these row classes; gives the chains that stand there now."""
        self._fused = dict(choices)
        return [step for step in self.steps() if isinstance(step, Chain)]

    def steps(self) -> list[Step]:
        """The steps, and a chain in the place of each fused run that is still there."""
        modules, end = self.sequence(self), 0
        steps: list[Step] = []
        for a, b in runs(modules):
            if (a, b) in self._fused:
                steps += [*modules[end:a], Chain(modules[a:b], self._fused[a, b])]
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
        for name in ("_fused", "_made"):
            self.__dict__.pop(name, None)
        super().restore()

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, given, state, *rest = super().__reduce_ex__(protocol)
        return made, given, {name: value for name, value in state.items() if name != "_made"}, *rest


class SparseSequential(Fused, nn.Sequential):
    """An nn.Sequential some of whose runs are chains."""

    plain = nn.Sequential

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        return issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        return [*module._modules.values()]

    def forward(self, input: Any) -> Any:
        """As nn.Sequential."""
        return super().forward(input) if torch.compiler.is_compiling() else self._through(input)  # type: ignore[no-untyped-call]


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


def disturbed(modules: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some modules, given by their attributes, are in training, or have hooks or a forward of their own."""
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    for own in modules:
        if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return True
    return False


def _ends(step: Any) -> tuple[int, int] | None:
    """Features that go in and come out, of a packed layer or two that are gated; else None."""
    if isinstance(step, Gated):
        ends = _ends(step.gate)
        return ends if activations.number(step.activation) is not None and ends == _ends(step.up) else None
    if isinstance(step, SparseLinear) and "packed_weight" in step._buffers:
        return step.in_features, step.out_features
    return None
