"""Layers that a forward calls with one tensor, directly one after the other, as Q, K and V: one native call for all.

The first of them multiplies for all, and each of the others takes what is its own. It does so only if it is called from
where the forward was seen to call it, with the very same tensor. Whatever else is on, each layer runs for itself.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.runtime import products
from secateur.runtime.chains import Fused, Span, Step
from secateur.runtime.linears import SparseLinear, around
from secateur.runtime.mlps import TracedRun
from secateur.runtime.neighbours import Neighbours, neighbours
from secateur.runtime.packed_layers import PackedLayers
from secateur.runtime.swapping import as_usual, plain_class, read_from_instances

__all__: list[str] = []  # reached through secateur.accelerate alone

_NUMBERS = (int, float, bool, type(None))
_CALLERS = 4
"""Frames from `take`, by way of the forward of a layer and of torch, to who calls the layer: if there are no hooks."""


class Each:
    """Layers of one input, each called for itself."""

    layers: Sequence[Any]

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each gives, without the hooks, which a call of the layer runs."""
        return [layer.forward(x) for layer in self.layers]


class Siblings(PackedLayers):
    """Layers of one input that one native call computes for the row classes in `_choices`."""

    plain: ClassVar[type[Each]] = Each

    def __init__(self, layers: Sequence[Any], choices: int = 0) -> None:
        super().__init__(layers, choices)
        self._rows = [int(layer.weight.shape[0]) for layer in self.layers]
        self.widths = (int(self.layers[0].weight.shape[1]), sum(self._rows))
        self._handles: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"{self.layers} as {[layer._choices for layer in self.layers]}"

    def forward(self, x: Tensor) -> list[Tensor] | None:
        """[..., features in] to what each layer gives; None where each has to run for itself."""
        if not self._ready(x):
            return None
        columns, choices = self.widths[0], self._choices
        return products.several(x, (columns, self._rows), self._blobs, self._code, self._biases, choices)

    def _code(self, bucket: int) -> Any:
        """The handles of the code that the layers have for a row class."""
        if bucket not in self._handles:
            chosen = (code if code is not None and code.choices >> bucket & 1 else None for code in self._codes)
            self._handles[bucket] = self._pointers(*(None if code is None else code.handle for code in chosen))
        return self._handles[bucket]

    def _laid(self) -> None:
        self._handles = {}


class Family:
    """The siblings among the layers of a module, and where its forward calls them."""

    def __init__(self, module: nn.Module, found: Sequence[tuple[Neighbours, Siblings]]) -> None:
        self._own, self._modules, self.code = vars(module), module._modules, _code(module)
        self._plain = plain_class(module)
        self.places = {
            offset: (one, siblings, i)
            for one, siblings in found
            for i, offsets in enumerate(one.offsets)
            for offset in offsets
        }

    def in_place(self, one: Neighbours, siblings: Siblings) -> bool:
        """Whether the module would call these layers, and what is read in between are numbers."""
        own = self._own
        if [*map(self._modules.get, one.names)] != siblings.layers or not own.keys().isdisjoint(one.names):
            return False
        if not read_from_instances(self._plain, (*one.names, *one.numbers)):
            return False
        return not one.numbers or all(type(own.get(name, own)) in _NUMBERS for name in one.numbers)


class _Call:
    """A call of the forward of a module with siblings, on one thread: what is still to be taken."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._x: Tensor | None = None
        self._outs: list[Tensor | None] = []

    def take(self, layer: SparseLinear, x: Tensor) -> Tensor | None:
        """What a layer gives, computed with its siblings; None if it has to run for itself."""
        family = self._family
        try:
            frame = sys._getframe(_CALLERS)
        except ValueError:  # called from C
            return None
        place = family.places.get(frame.f_lasti) if frame.f_code is family.code else None
        if place is None:
            return None
        one, siblings, i = place
        if i == 0:
            given = siblings.forward(x) if family.in_place(one, siblings) else None
            self._x, self._outs = x, [] if given is None else [*given]
        if i >= len(self._outs) or self._x is not x or siblings.layers[i] is not layer:
            return None
        out, self._outs[i] = self._outs[i], None
        if i + 1 == len(self._outs):
            self._x = None  # which the forward may have let go
        return out


class SparseParent(Fused):
    """A module whose forward calls siblings."""

    _family: Family | None = None
    _derived = ("_made", "_family")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward = _around(cls.plain)

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        return TracedRun.takes(kind) and kind.__getattr__ is nn.Module.__getattr__

    @classmethod
    def spans(cls, module: Any, steps: Sequence[Step]) -> list[Span]:
        ends = [*itertools.accumulate((len(one.names) for one in _neighbours(module)), initial=0)]
        return [*itertools.pairwise(ends)]

    @classmethod
    def place(cls, module: Any, span: Span) -> str:
        return ", ".join([name for one in _neighbours(module) for name in one.names][slice(*span)])

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        return [module._modules[name] for one in _neighbours(module) for name in one.names]

    @classmethod
    def join(cls, steps: Sequence[Step], choices: int = 0) -> Siblings:
        return Siblings(steps, choices)

    def steps(self) -> list[Step]:
        steps = super().steps()
        spans = self.spans(self, self._made[0])
        fused = [one for one, span in zip(_neighbours(self), spans, strict=True) if span in self._fused]
        joined = [step for step in steps if isinstance(step, Siblings)]
        self._family = Family(self, [*zip(fused, joined, strict=True)])
        return steps

    def _find(self) -> Family:
        self.steps()
        assert self._family is not None
        return self._family


def _around(plain: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a SparseParent that was of this class."""

    @functools.wraps(plain.forward)
    def forward(self: SparseParent, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain.forward(self, *args, **kwargs)
        before, around.call = around.call, _Call(self._family or self._find())
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            around.call = before  # and what nobody took is gone

    return forward


def _code(module: nn.Module) -> CodeType | None:
    """The code of the forward that a module had, whatever is wrapped around it."""
    found = getattr(inspect.unwrap(plain_class(module).forward), "__code__", None)
    return found if isinstance(found, CodeType) else None


def _neighbours(module: nn.Module) -> list[Neighbours]:
    """Those among the packed layers of a module that have as many inputs."""
    code, plain, own = _code(module), plain_class(module), module._modules
    layers = {name: _inputs(one) for name, one in own.items() if _inputs(one) and not hasattr(plain, name)}
    found = [] if code is None or len(layers) < 2 else neighbours(code, frozenset(layers))
    return [
        one
        for one in found
        if len({layers[name] for name in one.names}) == 1 and not any(hasattr(plain, name) for name in one.numbers)
    ]


def _inputs(module: nn.Module | None) -> int:
    """How many features a packed layer sees; 0 of any other module, and of one that is called in a way of its own."""
    if not isinstance(module, SparseLinear) or "packed_weight" not in module._buffers:
        return 0
    weight = module._parameters.get("weight")
    return int(weight.shape[1]) if weight is not None and as_usual(plain_class(module)) else 0
