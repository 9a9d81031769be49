"""Which allocation, and how far it can go: by the user's own metric, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from secateur import patterns, plan
from secateur import scope as scopes
from secateur.allocation import ALLOCATIONS, Allocation, resolve
from secateur.calibration.sensitivity import Scan
from secateur.calibration.trials import Evaluate, tried
from secateur.errors import InputError, PatternError
from secateur.patterns import Pattern, Picked
from secateur.scores import Score
from secateur.sparsity import Sparsity
from secateur.support import bits, checks
from secateur.support.progress import progress_bar
from secateur.support.tables import Printed, Table

_STEPS = 100
"""`recommend` looks at multiples of 1 / _STEPS."""


@dataclass(frozen=True, kw_only=True)
class Choice(Allocation, Printed):
    """The allocation that was best, to be given as it is: `prune(allocation=choice)`; prints as a table.

    Attributes:
        best: its name.
        sparsity: of the weights in scope, at which they were tried.
        dense: the metric (higher is better) of the model as it is.
        metrics: that with each allocation, by its name.
    """

    best: str
    sparsity: float
    dense: float
    metrics: Mapping[str, float]

    @property
    def at_stake(self) -> float:
        """What it would cost to be wrong: the best metric minus the worst."""
        return max(self.metrics.values()) - min(self.metrics.values())

    def to_dict(self) -> dict[str, Any]:
        """What was found, as plain data."""
        return {key: getattr(self, key) for key in ("best", "sparsity", "dense", "metrics", "at_stake")}

    def table(self) -> Table:
        """One row an allocation."""
        rows = [(name, f"{metric:.4g}", f"{self.dense - metric:.3g}") for name, metric in self.metrics.items()]
        worst = min(self.metrics, key=self.metrics.__getitem__)
        if self.at_stake:
            note = f"best: {self.best}; {worst} in its place would cost {self.at_stake:.3g}"
        else:
            note = f"all have the same metric, so that none is better; {self.best} is the first of them"
        title = f"At sparsity {self.sparsity:.4g}; the model as it is has a metric of {self.dense:.4g}"
        return Table(("allocation", "metric", "falls by"), rows, title, [note])


def choose_allocation(
    model: nn.Module,
    evaluate: Evaluate,
    sparsity: Sparsity,
    *,
    scan: Scan | None = None,
    score: str | Score | Mapping[str, Tensor] = "magnitude",
    pattern: str | Pattern | None = None,
    scope: Mapping[str, nn.Parameter] | None = None,
    progress: bool = False,
) -> Choice:
    """Try all allocations that have a name at one sparsity, and take the one whose metric is the highest.

    Of sharded models only those that need no whole tensors.
    With a scan, "sensitivity" is among them, the allocation that it suggests. The model is bit for bit as it was after
    each trial, also after an error or an interruption. It makes one evaluation for each, and one of the model as it is.

    Args:
        model: given to `evaluate`.
        evaluate: `model -> float`, higher is better; for a loss return its negative. It may change the model, train it
            for a while or call `sc.recalibrate`: that is undone.
        sparsity: a fraction of all weights in scope, or `sc.Count(n)`.
        scan: what `sc.scan` found of this model.
        score, pattern, scope: as for `prune`.
        progress: draw a bar on stderr.

    Raises:
        InputError, InputTypeError: a sparsity for each tensor, which leaves nothing to share; a metric that is not one
            finite number, with the allocation. UnknownNameError, InputError: a scan of another model. And as `prune`.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> choice = choose_allocation(model, lambda model: model[2].weight.abs().sum(), 0.5)
    >>> list(choice.metrics)
    ['global', 'uniform', 'erk', 'lamp']
    >>> from secateur import prune
    >>> prune(model, 0.5, allocation=choice).pruned
    40
    """
    checks.function("evaluate", evaluate, "a function (model) -> float, higher is better")
    checks.flag("progress", progress)
    if isinstance(sparsity, Mapping):
        raise InputError("a sparsity for each tensor leaves nothing to share: give one for all of them")
    found = scopes.resolve(model, scope)
    allocations = _named(found)
    if scan is not None:
        if not isinstance(scan, Scan):
            raise checks.wrong("scan", scan, "what sc.scan returned")
        scan.require({name: member.free for name, member in found.members.items()})
        allocations["sensitivity"] = scan.allocation()
    options: Any = {"score": score, "pattern": pattern, "scope": _given(scope, found, pattern)}
    plans = {name: plan.make(model, sparsity, allocation=a, **options) for name, a in allocations.items()}
    any_one = plans["global"]
    pruned = float(sum(any_one.counts()) / sum(share.size for share in any_one.shares))
    with progress_bar("trying", len(plans) + 1, shown=progress) as advance:
        dense = tried(model, evaluate, "the model as it is")
        advance(1)
        metrics = {}
        for name, one in plans.items():
            metrics[name] = tried(model, evaluate, f"allocation {name!r} at sparsity {pruned:.4g}", one)
            advance(1)
    best = max(metrics, key=metrics.__getitem__)
    plain = {field.name: getattr(allocations[best], field.name) for field in fields(Allocation)}
    return Choice(**plain, best=best, sparsity=pruned, dense=dense, metrics=metrics)


@dataclass(frozen=True)
class Recommendation(Printed):
    """The highest sparsity found within a tolerated loss; prints as a table of what was tried.

    Attributes:
        sparsity: 0 where not even one per cent can go.
        allocation: with which; give it to `prune`.
        metric: that of the model pruned so.
        dense: that of the model as it is.
        tolerance: how far the metric was allowed to fall.
        tried: sparsity, name of the allocation and metric of each trial, in their order.
    """

    sparsity: float
    allocation: str | Allocation
    metric: float
    dense: float
    tolerance: float
    tried: tuple[tuple[float, str, float], ...]

    @property
    def evaluations(self) -> int:
        """How often the metric was computed."""
        return 1 + len(self.tried)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**vars(self), "allocation": _name(self.allocation), "evaluations": self.evaluations}

    def table(self) -> Table:
        """One row a sparsity and an allocation."""
        rows = [
            (f"{sparsity:g}", name, f"{metric:.4g}", f"{self.dense - metric:.3g}")
            for sparsity, name, metric in sorted(self.tried, key=lambda one: one[0])
        ]
        title = f"The model as it is has a metric of {self.dense:.4g}, which may fall by {self.tolerance:g}"
        found = f"{self.sparsity:g} with {_name(self.allocation)}"
        notes = [f"highest within that: {found}, after {self.evaluations} evaluations"]
        return Table(("sparsity", "allocation", "metric", "falls by"), rows, title, notes)


def recommend(
    model: nn.Module,
    evaluate: Evaluate,
    tolerance: float = 0.01,
    *,
    allocation: str | Allocation | Callable[[Mapping[str, Tensor], int], Mapping[str, int]] | None = None,
    score: str | Score | Mapping[str, Tensor] = "magnitude",
    pattern: str | Pattern | None = None,
    scope: Mapping[str, nn.Parameter] | None = None,
    progress: bool = False,
) -> Recommendation:
    """Find the highest sparsity, to 0.01, at which the metric falls by no more than a tolerance; without training.

    By bisection, so that it sees no more than seven sparsities of 0.01 to 0.99. What it gives was measured. Where the
    metric does not fall steadily, a higher sparsity may do as well. What a pattern, or the least that each tensor
    keeps, puts out of reach is left out. The model is bit for bit as it was after each trial.

    Args:
        model: given to `evaluate`.
        evaluate: `model -> float`, higher is better; for a loss return its negative. It may change the model, train it
            for a while or call `sc.recalibrate`: that is undone.
        tolerance: how far the metric may fall, in its own unit, 0 or more.
        allocation: the one to prune with, such as what `sc.choose_allocation` chose: at most 8 evaluations. None tries
            all that have a name, at each sparsity, until one will do: at most 29 evaluations.
        score, pattern, scope: as for `prune`.
        progress: draw a bar on stderr.

    Raises:
        InputError, InputTypeError: a tolerance below 0; a metric that is not one finite number, with the sparsity.
        PatternError: a pattern of one sparsity only. And as `prune`.

    >>> model = nn.Linear(10, 10)
    >>> _ = nn.init.ones_(model.weight)
    >>> recommend(model, lambda model: model.weight.mean(), 0.305).sparsity
    0.3
    """
    checks.function("evaluate", evaluate, "a function (model) -> float, higher is better")
    checks.flag("progress", progress)
    checks.number("tolerance", tolerance, "how far the metric may fall, such as 0.01")
    if not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance}: give how far the metric may fall, 0 or more")
    fixed = patterns.resolve(pattern)
    if fixed is not None and fixed.sparsity is not None:
        raise PatternError(
            f"the pattern {pattern} has one sparsity, {float(fixed.sparsity):g}: evaluate the model there"
        )
    found = scopes.resolve(model, scope)
    choices = _named(found) if allocation is None else {_name(allocation): resolve(allocation)}
    options: Any = {"score": score, "pattern": fixed, "scope": _given(scope, found, fixed)}
    for one in choices.values():
        plan.make(model, 1 / _STEPS, allocation=one, **options).require_possible()  # what cannot be done at all
    dense = tried(model, evaluate, "the model as it is")
    trials: list[tuple[float, str, float]] = []

    def good(sparsity: float) -> tuple[str, float] | None:
        """An allocation whose metric is high enough, the last such one first, and that metric."""
        for name in sorted(choices, key=lambda name: name != best[0]):
            one = plan.make(model, sparsity, allocation=choices[name], **options)
            try:
                one.require_possible()
            except InputError:  # more than the pattern, or the least that each tensor keeps, lets go
                continue
            metric = tried(model, evaluate, f"allocation {name!r} at sparsity {sparsity:g}", one)
            trials.append((sparsity, name, metric))
            if metric >= dense - tolerance * (1 + 1e-9):  # 0.98 - 0.01 may be above 0.97
                return name, metric
        return None

    best, low, high = (next(iter(choices)), dense), 0, _STEPS
    with progress_bar("trying", (_STEPS - 1).bit_length(), shown=progress) as advance:
        while high - low > 1:
            middle = (low + high) // 2
            held = good(middle / _STEPS)
            best, low, high = (best, low, middle) if held is None else (held, middle, high)
            advance(1)
    name, metric = best
    chosen = name if allocation is None or isinstance(allocation, str) else choices[name]
    return Recommendation(low / _STEPS, chosen, metric, dense, float(tolerance), tuple(trials))


def _given(
    scope: Mapping[str, nn.Parameter] | None, found: scopes.Scope, pattern: str | Pattern | None
) -> Mapping[str, nn.Parameter] | None:
    """The scope, looked up once; a pattern of units names its tensors itself."""
    return scope if isinstance(patterns.resolve(pattern), Picked) else found


def _named(scope: Mapping[str, Tensor]) -> dict[str, Allocation]:
    """All allocations that need no more than the weights, or, where these are sharded, the parts that are here."""
    made = {name: choice.value() for name, choice in ALLOCATIONS.items() if not choice.call}
    whole = not any(map(bits.is_sharded, scope.values()))
    return {name: one for name, one in made.items() if whole or one.of_parts}


def _name(allocation: object) -> str:
    if isinstance(allocation, str):
        return allocation
    if isinstance(allocation, Choice):
        return allocation.best
    share = allocation.share if isinstance(allocation, Allocation) else allocation
    if share is None:
        return "global"
    return "sensitivity" if isinstance(getattr(share, "__self__", None), Scan) else getattr(share, "__name__", "yours")
