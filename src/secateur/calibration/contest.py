"""Several ways to prune a model, of which that one is taken with which it stays truest to itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from secateur.calibration.batch_norms import counting
from secateur.calibration.fidelity import Fidelity
from secateur.calibration.matrices import Draft, restored
from secateur.calibration.moments import titles
from secateur.calibration.statistics import Statistics
from secateur.calibration.trials import Evaluate, tried
from secateur.calibration.ways import Solution, Way
from secateur.masks import Masks
from secateur.scope import Scope
from secateur.support.tables import Printed, Table, counted, number, percent

_WELL = 0.9
"""A mean cosine below this is poor, and so is a metric that has lost more than the rest of that of the dense model."""


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
        advice: what may help where the model is far from what it was; empty where it is not, or none can tell.
    """

    losses: Mapping[str, tuple[int, int, float]]
    tried: Mapping[str, float]
    way: str
    asked: int | None = None
    advice: str = ""

    @classmethod
    def of(
        cls, masks: Masks, solutions: Sequence[Solution], tried: Mapping[str, float], way: str, advice: str = ""
    ) -> Pruned:
        """Add to masks how it went; the model must still be the dense one."""
        made = cls({})
        vars(made).update(vars(masks))
        told = titles([part.moments.pieces for part, _, _ in solutions])
        made.losses = {
            name: (int((~kept).sum()), part.size, part.loss(weights))
            for name, (part, weights, kept) in zip(told, solutions, strict=True)
        }
        made.tried, made.way, made.advice = dict(tried), way, advice
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
        notes += [self.advice] if self.advice else []
        title = f"{number(self.pruned)} of {counted(self.size, 'weight')} pruned, {percent(self.sparsity)}"
        header = ("weights", "zeros", "sparsity", "output lost")
        return Table(header[: len(rows[0])] if rows else header, rows, title, notes)


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

    def advice(self, found: float, options: Sequence[str]) -> str:
        """What may help where a model that was found so good is far from the dense one; else nothing.

        Args:
            found: what `of` gave.
            options: of `oneshot`, that were not in use.
        """
        if self._evaluate is None:
            poor, told = found < _WELL, f"a mean cosine of {found:.4f}"
        else:
            dense = tried(self._model, self._evaluate, "the model as it is")
            poor, told = found < dense - (1 - _WELL) * abs(dense), f"a metric of {found:.4g}, before it was {dense:.4g}"
        if not poor:
            return ""
        more = ["sc.recalibrate(model, batches), for its BatchNorm"] if counting(self._model) else []
        tips = [*options, *more, "sc.recover(model, dense, batches, steps=200)"]
        return f"the outputs are not kept well ({told}): try {'; '.join(tips)}"


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

    def result(self, scope: Scope, options: Sequence[str] | None = None) -> Pruned:
        """The masks of the best, and how it went; the model must still be the dense one.

        Args:
            scope: what was pruned.
            options: of `oneshot`, that may help where all ways are poor; None for no advice.
        """
        way, solutions = self.best
        advice = ""
        if self._tried and options is not None:
            advice = self._judge.advice(self._tried[way.name], options)
        return Pruned.of(self.draft.masks(scope), solutions, self._tried, way.name, advice)
