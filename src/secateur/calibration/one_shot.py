"""Pruning after training, by what the layers of a model read: no loop, no labels, and the survivors are repaired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur import plan
from secateur.allocation import ALLOCATIONS, Allocation, Rule
from secateur.calibration import levels
from secateur.calibration.by_blocks import SENSITIVITY, Task, prune_by_blocks
from secateur.calibration.contest import Contest, Judge, Pruned
from secateur.calibration.matrices import Draft, Matrix, masked, matrices, opened, shared
from secateur.calibration.solvers.base import Select, Solver, resolve
from secateur.calibration.statistics import Statistics
from secateur.calibration.supports import Within, selector
from secateur.calibration.trials import Evaluate
from secateur.calibration.ways import Effort, Solution, Solutions, fast, loops, ways
from secateur.errors import InputError
from secateur.patterns import Pattern
from secateur.scope import unwrap
from secateur.sparsity import Sparsity
from secateur.support import checks
from secateur.support.files import StrPath
from secateur.support.progress import progress_bar


@torch.no_grad()
def oneshot(
    model: nn.Module,
    stats: Statistics | Sequence[Any],
    sparsity: Sparsity,
    *,
    solver: str | Solver | None = None,
    effort: Effort = "full",
    allocation: str | Allocation | Rule = "uniform",
    pattern: str | Pattern | None = None,
    scope: Mapping[str, nn.Parameter] | None = None,
    evaluate: Evaluate | None = None,
    sequential: bool | StrPath = False,
    progress: bool = False,
) -> Pruned:
    """Prune a trained model without training it: the weights that stay are fitted so that its outputs change least.

    Each layer is pruned so that what it makes of the calibration data changes as little as it can. LSTM, GRU and RNN
    are fitted to states of their own too. Biases stay, and so do names and shapes. With full effort several ways are
    tried, the fast one among them, and that one is taken with which the model stays truest to itself on the batches
    that `calibrate` held out. Weights that are zero already stay zero, and count. Weights of any dtype are solved in
    float32: those of float64 come back in float64, but are exact to float32 only.

    Args:
        model: the dense one, of which the statistics are; pruned in place.
        stats: from `sc.calibrate(model, batches)`; with `sequential` the batches themselves.
        sparsity: the fraction of all weights in scope that become zero, a `sc.Count`, or `{glob: fraction}`.
        solver: a name of `secateur.calibration.solvers.SOLVERS`, or a function like those; by default "alps".
        effort: "full", or "fast": Wanda's choice with a refit of the survivors, without a solver, and nothing is
            compared.
        allocation: how many weights each tensor loses, as for `prune`; or "sensitivity": by what each layer, pruned
            alone, costs the whole model, if that proves better than the same fraction of each.
        pattern, scope: as for `prune`; a pattern must be one of single tensors.
        evaluate: `model -> float`, higher is better: judges in place of the mean cosine of the outputs; once the model
            as it is, too.
        sequential: prune block by block, each on what the pruned ones before it give. It holds the sums of one layer
            at a time, and compares no ways. A path is that of a folder that keeps what is done and what the batches
            bring to the next block: a run that was killed goes on there. See `by_blocks.prune_by_blocks`.
        progress: draw a bar on stderr.

    Returns:
        The masks, which also print as a table of what was done, with what may help where the outputs are kept badly.

    Warns:
        SecateurWarning: tensors without statistics, which are pruned by magnitude.

    Raises:
        InputTypeError, InputError, UnknownNameError, PatternError: an argument that cannot be used; statistics of
            another model; a sharded model. NotFiniteError: weights with NaN or inf. The model is as it was then.

    >>> from secateur import calibrate
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> stats = calibrate(model, [torch.linspace(-1, 1, 256).sin().mul(i).view(32, 8) for i in range(1, 6)])
    >>> masks = oneshot(model, stats, 0.5)
    >>> masks.pruned, int((model[0].weight == 0).sum())
    (40, 32)
    """
    if effort not in ("full", "fast"):
        raise InputError(f"effort is {effort!r}: choose 'full' or 'fast'")
    checks.flag("progress", progress)
    if solver is not None and effort == "fast":
        raise InputError("effort is 'fast', which is a way of its own without a solver: leave out effort or solver")
    solver = "alps" if solver is None else solver
    solve, measured = resolve(solver), isinstance(allocation, str) and allocation == SENSITIVITY
    if isinstance(allocation, str) and not measured and allocation not in ALLOCATIONS:
        raise ALLOCATIONS.unknown(allocation, more=() if sequential is not False else (SENSITIVITY,))
    if sequential is not False:
        task = Task(sparsity, fast if effort == "fast" else solver, allocation, pattern)
        return _by_blocks(model, stats, task, scope, evaluate, sequential, progress)
    if not isinstance(stats, Statistics):
        raise checks.wrong(
            "stats", stats, "what sc.calibrate(model, batches) returned, or batches with sequential=True"
        )
    if evaluate is not None:
        checks.function("evaluate", evaluate, "a function (model) -> float, higher is better")
    inner = opened(model, stats)
    even = "uniform" if measured else allocation
    made = plan.make(inner, sparsity, score="magnitude", allocation=even, pattern=pattern, scope=scope)
    masks = made.masks(made.counts())  # by magnitude: what is taken of it are the counts, and what no batch reached
    parts = [part for part in matrices(made.scope, stats.moments) if set(part.moments.names) <= set(masks)]
    judge, inside = Judge(inner, stats, made.scope, evaluate), loops(inner, stats.runs, parts)
    if measured:
        _require_measurable(made.pattern, judge)

    def select(part: Matrix, zeros: int, within: Within) -> Select:
        return selector(part.moments, part.shapes, part.weights(), zeros, pattern=made.pattern, within=within)

    def solutions(zeros: Mapping[Matrix, int]) -> Solutions:
        return Solutions(parts, lambda part, within: select(part, zeros[part], within), inside)

    zeros = shared(parts, masks.counts())
    contest, work = Contest(judge, masked(made.scope, masks, parts)), solutions(zeros)
    every = ways(solve, effort, bool(inside))[: None if judge else 1]
    steps = len(every) + (levels.measurements(parts) if measured else 0)
    with progress_bar("pruning", steps, shown=progress) as advance:
        for way in every:
            contest.enter(way, work.of(way))
            advance(1)
        if measured:
            way, _ = contest.best
            some = replace(stats, held=stats.checks[::2])  # of which there are many judgements
            zeros = _by_sensitivity(zeros, Judge(inner, some, made.scope, evaluate), select, advance)
            contest.enter(way._replace(name=f"{way.name}, by sensitivity"), solutions(zeros).of(way))
    found = contest.result(made.scope, _options(made.pattern, measured))
    found.asked = sum(made.counts())
    contest.draft.write(made.scope)
    return found


def _by_blocks(
    model: nn.Module,
    batches: Statistics | Sequence[Any],
    task: Task,
    scope: Mapping[str, nn.Parameter] | None,
    evaluate: Evaluate | None,
    sequential: bool | StrPath,
    progress: bool,
) -> Pruned:
    if evaluate is not None:
        raise InputError("evaluate judges among several ways, and block by block there is one: leave one of them out")
    if isinstance(batches, Statistics):
        raise checks.wrong("stats", batches, "the batches themselves with sequential")
    folder = None if sequential is True else checks.path("sequential", sequential)
    masks = prune_by_blocks(model, batches, task, scope=scope, folder=folder, progress=progress)
    found = Pruned.of(masks, [], {}, "block by block")
    found.asked = sum(task.planned(unwrap(model), scope).counts())
    return found


def _options(pattern: Pattern | None, measured: bool) -> list[str]:
    """What else may be asked for, where a pattern leaves a choice."""
    if pattern is not None and pattern.sparsity is not None:
        return []
    return [*([] if measured else ['allocation="sensitivity"']), "a lower sparsity"]


def _require_measurable(pattern: Pattern | None, judge: Judge) -> None:
    """See that layers can lose by their sensitivity."""
    if pattern is not None and pattern.sparsity is not None:
        raise InputError(
            f"the pattern {pattern} gives all layers one sparsity, which leaves nothing to share: ask for no allocation"
        )
    if not judge:
        raise InputError(
            "sensitivity is measured in the whole model, and statistics with a loss keep no batches that the model is "
            "called with: give evaluate=, a function (model) -> float, or leave loss= out of sc.calibrate"
        )


def _by_sensitivity(
    zeros: Mapping[Matrix, int],
    judge: Judge,
    select: Callable[[Matrix, int, Within], Select],
    advance: Callable[[float], None],
) -> dict[Matrix, int]:
    def solve(part: Matrix, count: int) -> Solution:
        return part, *fast(part.weights(), part.curvature, select(part, count, "row"))

    def quality(solutions: Sequence[Solution]) -> float:
        draft = Draft()
        for solution in solutions:
            draft.put(*solution)
        return judge.of(draft, "sensitivity")

    return levels.zeros(zeros, solve, quality, advance)
