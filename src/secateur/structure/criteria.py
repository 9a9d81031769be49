"""How much each unit matters: the lowest of those that may stand for one another go first.

Any score of weights, `(name, weight) -> Tensor`, serves: it is summed over all weights of a unit. What looks at whole
units is a function of a `Subject`, marked by `@of_units`. `@criterion("name")` gives either a name;
`print(CRITERIA)` lists those that have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur import anatomy
from secateur import scores as weight_scores
from secateur.calibration.statistics import Statistics
from secateur.errors import InputError, listed
from secateur.scores import GradientScore, Score
from secateur.structure.calls import Call, key, results, tensors
from secateur.structure.calm import calm
from secateur.structure.capture import Capture
from secateur.structure.fields import labels, support
from secateur.structure.groups import Axis, Groups, Worth, scores
from secateur.structure.units import Flags
from secateur.support.inputs import arguments
from secateur.support.registry import Registry


class Subject(NamedTuple):
    """What a criterion looks at.

    Attributes:
        model: the captured one, not cut.
        capture: its forwards.
        groups: its units.
    """

    model: nn.Module
    capture: Capture
    groups: Groups


UnitScore = Callable[[Subject], Worth]
_F = TypeVar("_F", bound=Callable[..., Any])

CRITERIA: Registry[Callable[..., Any]] = Registry("score", "a function (name, weight), or a dict of tensors")
"""The scores of units that have a name; those of `sc.scores.SCORES` serve too."""


def criterion(name: str, *, source: str = "", call: str = "") -> Callable[[_F], _F]:
    """Give a score of units a name, as `sc.scores.score` does for weights.

    What is decorated is a score itself, or what makes one when called without arguments.

    Raises:
        InputError: another one has that name.
    """

    def register(made: _F) -> _F:
        CRITERIA.add(name, made, source=source, call=call)
        return made

    return register


def of_units(score: _F) -> _F:
    """Mark a function of a `Subject`, as against one of (name, weight)."""
    score.of_units = True  # type: ignore[attr-defined]
    return score


def of_statistics(made: _F) -> _F:
    """Mark what makes a score of the statistics of a model, as against one that needs none."""
    made.of_statistics = True  # type: ignore[attr-defined]
    return made


def resolve(given: str | Score | UnitScore | Mapping[str, Tensor], stats: Statistics | None = None) -> UnitScore:
    """Turn what a user may pass as `score=` into a function of a `Subject`.

    Args:
        given: a name, a function, or scores by name.
        stats: for those that are made of them.

    Raises:
        InputError: an unknown name, or one that says too little. InputTypeError: something else.
    """
    if isinstance(given, str):
        if given in weight_scores.SCORES and given not in CRITERIA:
            return summed(weight_scores.resolve(given))
        if stats is not None and given in CRITERIA and getattr(CRITERIA[given].value, "of_statistics", False):
            return CRITERIA[given].value(stats)  # type: ignore[no-any-return]
        found = CRITERIA.find(given)
        given = found() if weight_scores.takes_nothing(found) else found
    if getattr(given, "of_units", False):
        return given  # type: ignore[return-value]
    return summed(weight_scores.resolve(given))  # type: ignore[arg-type]


def summed(score: Score) -> UnitScore:
    """The sum of a score of weights over all weights of a unit.

    A score made of gradients counts the tensors of which it has seen some, usually the weight matrices.
    """

    def known(name: str, weight: Tensor) -> Tensor:
        if isinstance(score, GradientScore) and score.sums and name not in score.sums:
            return torch.zeros_like(weight)
        return weight_scores.evaluate(score, name, weight)

    @of_units
    def worth(subject: Subject) -> Worth:
        prepare = getattr(score, "prepare", None)
        if prepare is not None:
            prepare()
        return scores(subject.groups, known, by_rows=score is l2 or score is weight_scores.magnitude)

    return worth


def per_axis(subject: Subject, score: Callable[[Axis], Tensor | None]) -> Worth:
    """Scores [positions] of the axes of parameters on which units may go; None adds nothing."""
    groups, total = subject.groups, np.zeros(len(subject.groups.root))
    free = np.ones(len(total), bool)
    free[list(groups.held)] = False
    for axis in groups.axes:
        if isinstance(axis.tensor, nn.Parameter) and free[groups.root[axis.labels]].any():
            found = score(axis)
            if found is not None:
                total += np.bincount(axis.labels, found.double().cpu().numpy(), len(total))
    return total


CRITERIA.add(
    "magnitude",
    weight_scores.magnitude,
    meaning="Sum of abs(w)",
    source='Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1',
)


@criterion("l2", source='He et al. 2018, "Soft Filter Pruning", eq. 2 with p = 2')
def l2(name: str, weight: Tensor) -> Tensor:
    """Sum of w^2; the default."""
    return weight.float().square()


@criterion("normalised", source='Fang et al. 2023, "DepGraph", section 3.4')
@of_units
def normalised(subject: Subject) -> Worth:
    """Sum of w^2 over its mean among the units that may stand for one another: for ranks across layers."""
    worth, groups = summed(l2)(subject), subject.groups
    total = np.bincount(groups.root, worth, len(groups.root))
    mean = np.ones(len(total))
    for cell in groups.cells:
        mean[cell] = total[cell].mean() or 1.0
    return np.asarray(worth / mean[groups.root])


CRITERIA.add(
    "taylor",
    weight_scores.taylor,
    meaning="Sum of abs(w g) over the batches that it has seen",
    source='Molchanov et al. 2019, "Importance Estimation", eq. 8 without the square',
    call="sc.accumulate(model, batches, loss)",
)


@criterion("bn_scale", source='Liu et al. 2017, "Network Slimming", section 3')
@of_units
def bn_scale(subject: Subject) -> Worth:
    """Sum of abs(scale) of BatchNorm."""
    found = np.zeros(len(subject.groups.root), bool)

    def scale(axis: Axis) -> Tensor | None:
        path, _, attribute = axis.name.rpartition(".")
        if attribute != "weight" or not anatomy.keeps_statistics(subject.model.get_submodule(path)):
            return None
        found[subject.groups.root[axis.labels]] = True
        return axis.tensor.detach().abs()

    worth = per_axis(subject, scale)
    _known(subject, found, "no BatchNorm has a scale for")
    return worth


def _known(subject: Subject, found: Flags, why: str) -> None:
    """Raise an InputError where a score tells nothing of some units of a cell."""
    groups = subject.groups
    without = [c for c, cell in enumerate(groups.cells) if len(cell) > 1 and not found[cell].all()]
    bare = list(dict.fromkeys(a.name for a in groups.axes if np.isin(groups.cell_of[a.labels], without).any()))
    if bare:
        raise InputError(
            f"{why} the units of {listed(bare)}: choose another score, "
            f"or keep them with keep={bare[:2]} and further names"
        )


@criterion("fpgm", source='He et al. 2019, "Filter Pruning via Geometric Median", eq. 4')
@of_units
def fpgm(subject: Subject) -> Worth:
    """Sum of the distances to all other rows of the same tensor: what lies in their midst can be replaced."""

    def distances(axis: Axis) -> Tensor | None:
        if axis.tensor.ndim < 2:
            return None
        rows = axis.tensor.detach().float().movedim(axis.dim, 0).flatten(1)
        return torch.cat([torch.cdist(some, rows).sum(1) for some in torch.split(rows, 1024)])

    return per_axis(subject, distances)


@criterion("activation", source='Molchanov et al. 2017, "Pruning CNNs for Resource Efficient Inference", section 2.2')
def activation(batches: Iterable[Any] = ()) -> UnitScore:
    """Mean square of what layers read, over calibration batches.

    Args:
        batches: inputs of the model, each as `shrink` takes them; by default its example inputs.

    What stays inside one call is not seen: heads of nn.MultiheadAttention, all but the last layer of an nn.LSTM.
    """

    @of_units
    def worth(subject: Subject) -> Worth:
        runs = [run for run in subject.capture.runs if not run.training]
        total = np.zeros(len(subject.groups.root))
        for args, kwargs in [arguments(batch) for batch in batches] or [run.arguments for run in runs]:
            with calm(subject.model, False, _Reads(runs[0].calls, total)):
                subject.model(*args, **kwargs)
        if not total.any():
            raise InputError("no layer read anything but zeros: give batches of real data, or choose another score")
        seen = np.bincount(subject.groups.root, total, len(total)) > 0
        for cell in subject.groups.cells:  # of some units a ReLU may let nothing through
            seen[cell] |= seen[cell].any()
        _known(subject, seen, "no tensor between two layers shows")
        return total

    return worth


class _Reads(TorchFunctionMode):
    """Adds the mean squares of what products read to the labels of its positions."""

    def __init__(self, calls: list[Call], total: Worth) -> None:
        super().__init__()
        self.calls, self.total, self.at = calls, total, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, operands = key(func), tensors((args, kwargs or {}))
        out = func(*args, **kwargs or {})
        if results(name, args, out) and self.at < len(self.calls) and self.calls[self.at].name == name:
            call = self.calls[self.at]
            self.at += 1
            for t, (_, fields) in zip(operands, call.ins, strict=False):
                if call.products and not isinstance(t, nn.Parameter):
                    self._add(t, fields)
        return out

    def _add(self, t: Tensor, fields: list[Tensor]) -> None:
        for f in fields:
            rest = [d for d in range(t.ndim) if d not in support(f)]
            square = t.detach().double().square()
            square = square.mean(rest, keepdim=True) if rest else square
            if f.ndim == t.ndim and square.shape == f.shape:  # another length of a sequence may have no labels
                self.total += np.bincount(labels(f).ravel(), square.cpu().numpy().ravel(), len(self.total))


@criterion("random", source='Mittal et al. 2018, "Recovering from Random Pruning", the baseline')
def random(seed: int = 0) -> UnitScore:
    """Uniform in [0, 1) for each unit, from a generator of its own."""

    @of_units
    def worth(subject: Subject) -> Worth:
        root = subject.groups.root
        return np.where(root == np.arange(len(root)), np.random.default_rng(seed).random(len(root)), 0.0)

    return worth
