"""How much the layers that read a unit lose when it goes, by the second moments of what they read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.calibration.moments import Moments
from secateur.calibration.statistics import Statistics
from secateur.structure.columns import Readers, damped, input_dims
from secateur.structure.criteria import Subject, UnitScore, criterion, l2, of_statistics, of_units, summed
from secateur.structure.groups import Worth
from secateur.structure.units import Labels

_AT_ONCE = 32
"""One of so many of the units that are left goes before the others are weighed again; one by one is no better."""

_MORE = 1 + 1e-6
"""Who goes later is worth so much more at least, also where it costs less by then."""

_CALL = '"{}", stats=sc.calibrate(model, batches)'


@criterion("energy", source='An et al. 2024, "FLAP", section 3.2, without means', call=_CALL.format("energy"))
@of_statistics
def energy(stats: Statistics) -> UnitScore:
    """Mean square of what layers read times the squares of the weights that read it; the default with `stats`.

    Units that no layer with statistics reads are ranked by their squares.
    """

    @of_units
    def worth(subject: Subject) -> Worth:
        found, readers = np.zeros(len(subject.groups.root)), Readers(subject.model, stats)
        known = [*_labelled(subject, readers)]
        for moments, columns in known:
            squares = readers.matrix(moments).square().sum(1) * _mean(moments).diagonal(dim1=-2, dim2=-1)
            found += np.bincount(columns.ravel(), squares.cpu().numpy().ravel(), len(found))
        read = {int(cell) for _, columns in known for cell in np.unique(subject.groups.cell_of[columns])}
        return _or_squares(subject, found, read)

    return worth


@criterion("greedy", source='Meng et al. 2024, "OSSCAR", section 3', call=_CALL.format("greedy"))
@of_statistics
def greedy(stats: Statistics) -> UnitScore:
    """What the readers of a unit lose when it goes, fitted anew after all that went before it.

    From all units of a group, those go first that cost least: the error of the least-squares fit of the readers. The
    inverse of the Gram matrix and the fitted weights follow by block updates. Units that no layer with statistics
    reads are ranked by their squares.
    """

    @of_units
    def worth(subject: Subject) -> Worth:
        groups, readers = subject.groups, Readers(subject.model, stats)
        found, read, known = np.zeros(len(groups.root)), set[int](), [*_labelled(subject, readers)]
        for c, cell in enumerate(groups.cells):
            members = np.full(len(groups.root), -1)
            members[cell] = np.arange(len(cell))
            own = [one for moments, columns in known for one in _fits(readers, moments, members[groups.root[columns]])]
            if own:
                found[cell] = _in_turn(len(cell), own)
                read.add(c)
        return _or_squares(subject, found, read)

    return worth


def _labelled(subject: Subject, readers: Readers) -> Iterator[tuple[Moments, Labels]]:
    """The matrices, with the label of each column [groups, inputs]."""
    lines = {(id(axis.tensor), axis.dim): torch.from_numpy(axis.labels) for axis in subject.groups.axes}
    along = {
        (name, d): lines[id(tensor), d]
        for name, tensor in readers.tensors.items()
        for d in input_dims(readers.layouts[name])
        if (id(tensor), d) in lines
    }
    for moments in readers:
        yield moments, readers.columns(moments, along, torch.zeros((), dtype=torch.int64)).numpy()


def _mean(moments: Moments) -> Tensor:
    """The Gram matrix of one sample on average, so that layers compare that see some more often than others."""
    return moments.gram / moments.count.clamp_min(1)[:, None, None]


def _or_squares(subject: Subject, worth: Worth, read: set[int]) -> Worth:
    """Scores, where units of other cells than those that are read have their squares."""
    unread = [c for c in range(len(subject.groups.cells)) if c not in read]
    if not unread:
        return worth
    return np.where(np.isin(subject.groups.cell_of, unread), summed(l2)(subject), worth)


class _Fit:
    """A matrix that reads units, fitted by least squares to what it gave when all of them were there.

    When some go, the weights that read the others, and the inverse of the Gram matrix, follow as in Meng et al. 2024,
    "OSSCAR", appendix; the same for single columns is Hassibi & Stork 1993, "Optimal Brain Surgeon", eq. 5.

    Attributes:
        units: those that are left, ascending [k].
    """

    def __init__(self, units: Labels, inverse: Tensor, weights: Tensor) -> None:
        """Begin with all units.

        Args:
            units: [k].
            inverse: rows and columns of the inverse of the damped Gram matrix, each unit's side by side.
            weights: [rows, columns], in the same order.
        """
        self.units, self._inverse, self._weights = units, inverse, weights
        self._width = len(inverse) // len(units)

    def costs(self) -> Tensor:
        """How much the error grows when one unit goes, [k]."""
        k, b = len(self.units), self._width
        each = torch.arange(k)
        own = self._inverse.view(k, b, k, b)[each, :, each]
        weights = self._weights.view(len(self._weights), k, b).permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve(own, weights)
        return (weights * solved).sum((1, 2))

    def drop(self, goes: NDArray[np.bool_]) -> None:
        """Let units go.

        Args:
            goes: for each unit of all, whether it does.
        """
        away = torch.from_numpy(goes[self.units]).to(self._inverse.device)
        self.units = self.units[~goes[self.units]]
        gone, stay = (where.repeat_interleave(self._width).nonzero().flatten() for where in (away, ~away))
        cross = self._inverse[gone][:, stay]
        spread = torch.linalg.solve(self._inverse[gone][:, gone], cross)
        self._weights = self._weights[:, stay] - self._weights[:, gone] @ spread
        self._inverse = self._inverse[stay][:, stay] - cross.T @ spread


def _fits(readers: Readers, moments: Moments, units: Labels) -> Iterator[_Fit]:
    """A matrix as what reads units, for each of its groups that does.

    Args:
        units: which unit each column reads, [groups, inputs]; -1 if none.
    """
    for group in np.flatnonzero((units >= 0).any(1)).tolist():
        order = np.argsort(units[group], kind="stable")
        order = order[units[group][order] >= 0]
        own, columns = np.unique(units[group][order], return_counts=True)
        if (columns == columns[0]).all():
            at = torch.from_numpy(order).to(moments.gram.device)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(_mean(moments)[group])))
            yield _Fit(own, inverse[at][:, at], readers.matrix(moments)[group][:, at])


def _in_turn(units: int, fits: Sequence[_Fit]) -> Worth:
    """What each unit costs when it goes, in an order in which the cheapest go first."""
    worth, left, last = np.zeros(units), np.ones(units, bool), 0.0
    while left.any():
        costs = np.zeros(units)
        for fit in fits:
            costs[fit.units] += fit.costs().cpu().numpy()
        those = np.flatnonzero(left)
        those = those[np.argsort(costs[those], kind="stable")][: max(1, len(those) // _AT_ONCE)]
        worth[those] = np.maximum(costs[those], last)
        last = float(worth[those].max()) * _MORE
        left[those] = False
        for fit in fits:
            fit.drop(~left)
    return worth
