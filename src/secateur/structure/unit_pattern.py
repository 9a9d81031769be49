"""Whole units pruned gradually, in any training loop: a pattern for `prune` and `Pruner`, after which `shrink` follows.

A unit is pruned by the weights that read it. So it is dead, whatever its bias, its norm or the padding behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur import anatomy
from secateur.errors import StructureError
from secateur.patterns import Slices
from secateur.structure.capture import capture
from secateur.structure.groups import Groups
from secateur.structure.options import checked
from secateur.structure.plan import Plan
from secateur.structure.policy import POLICIES
from secateur.structure.shrink import propose


@dataclass(frozen=True)
class Units:
    """A pattern: whole units, each with all the weights that read it. A unit scores the mean of these.

    Attributes:
        slices: for each kind of unit, the slices of weights that read it.
    """

    slices: tuple[tuple[Slices, ...], ...] = field(repr=False)

    @property
    def sparsity(self) -> None:
        """Any: the fraction of the weights that read units, met to the nearest whole unit."""
        return None

    def picked(self) -> Sequence[Sequence[Slices]]:
        """The slices of each kind of unit."""
        return self.slices

    def legal(self, shape: Sequence[int]) -> int:
        """All but one unit of each kind."""
        return (shape[0] - 1) * math.prod(shape[1:])

    def check(self, name: str, shape: torch.Size) -> None:
        """Any tensor will do that has the slices."""

    def group(self, shape: torch.Size) -> int:
        """Weights that read a unit."""
        return math.prod(shape[1:])

    def reduce(self, scores: Tensor, count: int) -> Tensor:
        """The mean of each unit."""
        return scores.flatten(1).mean(1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """Each unit repeated over its weights."""
        return kept.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def units(model: nn.Module, example_inputs: Any) -> Units:
    """Return a pattern that prunes whole units: hidden units, channels, heads.

    `shrink` then removes exactly these: a trial shows it for each kind of unit, and only those are in the pattern that
    it can remove. Kinds of units of which equally many must stay, such as the layers of an LSTM, go together.

    Args:
        model: as it will be pruned.
        example_inputs: as `shrink` takes them.

    Raises:
        InputError, InputTypeError: as `shrink`.
        StructureError: no unit could go.

    >>> import secateur as sc
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> x = torch.randn(2, 8)
    >>> masks = sc.prune(model, 0.25, pattern=units(model, x))
    >>> sc.shrink(model, x, masks=masks)[0]
    Linear(in_features=8, out_features=12, bias=True)
    """
    cap = capture(model, checked(model, example_inputs), POLICIES[0])
    kinds = _together(Groups(cap), model)
    while kinds:
        masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
        for one in (one for kind in kinds for one in kind):
            gone = [p for at in one.at[: len(one.at) // 2] for p in at]
            masks[one.name].index_fill_(one.dim, torch.tensor(gone, device=masks[one.name].device), False)
        try:
            plan = propose(model, example_inputs, masks=masks)
        except StructureError:  # nothing goes
            break
        able = [kind for kind in kinds if all(_went(plan, one) for one in kind)]
        if len(able) == len(kinds):
            return Units(tuple(able))
        kinds = able  # they may have needed the others
    raise StructureError("no kind of unit can go alone: see propose(model, example_inputs, 0.5).explain()")


def _went(plan: Plan, one: Slices) -> bool:
    stay = set(plan.kept.get(one.name, {}).get(one.dim, [p for at in one.at for p in at]))
    return not any(p in stay for at in one.at[: len(one.at) // 2] for p in at)


def _together(groups: Groups, model: nn.Module) -> list[tuple[Slices, ...]]:
    """For each kind of unit what reads it; kinds of which equally many stay are one."""
    reading = {
        f"{path}.{name}".lstrip("."): _inputs(anatomy.layout(module, name, p), p.ndim)
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim > 1
    }
    reads: list[list[Slices]] = [[] for _ in groups.cells]
    for axis in groups.axes:
        if axis.dim not in reading.get(axis.name, ()):
            continue
        own = groups.root[axis.labels]
        for cell, slices in zip(groups.cells, reads, strict=True):
            at = [tuple(np.flatnonzero(own == group).tolist()) for group in cell]
            if len(cell) > 1 and all(at) and len({len(one) for one in at}) == 1:
                slices.append(Slices(axis.name, axis.dim, tuple(at)))
    return [tuple(one) for one in _joined(groups, reads) if one]


def _inputs(layout: anatomy.Layout, ndim: int) -> set[int]:
    """The dimensions of a weight, as it is stored, that count inputs."""
    stored = layout.dims[bool(layout.groups) :]
    return {d for d, letter in enumerate(stored[:ndim]) if letter == "i"}


def _joined(groups: Groups, reads: list[list[Slices]]) -> list[list[Slices]]:
    into = list(range(len(reads)))
    for equation in groups.equations:
        terms = list(equation.coefficients.items())
        if len(terms) == 2 and terms[0][1] == -terms[1][1]:
            (a, _), (b, _) = terms
            if len(groups.cells[a]) == len(groups.cells[b]):
                old, new = into[b], into[a]
                into = [new if x == old else x for x in into]
    found: dict[int, list[Slices]] = {}
    for cell, kind in enumerate(into):
        found.setdefault(kind, []).extend(reads[cell])
    return list(found.values())
