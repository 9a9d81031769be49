"""The ledger of units: integer labels, what unites them, and what holds them.

A unit is one position along one dimension of a parameter or a buffer. Label 0 means "no unit: always kept".
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]
"""For each label, whether it stays, or whether it is dead."""


_MANY = 1 << 12


class Extent(NamedTuple):
    """`factor` times the number of positions that stay along some dimensions of a field.

    Attributes:
        labels: of the field.
        dims: one dimension, or several that a view merges into one.
        factor: how many numbers each position stands for.
    """

    labels: Labels
    dims: tuple[int, ...]
    factor: Fraction = Fraction(1)

    def times(self, factor: Fraction) -> Extent:
        """As many times this extent."""
        return self._replace(factor=self.factor * factor)


class Ledger:
    """Labels and the relations between them.

    Attributes:
        size: labels given out so far, 0 among them.
        held: (labels, why): units that never go.
        blocks: (labels [blocks, members], why): equally many units must stay in each row, or none of it.
        equals: (extent, extent, why): two sizes that must stay equal.
        multiples: (labels, of what, why): of these, in as many positions, a multiple stays.
    """

    def __init__(self) -> None:
        self.size = 1
        self.held: list[tuple[Labels, str]] = []
        self.blocks: list[tuple[Labels, str]] = []
        self.equals: list[tuple[Extent, Extent, str]] = []
        self.multiples: list[tuple[Labels, int, str]] = []
        self._mass: list[NDArray[np.float32]] = [np.zeros(1, np.float32)]
        self._pairs: list[Labels] = []

    def new(self, count: int, mass: float = 0.0) -> Labels:
        """Give out fresh labels, each of which carries `mass` numbers of a tensor."""
        first, self.size = self.size, self.size + count
        self._mass.append(np.full(count, mass, np.float32))
        return np.arange(first, first + count)

    def mass(self, labels: Labels) -> float:
        """How many numbers a unit among these carries, on average."""
        if len(self._mass) > 1:
            self._mass = [np.concatenate(self._mass)]
        return float(self._mass[0][labels].mean())

    def unite(self, a: Labels, b: Labels, why: str) -> None:
        """Let a[i] and b[i] stay or go together; what meets label 0 is held."""
        apart = a != b
        a, b = a[apart], b[apart]
        if not len(a):
            return
        low, high = np.minimum(a, b), np.maximum(a, b)
        alone = low == 0
        if alone.any():
            self.hold(high[alone], f"{why}: meets positions that belong to no unit")
            low, high = low[~alone], high[~alone]
        if len(low) > _MANY:  # of products, in which few pairs are different
            low, high = np.divmod(tally(low * self.size + high)[0], self.size)
        self._pairs.append(np.stack([low, high]))

    def hold(self, labels: Labels, why: str) -> bool:
        """Let none of these go. Returns whether there were any."""
        labels, _ = tally(labels[labels > 0])
        if len(labels):
            self.held.append((labels, why))
        return len(labels) > 0

    def balance(self, rows: Labels, why: str) -> None:
        """Let equally many units stay in each row of [blocks, members]."""
        if len(rows) > 1:
            self.blocks.append((rows, why))

    def equal(self, a: Extent, b: Extent, why: str) -> None:
        """Let two sizes stay equal."""
        self.equals.append((a, b, why))

    def multiple(self, labels: Labels, of: int, why: str) -> bool:
        """Let a multiple of so many positions stay. Returns whether that is new."""
        known = any(of == n and np.array_equal(labels, own) for own, n, _ in self.multiples)
        if not known:
            self.multiples.append((labels, of, why))
        return not known

    def solve(self) -> tuple[Labels, dict[int, str]]:
        """The smallest label of the group of each label, and for each held group, by that label, the first reason."""
        pairs = np.concatenate([np.zeros((2, 0), np.int64), *self._pairs], 1)
        self._pairs = [pairs]
        root = components(self.size, pairs[0], pairs[1])
        why = {0: "no unit"}
        for labels, reason in self.held:
            for group in tally(root[labels])[0].tolist():
                why.setdefault(group, reason)
        return root, why


def tally(labels: Labels) -> tuple[Labels, Labels]:
    """The different labels in order, and how often each is there; np.unique hashes, and is slow for few of them.

    >>> [found.tolist() for found in tally(np.array([[3, 1], [1, 2]]))]
    [[1, 2, 3], [2, 1, 1]]
    """
    labels = np.sort(labels, None)
    first = np.flatnonzero(np.concatenate([labels[:1] == labels[:1], labels[1:] != labels[:-1]]))
    return labels[first], np.diff(first, append=len(labels))


def components(nodes: int, a: Labels, b: Labels) -> Labels:
    """Smallest member of the connected component of each node, for edges a[i] - b[i] (hook and jump).

    >>> components(5, np.array([1, 3]), np.array([2, 2])).tolist()
    [0, 1, 1, 1, 4]
    """
    root = np.arange(nodes)
    while True:
        ends = root[a], root[b]
        apart = ends[0] != ends[1]
        if not apart.any():
            return root
        a, b = ends[0][apart], ends[1][apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(up := root[root], root):
            root = up
