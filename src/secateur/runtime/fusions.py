"""What of a model could be one native call: runs of layers and networks of convolutions, put in place or taken away."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.runtime import native, transformer_layers, tuning
from secateur.runtime.candidates import enclose, zeros_of
from secateur.runtime.chains import Fused, Span, Step, parts
from secateur.runtime.kernel_plans import LayerPlan
from secateur.runtime.methods import SparseMethod
from secateur.runtime.mlps import SparseMlp
from secateur.runtime.networks import SparseNetwork, install, networks
from secateur.runtime.packed_layers import PackedLayers
from secateur.runtime.programs import Program
from secateur.runtime.siblings import SparseParent
from secateur.runtime.swapping import Swapped, plain_class, swap

__all__: list[str] = []  # reached through secateur.accelerate alone

_KINDS: tuple[type[Fused], ...] = (*transformer_layers.FUSED, SparseMlp, SparseMethod, SparseParent)
"""What modules that contain runs become: the first one that finds any in a module."""


@dataclass(frozen=True)
class _Run:
    """What could be one call: these steps of a module, which would become of this kind."""

    module: nn.Module
    kind: type[Fused]
    span: Span
    steps: Sequence[Step]

    def plan(self, name: str) -> LayerPlan:
        """A plan in which nothing is chosen yet."""
        chain, kind = self.kind.join(self.steps), self.kind
        named = plain_class(self.module) if kind.plain is nn.Module else kind.plain  # the latter: also for subclasses
        return _plan(name, named.__name__, chain.widths, chain.layers)


class Fusions:
    """The runs and networks of a model whose layers are packed, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.runs: dict[str, _Run] = {}
        self.networks: dict[str, tuple[nn.Module, Program]] = {}

    def find(self) -> Iterator[LayerPlan]:
        """Look for them; gives a plan of each."""
        if native.library() is None:
            return
        self.runs = dict(_runs(self.model))
        self.networks = dict(networks(self.model))
        for name, run in self.runs.items():
            yield run.plan(name)
        for name, network in self.networks.items():
            yield _network_plan(name, *network)

    def runs_in(self, taken: Iterable[str]) -> list[str]:
        """The runs in the modules of these networks."""
        modules = [id(self.networks[name][0]) for name in taken]
        return [name for name, run in self.runs.items() if id(run.module) in modules]

    def ids(self, names: Iterable[str]) -> set[int]:
        """Those of the modules that these runs and networks are made of."""
        found: set[int] = set()
        for name in names:
            made_of = parts(self.runs[name].steps) if name in self.runs else self.networks[name][1].layers
            found.update(map(id, made_of))
        return found

    def fuse(self, choices: Mapping[str, int]) -> dict[str, PackedLayers]:
        """Fuse these runs for these row classes and no others."""
        found: dict[str, PackedLayers] = {}
        for module, kind in {id(run.module): (run.module, run.kind) for run in self.runs.values()}.values():
            spans = {name: run.span for name, run in self.runs.items() if run.module is module and name in choices}
            if isinstance(module, Swapped):
                module.restore()
            if spans:
                swap(module, kind)
                assert isinstance(module, Fused)
                fused = module.fuse({span: choices[name] for name, span in spans.items()})
                found.update(zip(spans, fused, strict=True))
        enclose(self.model)
        return found

    def install(self, choices: Mapping[str, int]) -> dict[str, SparseNetwork]:
        """Have these networks run as one call for these row classes, and no others."""
        for module, _ in self.networks.values():
            if isinstance(module, SparseNetwork):
                module.restore()
        given = {name: (*self.networks[name], chosen) for name, chosen in choices.items()}
        return {name: install(module, program.words, chosen) for name, (module, program, chosen) in given.items()}


def _runs(model: nn.Module) -> Iterator[tuple[str, _Run]]:
    """What could be fused: by a name as Python spells it, the module and where in it."""
    for name, module in model.named_modules():
        for kind in _KINDS:
            if kind.takes(plain_class(module)) and (spans := kind.spans(module, steps := kind.sequence(module))):
                for span in spans:
                    yield f"{name}[{kind.place(module, span)}]", _Run(module, kind, span, steps[slice(*span)])
                break  # as a module has one class


def _network_plan(name: str, module: nn.Module, program: Program) -> LayerPlan:
    largest = max((tuple(layer.weight.shape) for layer in program.layers), key=math.prod)
    return _plan(name, f"network of {len(program.layers)} convolutions", largest, program.layers, program.words)


def _plan(name: str, kind: str, shape: tuple[int, ...], layers: Sequence[Any], words: str = "") -> LayerPlan:
    weights = [layer.weight for layer in layers]
    return LayerPlan(name, kind, shape, zeros_of(weights), tuning.pattern(weights, layers[0]._values, words))
