"""Groups of units that stay or go together; cells of groups that may stand for one another; and which of them go."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.structure.capture import Capture
from secateur.structure.fields import labels, support
from secateur.structure.sizes import Equation, solve
from secateur.structure.units import Extent, Flags, Labels, tally

Worth = NDArray[np.float64]
"""For each label a number: those of the labels of a group are added up."""

_PIECE = 1 << 18  # numbers that are scored at a time


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
        stuck: why cells stay whole of which some were to go, by their place in `cells`; from the last `select`.
        missed: by how much the last `select` misses what was wanted, as a fraction of the weights that were to go.
        multiples: (groups along an axis, of what): the size of the axis stays a multiple of that.
        equals: (groups along one axis, groups along another, their factors, why): sizes that must stay equal.
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
        self._weight = np.zeros(len(self.root))
        for axis in self.axes:
            if isinstance(axis.tensor, nn.Parameter):
                np.add.at(self._weight, self.root[axis.labels], axis.tensor.numel() / len(axis.labels))
        self.equals = [
            (self._positions(a), self._positions(b), (a.factor, b.factor), why) for a, b, why in cap.ledger.equals
        ]
        self.multiples = [(self.root[row], of) for row, of, _ in cap.ledger.multiples]
        self.cells = self._cells()
        self.stuck: dict[int, str] = {}
        self.missed = 0.0

    def _positions(self, extent: Extent) -> Labels:
        """The group of each position along the dimensions of an extent.

        Where other dimensions vary too ([layers, hidden], [heads, size]), positions go along the last that varies.
        """
        groups = self.root[extent.labels]

        def line(dims: tuple[int, ...]) -> Labels:
            found: Labels = groups[tuple(slice(None) if d in dims else 0 for d in range(groups.ndim))]
            return found.ravel()

        vary = [d for d in range(groups.ndim) if (line((d,)) != groups.flat[0]).any()]
        if len(extent.dims) == 1 and vary and vary[-1] != extent.dims[0]:
            return np.zeros(0, np.int64)
        return line(extent.dims)

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
                groups, times = tally(row)
                part = times < len(row)
                sign[groups[part]] += rng.integers(1 << 62, dtype=np.uint64) * times[part].astype(np.uint64)
        for a, b, _, _ in self.equals:
            for row in (a, b):
                groups, times = tally(row)
                sign[groups] += rng.integers(1 << 62, dtype=np.uint64) * times.astype(np.uint64)
        free = weighed & (self.root == np.arange(count))
        free[list(self.held)] = False
        units = np.flatnonzero(free)
        _, cell = np.unique(sign[units], return_inverse=True)
        order = np.argsort(cell, kind="stable")
        cells = np.split(units[order], np.flatnonzero(np.diff(cell[order])) + 1) if len(units) else []
        return sorted(cells, key=len, reverse=True)

    def select(
        self,
        scores: Worth,
        share: float | Worth,
        pools: Sequence[Hashable] | None = None,
        round_to: int = 1,
        min_width: int = 1,
    ) -> tuple[Flags, list[int]]:
        """Take the lowest of each cell, or of each pool of cells.

        Args:
            scores: for each label, from `scores`; those of a group are added up, and inf lets it stay.
            share: of the units of each pool that goes, one for all or each; at least one unit of each cell stays.
            pools: for each cell, with which it is ranked; by default each alone.
            round_to: dimensions of tensors that are cut keep a multiple of so many positions of each cell.
            min_width: and at least so many.

        Returns the mask of kept labels [labels], and how many go of each cell.
        """
        total: Worth = np.bincount(self.root, scores, len(self.root)).astype(np.float64)
        most = [len(cell) - int(np.isposinf(total[cell]).sum()) for cell in self.cells]
        step, least = self._widths(round_to, min_width)
        least = np.array([max(a, len(cell) - b) for a, b, cell in zip(least, most, self.cells, strict=True)], np.int64)
        stay = self._wanted(total, share, pools if pools is not None else range(len(self.cells)), least)
        wanted = [int(len(cell) - n + 0.5) for n, cell in zip(stay, self.cells, strict=True)]
        going = [c for c, crowded in enumerate(self._crowded(wanted)) if not crowded and len(self.cells[c]) > least[c]]
        sizes = solve(
            [len(self.cells[c]) for c in going],
            stay[going],
            [float(self._weight[self.cells[c][0]]) for c in going],
            self._equations(going),
            step=step[going],
            least=least[going],
        )
        self.stuck = {going[i]: why for i, why in sizes.stuck.items()}
        counts = [0] * len(self.cells)
        for c, n in zip(going, sizes.kept.tolist(), strict=True):
            counts[c] = len(self.cells[c]) - n
        self.missed = self._missed(stay, counts)
        return self._lowest(total, counts), counts

    def _missed(self, stay: NDArray[np.float64], counts: Sequence[int]) -> float:
        heavy = np.array([self._weight[cell[0]] for cell in self.cells])
        meant = np.array([len(cell) for cell in self.cells]) - stay
        return float(heavy @ np.abs(meant - counts) / max(heavy @ meant, 1e-9)) if len(heavy) else 0.0

    def select_dead(self, dead: Flags) -> tuple[Flags, list[int]]:
        """Take as many of the dead as the equations let go; the last of a cell stays.

        Args:
            dead: for each label, whether its group is dead.

        Returns as `select` does.
        """
        most = [min(int(dead[cell].sum()), len(cell) - 1) for cell in self.cells]
        going = [c for c, crowded in enumerate(self._crowded(most)) if not crowded and most[c]]
        units = [most[c] for c in going]  # of the others none may go
        weights = [float(self._weight[self.cells[c][0]]) for c in going]
        sizes = solve(units, [0] * len(going), weights, self._equations(going), least=0)
        counts = [0] * len(self.cells)
        for c, stay in zip(going, sizes.kept.tolist(), strict=True):
            counts[c] = most[c] - stay
        return self._lowest(~dead, counts), counts

    def _lowest(self, total: NDArray[Any], counts: Sequence[int]) -> Flags:
        """The mask of kept labels where of each cell so many of the lowest groups go."""
        kept = np.ones(len(self.root), bool)
        for cell, out in zip(self.cells, counts, strict=True):
            kept[cell[np.argsort(total[cell], kind="stable")][:out]] = False
        found: Flags = kept[self.root]
        return found

    def _wanted(
        self, total: Worth, share: float | Worth, pools: Sequence[Hashable], least: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """How many units of each cell are to stay; fractions where a cell is ranked alone."""
        sizes = np.array([len(cell) for cell in self.cells], np.float64)
        stay: NDArray[np.float64] = sizes.copy()
        shared: dict[Hashable, list[int]] = {}
        for c, pool in enumerate(pools):
            shared.setdefault(pool, []).append(c)
        for cells, part in zip(shared.values(), np.broadcast_to(share, len(shared)), strict=True):
            free = [c for c in cells if len(self.cells[c]) > least[c]]
            if len(cells) > 1:
                ranked = [np.sort(total[self.cells[c]])[: len(self.cells[c]) - least[c]] for c in free]
                owner = np.repeat(free, [len(one) for one in ranked])
                lowest = np.argsort(np.concatenate([np.zeros(0), *ranked]), kind="stable")
                np.subtract.at(stay, owner[lowest[: int(part * sizes[free].sum() + 0.5)]], 1)
            elif free:
                stay[free] *= 1 - part
        return stay

    def _widths(self, round_to: int, min_width: int) -> tuple[Labels, Labels]:
        """For each cell, of what its number of units is a multiple where it is cut, and the least of them."""
        step, least = np.ones(len(self.cells), np.int64), np.ones(len(self.cells), np.int64)
        for c, places in enumerate(self._places):
            for times in places.values():  # positions of the axis that a unit is
                step[c] = math.lcm(int(step[c]), round_to // math.gcd(round_to, times))
                least[c] = max(least[c], -(-min_width // times))
        for row, of in self.multiples:
            for c, times in zip(*np.unique(self.cell_of[row], return_counts=True), strict=True):
                if c >= 0:
                    step[c] = math.lcm(int(step[c]), of // math.gcd(of, int(times) // len(self.cells[c])))
        return step, least

    @cached_property
    def equations(self) -> list[Equation]:
        """What the blocks and the equal sizes demand of the cells."""
        which = self.cell_of

        def form(row: Labels) -> dict[int, Fraction]:
            """How many positions go with one group of each cell."""
            found, times = tally(row[row >= 0])
            return {c: Fraction(n, len(self.cells[c])) for c, n in zip(found.tolist(), times.tolist(), strict=True)}

        found = []
        for rows, why in self.blocks:
            cells = np.sort(which[rows], 1)
            cells[(rows == rows[:, :1]).all(1)] = -1  # a row that is one group stays whole or goes whole
            first, *others = (form(row) for row in {row.tobytes(): row for row in cells}.values())
            found += [_equation(first, other, why) for other in others]
        for a, b, factors, why in self.equals:
            ours, theirs = ({c: n * k for c, n in form(which[x]).items()} for x, k in zip((a, b), factors, strict=True))
            found.append(_equation(ours, theirs, why))
        return [e for e in found if e is not None]

    def _equations(self, going: Sequence[int]) -> Iterator[Equation]:
        """The equations of the cells that may be cut, in the order of `going`; of the others nothing goes."""
        place = {c: i for i, c in enumerate(going)}
        for equation in self.equations:
            if terms := {place[c]: n for c, n in equation.coefficients.items() if c in place}:
                yield Equation(terms, equation.why)

    @cached_property
    def parts(self) -> Labels:
        """For each cell the number of its part: no equation binds cells of two parts."""
        found = np.arange(len(self.cells))
        for equation in self.equations:
            bound = np.isin(found, found[list(equation.coefficients)])
            found[bound] = found[bound].min()
        return found

    @cached_property
    def cell_of(self) -> Labels:
        """The cell of each label, -1 for those that are in none."""
        which = np.full(len(self.root), -1)
        for c, members in enumerate(self.cells):
            which[members] = c
        found: Labels = which[self.root]
        return found

    @cached_property
    def _places(self) -> list[dict[tuple[int, int], int]]:
        """For each cell, the dimensions (tensor, dim) on which it lies, and how many positions there a unit is."""
        on: list[dict[tuple[int, int], int]] = [{} for _ in self.cells]
        for axis in self.axes:
            for c, n in zip(*np.unique(self.cell_of[axis.labels], return_counts=True), strict=True):
                if c >= 0:
                    on[c][id(axis.tensor), axis.dim] = int(n) // len(self.cells[c])
        return on

    def _crowded(self, wanted: Sequence[int]) -> list[bool]:
        """Cells of which all tensors are cut along two other dimensions already: heads and their size, for example."""
        cut: dict[int, set[int]] = {}
        out = []
        for own, n in zip(self._places, wanted, strict=True):
            out.append(bool(own) and all(len(cut.get(t, set()) - {d}) >= 2 for t, d in own))
            if n and not out[-1]:
                for t, d in own:
                    cut.setdefault(t, set()).add(d)
        return out

    def unequal(self, kept: Flags) -> Iterator[tuple[Labels, str]]:
        """Blocks that would not keep equally many in each row; a row may go as a whole."""
        for rows, why in self.blocks:
            stays = kept[rows].sum(1)
            if len(np.unique(stays[stays > 0])) > 1:
                yield rows, why


def scores(groups: Groups, score: Callable[[str, Tensor], Tensor], by_rows: bool = False) -> Worth:
    """For each label, the sum of the scores of the weights at its position.

    Args:
        groups: of the model; which labels are united does not matter.
        score: (name, parameter) to scores of the parameter's shape.
        by_rows: it looks at each number alone, and may be given a few rows at a time: large tensors are scored in the
            processor's cache.

    Raises:
        InputError: scores of another shape, or NaN.
    """
    total = np.zeros(len(groups.root))
    done, sums = "", list[Tensor]()
    for name, t, dim, own in groups.axes:
        if isinstance(t, nn.Parameter):
            if name != done:
                weight = t.detach().abs() if t.is_complex() else t.detach()
                rows = max(1, _PIECE * len(t) // t.numel()) if by_rows else len(t)
                done, sums = name, _sums(score, name, torch.split(weight, rows))
            if bool(sums[dim].isnan().any()):
                raise InputError(f"the scores of {name} hold NaN: give numbers, inf for what must stay")
            np.add.at(total, own, sums[dim].numpy())
    return total


def _sums(score: Callable[[str, Tensor], Tensor], name: str, pieces: Sequence[Tensor]) -> list[Tensor]:
    """For each dimension, the sums over the others of the scores of a weight, which is given in pieces."""
    found: list[list[Tensor]] = []
    for piece in pieces:
        own = score(name, piece)
        if own.shape != piece.shape:
            raise InputError(
                f"the scores of {name} have the shape {tuple(own.shape)}, the tensor {tuple(piece.shape)}: "
                "give a score for each weight"
            )
        own = own.float() if own.element_size() < 4 else own
        others = ([k for k in range(own.ndim) if k != d] for d in range(own.ndim))
        found.append([(own.sum(dims) if dims else own).double().cpu() for dims in others])
    first, *rest = zip(*found, strict=True)
    return [torch.cat(first), *(torch.stack(one).sum(0) for one in rest)]


def _equation(a: dict[int, Fraction], b: dict[int, Fraction], why: str) -> Equation | None:
    """That as many positions go from a as from b; None if that is always so."""
    terms = {c: n for c in sorted(a.keys() | b.keys()) if (n := a.get(c, Fraction()) - b.get(c, Fraction()))}
    scale = math.lcm(*(n.denominator for n in terms.values()))
    return Equation({c: int(n * scale) for c, n in terms.items()}, why) if terms else None


def as_mask(kept: Flags) -> Tensor:
    """The mask of kept labels as a tensor."""
    return torch.from_numpy(np.asarray(kept, bool))
