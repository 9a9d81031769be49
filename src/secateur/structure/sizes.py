"""How many units of each cell stay, so that every equation between sizes holds.

A dense model satisfies all its equations, so in *removed* counts they are homogeneous: over the cells c of an equation,
the sum of coefficients[c] * removed[c] is zero. Removing nothing always solves them, and no constant is ever needed.
Equations between two unknowns (nearly all) merge them into one with a step: `embed = heads * head_dim` means that embed
goes in steps of heads. An equation between more may give up solutions, never validity. What is left is a lattice with a
few free parameters for each set of coupled cells. On it the point nearest to what was wanted is found by descent along
its directions; where one parameter is left, no point is nearer.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_PAIRS = 12  # with at most so many free parameters the descent also moves two of them at once


@dataclass(frozen=True)
class Equation:
    """The sum of coefficients[cell] * (units removed from cell) is zero; `why` is the call that asks for it."""

    coefficients: Mapping[int, int]
    why: str


@dataclass(frozen=True)
class Sizes:
    """`kept[cell]`: how many units stay; `stuck[cell]`: why a cell keeps all its units though some were to go."""

    kept: Ints
    stuck: Mapping[int, str]


def solve(
    units: Sequence[int] | Ints,
    wanted: Sequence[float] | Floats,
    weights: Sequence[float] | Floats,
    equations: Iterable[Equation],
    *,
    step: int | Sequence[int] | Ints = 1,
    least: int | Sequence[int] | Ints = 1,
) -> Sizes:
    """Counts of kept units that satisfy all equations and come nearest to the wanted ones.

    Near is meant as the sum over cells of weight / units * (kept - wanted)^2. The same question has the same answer.

    Args:
        units: how many units each cell has.
        wanted: how many shall stay of each cell, fractions allowed.
        weights: parameters that one unit of each cell carries.
        equations: between the cells, which are numbered from 0.
        step: a cell that is cut keeps a multiple of so many units; a cell that cannot stays whole. One for all or each.
        least: units that a cell keeps at least. One for all or each.
    """
    total = np.asarray(units, np.int64)
    step, least = (np.broadcast_to(np.asarray(one, np.int64), total.shape) for one in (step, least))
    most = np.maximum(total - least, 0)
    want = np.clip(total - np.asarray(wanted, np.float64), 0, most)
    price = np.maximum(np.asarray(weights, np.float64), 1e-9) / np.maximum(total, 1)
    lattice = _Lattice(len(total))
    lattice.impose_all(equations)
    alone = np.maximum(step * np.ceil((total - want) / step - 0.5), step * np.ceil(least / step)).astype(np.int64)
    removed = np.maximum(total - np.where(want < np.abs(total - want - alone), total, alone), 0)
    for cells, directions in lattice.components():
        at = np.array(cells)
        removed[at] = _nearest(directions, want[at], most[at], price[at], total[at], step[at])
    stuck = {
        int(c): lattice.reason(int(c)) or f"no multiple of {step[c]} between {least[c]} and {total[c]} is near enough"
        for c in np.flatnonzero((want >= 0.5) & (removed == 0))
    }
    return Sizes(total - removed, stuck)


class _Lattice:
    """Removed counts as integer combinations of free parameters, each of which is the scaled count of one cell."""

    def __init__(self, cells: int) -> None:
        self.forms: list[dict[int, int]] = [{c: 1} for c in range(cells)]  # cell -> {parameter: coefficient}
        self.users = {c: {c} for c in range(cells)}  # parameter -> cells in whose forms it stands
        self.whys: dict[int, dict[str, None]] = defaultdict(dict)  # cell -> the equations that bind it, in order

    def impose_all(self, equations: Iterable[Equation]) -> None:
        """Equations between two parameters first: they only merge, the others may have to give up solutions."""
        pending, limit = list({tuple(sorted(e.coefficients.items())): e for e in equations}.values()), 2
        while pending:
            later, sizes = [], []
            for equation in pending:
                if len(terms := self._terms(equation)) <= limit:
                    self._impose(terms, equation)
                else:
                    later.append(equation)
                    sizes.append(len(terms))
            limit = 2 if len(later) < len(pending) else min(sizes)
            pending = later

    def _terms(self, equation: Equation) -> dict[int, int]:
        terms: Counter[int] = Counter()
        for cell, a in equation.coefficients.items():
            for parameter, b in self.forms[cell].items():
                terms[parameter] += a * b
        return {parameter: a for parameter, a in terms.items() if a}

    def _impose(self, terms: dict[int, int], equation: Equation) -> None:
        for cell in equation.coefficients:
            self.whys[cell][equation.why] = None
        if not terms:
            return
        if min(terms.values()) > 0 or max(terms.values()) < 0:  # counts are no less than zero: so all of them are zero
            for parameter in terms:
                self._replace(parameter, {})
            return
        pivot = min(terms, key=lambda p: (abs(terms[p]), len(self.users[p]), p))
        own = terms.pop(pivot)
        form = {}
        for parameter, a in terms.items():
            stride = abs(own) // math.gcd(own, a)
            if stride > 1:
                self._replace(parameter, {parameter: stride})
            form[parameter] = -a * stride // own
        self._replace(pivot, form)

    def _replace(self, parameter: int, form: Mapping[int, int]) -> None:
        for cell in self.users.pop(parameter):
            own = self.forms[cell]
            factor = own.pop(parameter)
            for p, a in form.items():
                own[p] = own.get(p, 0) + factor * a
                if own[p]:
                    self.users.setdefault(p, set()).add(cell)
                else:
                    del own[p]
                    self.users[p].discard(cell)

    def components(self) -> Iterator[tuple[list[int], Ints]]:
        """Sets of cells that an equation binds, each with the matrix [cells, parameters] of its forms."""
        seen: set[int] = set()
        for start in sorted(self.whys):
            if start in seen:
                continue
            cells, parameters, reach = {start}, set[int](), [start]
            while reach:
                for p in self.forms[reach.pop()]:
                    if p not in parameters:
                        parameters.add(p)
                        reach += (new := self.users[p] - cells)
                        cells |= new
            seen |= cells
            rows, columns = sorted(cells), {p: i for i, p in enumerate(sorted(parameters))}
            matrix = np.zeros((len(rows), len(columns)), np.int64)
            for i, cell in enumerate(rows):
                for p, a in self.forms[cell].items():
                    matrix[i, columns[p]] = a
            yield rows, matrix

    def reason(self, cell: int) -> str:
        """The equations of a cell and of the cells that share its parameters."""
        whys = dict(self.whys[cell])
        for p in self.forms[cell]:
            for other in sorted(self.users[p]):
                whys |= self.whys[other]
        return "; ".join(whys)


def _nearest(directions: Ints, want: Floats, most: Ints, price: Floats, total: Ints, step: Ints) -> Ints:
    """The removed counts nearest to `want` among the integer combinations of the columns within 0..most."""
    columns = [directions[:, i] for i in range(directions.shape[1])]
    removed = np.zeros(len(want), np.int64)
    if len(columns) > 1:
        removed = _start(directions, want, most, price, total, step)
        if len(columns) <= _PAIRS:
            columns += [s for a, b in combinations(columns, 2) for s in (a + b, a - b)]
    best, moved = float(price @ (removed - want) ** 2), True
    while moved:
        moved = False
        for column in columns:
            k = _move(column, removed, want, most, price, total, step)
            new = removed + k * column
            cost = float(price @ (new - want) ** 2)
            if k and cost < best * (1 - 1e-12):
                removed, best, moved = new, cost, len(columns) > 1
    return removed


def _start(directions: Ints, want: Floats, most: Ints, price: Floats, total: Ints, step: Ints) -> Ints:
    """The least-squares solution, rounded and drawn towards zero until it is allowed; zero itself always is."""
    root = np.sqrt(price)
    common = math.lcm(*step.tolist())
    real = np.linalg.lstsq(directions * root[:, None], want * root, rcond=None)[0]
    for share in (1.0, 0.95, 0.75, 0.5):
        removed = directions @ (common * np.floor(share * real / common + 0.5).astype(np.int64))
        if (removed >= 0).all() and (removed <= most).all() and _rounded(removed, total, step):
            return removed
    return np.zeros(len(want), np.int64)


def _rounded(removed: Ints, total: Ints, step: Ints) -> bool:
    return bool(((removed == 0) | ((total - removed) % step == 0)).all())


def _move(column: Ints, removed: Ints, want: Floats, most: Ints, price: Floats, total: Ints, step: Ints) -> int:
    """How often to add `column` to `removed`: the nearest allowed multiple; 0 when none is allowed."""
    on = column != 0
    a, r, room = column[on], removed[on], most[on]
    common = math.lcm(*step[on].tolist())
    low = np.where(a > 0, -(r // a), -((room - r) // -a))
    high = np.where(a > 0, (room - r) // a, r // -a)
    first, last = int(low.max()), int(high.min())
    best = float((price[on] * (want[on] - r)) @ a) / float(price[on] @ a**2)
    near = min(max(math.ceil(best - 0.5), first), last)
    around = range(max(first, near - common + 1), min(last, near + common - 1) + 1)  # what is allowed repeats so
    for k in sorted(around, key=lambda k: (round(abs(k - best), 9), k)):
        if _rounded(removed[on] + k * a, total[on], step[on]):
            return k
    return 0
