"""Groups of units that stay or go together; cells of groups that may stand for one another; and which of them go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.structure.capture import Capture
from secateur.structure.fields import Shape, labels, support
from secateur.structure.units import Labels


class Axis(NamedTuple):
    """A dimension of a parameter or a buffer, and the labels of its positions."""

    name: str
    tensor: Tensor
    dim: int
    labels: Labels

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


class Groups:
    """What a capture tells of the units.

    Attributes:
        root: the group of each label, named by its smallest label.
        held: why a group never goes, for those that do not.
        axes: the dimensions that have labels.
        cells: groups that may stand for one another: they lie on the same axes and in the same blocks. Largest first.
        blocks: (groups [blocks, members], why): equally many must stay in each row, or none of it.
    """

    def __init__(self, cap: Capture) -> None:
        self.root, self.held = cap.ledger.solve()
        self.blocks = [(self.root[rows], why) for rows, why in cap.ledger.blocks]
        self.axes = [
            Axis(name, t, d, labels(f).ravel())
            for name, t in cap.home.values()
            if cap.seen(t)
            for f in cap.fields(t)
            for d in support(f)
        ]
        self.cells = self._cells()

    def _cells(self) -> list[Labels]:
        count = len(self.root)
        weighed = np.zeros(count, bool)
        sign = np.zeros(count, np.uint64)  # groups of one cell have the same sum of random numbers
        rng = np.random.default_rng(0)
        for axis in self.axes:
            groups = self.root[axis.labels]
            np.add.at(sign, groups, rng.integers(1 << 62, dtype=np.uint64))
            if isinstance(axis.tensor, nn.Parameter):
                weighed[groups] = True
        for rows, _ in self.blocks:
            for row in rows:
                groups, times = np.unique(row, return_counts=True)
                part = times < len(row)
                sign[groups[part]] += rng.integers(1 << 62, dtype=np.uint64) * times[part].astype(np.uint64)
        free = weighed & (self.root == np.arange(count))
        free[list(self.held)] = False
        units = np.flatnonzero(free)
        _, cell = np.unique(sign[units], return_inverse=True)
        order = np.argsort(cell, kind="stable")
        cells = np.split(units[order], np.flatnonzero(np.diff(cell[order])) + 1) if len(units) else []
        return sorted(cells, key=len, reverse=True)

    def select(self, scores: NDArray[np.float64], fraction: float) -> tuple[Labels, list[int]]:
        """Take the lowest of each cell.

        Args:
            scores: for each label, from `scores`.
            fraction: of each cell that goes; the last of a cell stays.

        Returns the mask of kept labels [labels], and how many go of each cell.
        """
        total = np.bincount(self.root, scores, len(self.root))
        wanted = [min(len(cell) - 1, int(len(cell) * fraction + 0.5)) for cell in self.cells]
        counts = [0 if crowded else n for n, crowded in zip(wanted, self._crowded(wanted), strict=True)]
        kept = np.ones(len(self.root), bool)
        for cell, out in zip(self.cells, counts, strict=True):
            kept[cell[np.argsort(total[cell], kind="stable")][:out]] = False
        return kept[self.root], counts

    def _crowded(self, wanted: Sequence[int]) -> list[bool]:
        """Cells of which all tensors are cut along two other dimensions already: heads and their size, for example."""
        which = np.full(len(self.root), -1)
        for c, members in enumerate(self.cells):
            which[members] = c
        on: list[set[tuple[int, int]]] = [set() for _ in self.cells]
        for axis in self.axes:
            for c in np.unique(which[self.root[axis.labels]]).tolist():
                if c >= 0:
                    on[c].add((id(axis.tensor), axis.dim))
        cut: dict[int, set[int]] = {}
        out = []
        for own, n in zip(on, wanted, strict=True):
            out.append(bool(own) and all(len(cut.get(t, set()) - {d}) >= 2 for t, d in own))
            if n and not out[-1]:
                for t, d in own:
                    cut.setdefault(t, set()).add(d)
        return out

    def unequal(self, kept: Labels) -> Iterator[tuple[Labels, str]]:
        """Blocks that would not keep equally many in each row; a row may go as a whole."""
        for rows, why in self.blocks:
            stays = kept[rows].sum(1)
            if len(np.unique(stays[stays > 0])) > 1:
                yield rows, why


def scores(groups: Groups, score: Callable[[str, Tensor], Tensor]) -> NDArray[np.float64]:
    """For each label, the sum of the scores of the weights at its position.

    Args:
        groups: of the model; which labels are united does not matter.
        score: (name, parameter) to scores of the parameter's shape.

    Raises:
        InputError: scores of another shape, or NaN.
    """
    total = np.zeros(len(groups.root))
    done, found = "", torch.empty(0)
    for name, t, dim, own in groups.axes:
        if isinstance(t, nn.Parameter):
            if name != done:
                done, found = name, score(name, t.detach()).cpu()
                if found.shape != t.shape:
                    raise InputError(
                        f"the scores of {name} have the shape {tuple(found.shape)}, the tensor {tuple(t.shape)}: "
                        "give a score for each weight"
                    )
            others = [d for d in range(t.ndim) if d != dim]
            per = found.sum(others, dtype=torch.float64) if others else found.double()
            if bool(per.isnan().any()):
                raise InputError(f"the scores of {name} hold NaN: give numbers, inf for what must stay")
            total += np.bincount(own, per.numpy(), len(total))
    return total


def size(shape: Shape, fields: Sequence[Tensor], kept: Tensor) -> Shape:
    """The shape that remains of a tensor.

    Args:
        shape: of the tensor.
        fields: of the tensor.
        kept: for each label, whether it stays.
    """
    sizes = list(shape)
    for d in range(len(sizes)):
        near = [kept[f.long()] for f in fields if f.shape[d] > 1]
        if near:
            stays = near[0]
            for mask in near[1:]:
                stays = stays & mask
            sizes[d] = int(stays.sum(d).max())
    return tuple(sizes)


def as_mask(kept: Labels) -> Tensor:
    """The mask of kept labels as a tensor."""
    return torch.from_numpy(np.asarray(kept, bool))
