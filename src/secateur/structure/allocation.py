"""Which units are ranked together: the lowest of each pool go.

A rule is a function `(groups, model) -> pool of each cell`, where a cell is what the docs call a group: units that may
stand for one another. `print(ALLOCATIONS)` lists the rules that have a name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from torch import nn

from secateur.structure.groups import Groups
from secateur.support.registry import Registry

Allocation = Callable[[Groups, nn.Module], Sequence[Hashable]]

ALLOCATIONS: Registry[Allocation] = Registry("allocation", "a function (groups, model) -> the pool of each cell")
"""The allocations that have a name."""


def allocation(name: str, *, source: str = "") -> Callable[[Allocation], Allocation]:
    """Give a rule a name, under which `shrink(allocation=name)`, errors and the docs know it.

    Raises:
        InputError: another one has that name.
    """

    def register(rule: Allocation) -> Allocation:
        return ALLOCATIONS.add(name, rule, source=source)

    return register


@allocation("uniform", source='Li et al. 2017, "Pruning Filters for Efficient ConvNets"')
def uniform(groups: Groups, model: nn.Module) -> Sequence[Hashable]:
    """The same fraction of each group: no two groups are compared."""
    return range(len(groups.cells))


@allocation("global", source='Molchanov et al. 2017, "Pruning CNNs for Resource Efficient Inference"')
def global_(groups: Groups, model: nn.Module) -> Sequence[Hashable]:
    """All units are ranked together; take a score that compares across layers, such as "normalised"."""
    return [0] * len(groups.cells)


@allocation("isomorphic", source='Fang et al. 2024, "Isomorphic Pruning for Vision Models", section 3.2')
def isomorphic(groups: Groups, model: nn.Module) -> Sequence[Hashable]:
    """Groups that lie on the same dimensions of layers of the same types are ranked together."""
    which = groups.cell_of
    shapes: list[list[tuple[str, str, int]]] = [[] for _ in groups.cells]
    for axis in groups.axes:
        path, _, attribute = axis.name.rpartition(".")
        place = type(model.get_submodule(path)).__name__, attribute, axis.dim
        for cell in np.unique(which[axis.labels]).tolist():
            if cell >= 0:
                shapes[cell].append(place)
    return [tuple(sorted(shape)) for shape in shapes]
