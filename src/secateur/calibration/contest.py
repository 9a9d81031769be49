"""Several ways to prune a model, of which that one is taken with which it stays truest to itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from secateur.calibration.fidelity import Fidelity
from secateur.calibration.matrices import Draft, Matrix, restored
from secateur.calibration.statistics import Statistics
from secateur.calibration.trials import Evaluate, tried
from secateur.calibration.ways import Solution, Way
from secateur.masks import Masks
from secateur.scope import Scope
from secateur.support.tables import Printed, Table, counted, number, percent


class Pruned(Masks, Printed):
    """The masks of what was pruned, and how it went; prints as a table.

    Attributes:
        losses: for each matrix, by the names of its tensors, with its rows where others have the rest: its zeros, its
            weights, and how much of its output is lost, the mean square of the error over that of the output, where it
            reads what the dense model gives it. Empty after pruning block by block.
        tried: the ways that were tried, and how true the model is with each on the batches to check on: the mean
            cosine between its outputs and the dense model's, or the user's metric.
        way: the one that was taken.
        asked: how many weights were to go; under a pattern others may, since its groups go whole. None if not known.
    """

    losses: Mapping[str, tuple[int, int, float]]
    tried: Mapping[str, float]
    way: str
    asked: int | None = None

    @classmethod
    def of(cls, masks: Masks, solutions: Sequence[Solution], tried: Mapping[str, float], way: str) -> Pruned:
        """Add to masks how it went; the model must still be the dense one."""
        made = cls({})
        vars(made).update(vars(masks))
        names = [part.name for part, _, _ in solutions]
        told = [
            name if names.count(name) == 1 else _rows(part) for name, (part, _, _) in zip(names, solutions, strict=True)
        ]
        made.losses = {
            name: (int((~kept).sum()), part.size, part.loss(weights))
            for name, (part, weights, kept) in zip(told, solutions, strict=True)
        }
        made.tried, made.way = dict(tried), way
        return made

    def table(self) -> Table:
        """One row a matrix: its zeros, and what they cost; then the ways that were tried."""
        rows: list[tuple[str, ...]] = [
            (names, number(zeros), percent(zeros / max(size, 1)), percent(loss))
            for names, (zeros, size, loss) in self.losses.items()
        ]
        if not rows:  # block by block, where no output of the dense model is kept to compare with
            sizes = {name: self.shape(name).numel() for name in self}
            zeros = self.counts()
            rows = [(name, number(zeros[name]), percent(zeros[name] / max(n, 1))) for name, n in sizes.items()]
        notes = [f"{way}: {found:.4f}{' (taken)' if way == self.way else ''}" for way, found in self.tried.items()]
        if len(self.tried) > 1 and len({*self.tried.values()}) == 1:
            notes.append(f"all of these are equal, so that none is better: {self.way} is the first of them")
        if missed := self.pruned - (self.pruned if self.asked is None else self.asked):
            less = "fewer" if missed < 0 else "more"
            notes.append(
                f"{counted(abs(missed), 'weight')} {less} than asked: those of a group of the pattern go together"
            )
        title = f"{number(self.pruned)} of {counted(self.size, 'weight')} pruned, {percent(self.sparsity)}"
        header = ("weights", "zeros", "sparsity", "output lost")
        return Table(header[: len(rows[0])] if rows else header, rows, title, notes)


def _rows(part: Matrix) -> str:
    """The name of a matrix that has only some rows of its tensors, as those of the gates of a GRU."""
    pieces = part.moments.pieces
    return " + ".join(f"{piece.name}[{piece.start}:{piece.stop}]" for piece in pieces)


class Judge:
    """Says how true a model is with some new weights. False where there is nothing to judge by.

    Args:
        model: the dense one; as it was after each judgement.
        stats: with batches to check on.
        scope: the tensors that may change.
        evaluate: the user's metric, in place of the outputs.
    """

    def __init__(self, model: nn.Module, stats: Statistics, scope: Scope, evaluate: Evaluate | None) -> None:
        self._model, self._scope, self._evaluate = model, scope, evaluate
        self._fidelity = Fidelity(model, stats.checks) if evaluate is None and stats.checks else None

    def __bool__(self) -> bool:
        return self._evaluate is not None or self._fidelity is not None

    def of(self, draft: Draft, name: str) -> float:
        """How good a draft is: higher is better."""
        with restored({tensor: self._scope[tensor] for tensor in draft.weights}):
            draft.write(self._scope)
            if self._evaluate is not None:
                return tried(self._model, self._evaluate, f"the model pruned by {name}")
            assert self._fidelity is not None
            return self._fidelity.of(self._model)


class Contest:
    """The best of some ways; without a judge the first.

    Args:
        judge: of drafts.
        beside: weights that all ways have in common.
    """

    def __init__(self, judge: Judge, beside: Draft) -> None:
        self._judge, self._beside = judge, beside
        self._tried: dict[str, float] = {}
        self._best: tuple[Way, Sequence[Solution]] | None = None
        self.draft = beside

    @property
    def best(self) -> tuple[Way, Sequence[Solution]]:
        """The way that is ahead, and what it made."""
        assert self._best is not None, "nothing was entered"
        return self._best

    def enter(self, way: Way, solutions: Sequence[Solution]) -> None:
        """See what a way made."""
        draft = Draft(dict(self._beside.weights), dict(self._beside.kept))
        for solution in solutions:
            draft.put(*solution)
        if self._judge:
            self._tried[way.name] = self._judge.of(draft, way.name)
        if self._best is None or (self._judge and self._tried[way.name] > self._tried[self._best[0].name]):
            self._best, self.draft = (way, solutions), draft

    def result(self, scope: Scope) -> Pruned:
        """The masks of the best, and how it went; the model must still be the dense one."""
        way, solutions = self.best
        return Pruned.of(self.draft.masks(scope), solutions, self._tried, way.name)
