"""How good probabilities and intervals are: scores, calibration, what is gained by leaving out the uncertain.

Each function takes plain tensors and returns a float or a small dataclass; a tensor that cannot be used, or does not
fit the others, is an InputError or InputTypeError. `ece` and `crps` take `pip install "secateur[metrics]"`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import InputError, InputTypeError
from secateur.support import checks
from secateur.support.tables import Printed, Table, number

__all__ = ["Calibration", "RiskCoverage", "adaptive_ece", "brier", "calibration_curve", "coverage", "crps", "ece"]
__all__ += ["nll", "risk_coverage"]


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood in nats, mean over the batch; infinite if a true class has probability zero.

    Args:
        probabilities: [batch, classes], rows that sum to one.
        labels: [batch], integers below classes.

    Example:
        >>> round(nll(torch.tensor([[0.5, 0.5], [0.75, 0.25]]), torch.tensor([0, 1])), 4)  # log 2 and log 4
        1.0397
    """
    probabilities, labels = _checked(probabilities, labels)
    return F.nll_loss(probabilities.log(), labels).item()


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Brier score: squared error summed over the classes, mean over the batch, 0 to 2 (Brier 1950).

    For two classes it is twice the score of one of them, which goes by the same name.

    Args:
        probabilities: [batch, classes], rows that sum to one.
        labels: [batch], integers below classes.

    Example:
        >>> brier(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1]))
        0.25
    """
    probabilities, labels = _checked(probabilities, labels)
    truth = F.one_hot(labels, probabilities.shape[1])
    return (probabilities - truth).square().sum(1).mean().item()


def ece(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error of the most probable class, 0 to 1 (Guo 2017), by torchmetrics.

    Bins of equal width, the lower edge inside: the gap between mean confidence and accuracy of each, weighted by its
    share of the batch. It depends on `bins`, and is biased upwards where data are few: even a perfectly calibrated
    model is above 0.

    Args:
        probabilities: [batch, classes], rows that sum to one.
        labels: [batch], integers below classes.
        bins: how many, at least 1.

    Example:
        >>> ece(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))  # sure to 75 %, right in 50 %
        0.25
    """
    probabilities, labels = _checked(probabilities, labels)
    _require_bins(bins)
    error = _torchmetrics("classification", "multiclass_calibration_error")
    # torchmetrics takes a value above one, which rounding makes, for a logit, and gives an exact one a bin of its own
    return error(probabilities.float().clamp(max=1 - 2**-24), labels, probabilities.shape[1], bins).item()


def adaptive_ece(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """As `ece`, over bins that hold equally many predictions (Nguyen and O'Connor 2015; Nixon 2019), 0 to 1.

    Equal confidences share a bin, so that the order of the data does not matter; bins then differ in size. It depends
    on `bins` and is biased upwards where data are few, as `ece` is.

    Args:
        probabilities: [batch, classes], rows that sum to one.
        labels: [batch], integers below classes.
        bins: how many, at least 1, at most one for each prediction.

    Example:
        >>> rows = torch.tensor([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
        >>> adaptive_ece(rows, torch.tensor([0, 1, 0, 0]), bins=2)
        0.125
    """
    return calibration_curve(probabilities, labels, bins=bins, adaptive=True).error


@dataclass(frozen=True)
class Calibration(Printed):
    """How often predictions of about the same confidence are right; `str()` is a table.

    Attributes:
        confidence: mean probability of the most probable class, one entry a bin that is not empty, rising.
        accuracy: share of the bin's predictions that are right: that of a calibrated model is its confidence.
        count: predictions in the bin.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def error(self) -> float:
        """Mean gap between confidence and accuracy, weighted by the counts, 0 to 1."""
        parts = zip(self.confidence, self.accuracy, self.count, strict=True)
        return sum(count * abs(confidence - accuracy) for confidence, accuracy, count in parts) / sum(self.count)

    def table(self) -> Table:
        """One row a bin."""
        parts = zip(self.confidence, self.accuracy, self.count, strict=True)
        rows = [[f"{sure:.4f}", f"{right:.4f}", number(count)] for sure, right, count in parts]
        return Table(["confidence", "accuracy", "count"], rows, notes=[f"mean gap: {self.error:.4f}"])


def calibration_curve(probabilities: Tensor, labels: Tensor, *, bins: int = 15, adaptive: bool = False) -> Calibration:
    """Confidence and accuracy by bins of the confidence: a reliability diagram (DeGroot and Fienberg 1983).

    Args:
        probabilities: [batch, classes], rows that sum to one.
        labels: [batch], integers below classes.
        bins: how many, at least 1; adaptive ones at most one for each prediction.
        adaptive: bins of equal counts, as in `adaptive_ece`; otherwise of equal width, as in `ece`.

    Example:
        >>> print(calibration_curve(torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]]), torch.tensor([0, 1, 1])))
        confidence  accuracy  count
        ----------  --------  -----
        0.7500        0.5000      2
        1.0000        1.0000      1
        mean gap: 0.1667
    """
    probabilities, labels = _checked(probabilities, labels)
    _require_bins(bins)
    checks.flag("adaptive", adaptive)
    confidence, predicted = probabilities.max(1)
    if adaptive:
        if bins > len(labels):
            raise InputError(f"{bins} bins for {len(labels)} predictions: give bins of at most {len(labels)}")
        edges = confidence.sort().values[[i * len(labels) // bins for i in range(1, bins)]]
    else:
        edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1]
    place = torch.bucketize(confidence, edges, right=True)
    facts = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).to(confidence.dtype)])
    sums = torch.zeros(3, bins, dtype=torch.float64).index_add(1, place.cpu(), facts.cpu().double())
    count, sure, right = sums[:, sums[0] > 0]
    return Calibration(tuple((sure / count).tolist()), tuple((right / count).tolist()), tuple(map(int, count.tolist())))


@dataclass(frozen=True)
class RiskCoverage:
    """What remains wrong if only the most certain part is answered.

    Attributes:
        coverage: share that is answered, k / batch for k = 1, ..., batch.
        risk: mean error among these k.
    """

    coverage: tuple[float, ...]
    risk: tuple[float, ...]

    @property
    def area(self) -> float:
        """Area under the curve, AURC: the mean of `risk` (Geifman 2019); it falls with the errors themselves, too."""
        return sum(self.risk) / len(self.risk)


def risk_coverage(uncertainty: Tensor, errors: Tensor) -> RiskCoverage:
    """Risk against coverage, from the most certain prediction on (El-Yaniv and Wiener 2010; Geifman 2019).

    Predictions of the same uncertainty share their mean error, which is what a random order gives on average.

    Args:
        uncertainty: [batch], large where the model is unsure: an entropy, or 1 - confidence.
        errors: [batch], True or 1 where the prediction is wrong, or any loss.

    Example:
        >>> curve = risk_coverage(torch.tensor([0.1, 0.9, 0.2, 0.3]), torch.tensor([0, 1, 0, 0]))
        >>> curve.risk, curve.area
        ((0.0, 0.0, 0.0, 0.25), 0.0625)
    """
    _require_numbers(uncertainty=uncertainty, errors=errors)
    _require_shape("uncertainty", uncertainty, (uncertainty.numel(),))
    _require_shape("errors", errors, tuple(uncertainty.shape))
    _, place, count = torch.unique(uncertainty.cpu(), return_inverse=True, return_counts=True)
    shared = torch.zeros(len(count), dtype=torch.float64).index_add(0, place, errors.cpu().double()) / count
    k = torch.arange(1, len(place) + 1, dtype=torch.float64)
    risk = shared.repeat_interleave(count).cumsum(0) / k
    return RiskCoverage(tuple((k / len(place)).tolist()), tuple(risk.tolist()))


def crps(samples: Tensor, targets: Tensor) -> float:
    """Continuous ranked probability score of samples, mean over the batch, in the unit of the targets.

    Mean of |sample - target| less half the mean of |sample - other sample| over all n^2 pairs (Gneiting and Raftery
    2007): the score of the empirical distribution, by torchmetrics. It is larger than that of the distribution behind
    the samples, by about 1 / n of the latter term: compare models at the same n.

    Args:
        samples: [n, batch, ...], n >= 2.
        targets: [batch, ...].

    Example:
        >>> crps(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]))
        0.5
    """
    _require_numbers(samples=samples, targets=targets)
    if samples.ndim < 2 or len(samples) < 2:
        raise InputError(f"samples has the shape {tuple(samples.shape)}: give [n, batch, ...] with n of at least 2")
    _require_shape("targets", targets, tuple(samples.shape[1:]))
    score = _torchmetrics("regression", "continuous_ranked_probability_score")
    dtype = torch.float64 if torch.float64 in (samples.dtype, targets.dtype) else torch.float32
    rows, truth = samples.flatten(1).T.to(dtype), targets.flatten().to(dtype)
    step = max(1, 2**24 // len(samples) ** 2)  # torchmetrics holds all pairs of samples: so they are 64 MB at a time
    places = [slice(i, i + step) for i in range(0, len(truth), step)]
    return sum(score(rows[some], truth[some]).item() * len(truth[some]) for some in places) / len(truth)


def coverage(lower: Tensor, upper: Tensor, targets: Tensor) -> float:
    """Share of the targets inside their interval, ends included, 0 to 1; it should be 0.9 for 90 % intervals.

    Wide intervals cover as well: look at their width too, or at `crps`.

    Args:
        lower: any shape, in any unit.
        upper, targets: of the same shape and unit; no upper end is below its lower one.

    Example:
        >>> coverage(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0]))
        0.5
    """
    _require_numbers(lower=lower, upper=upper, targets=targets)
    _require_shape("upper", upper, tuple(lower.shape))
    _require_shape("targets", targets, tuple(lower.shape))
    if (lower > upper).any():
        raise InputError("lower is above upper in places: give the lower ends first")
    return ((lower <= targets) & (targets <= upper)).cpu().double().mean().item()


def _checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both, the former in at least single precision; raises where they are no probabilities and labels."""
    _require_numbers(probabilities=probabilities, labels=labels)
    shape = tuple(probabilities.shape)
    if not probabilities.is_floating_point():
        raise InputTypeError(f"probabilities are of the type {probabilities.dtype}: give softmax(logits, -1)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputTypeError(f"labels are of the type {labels.dtype}: give the numbers of the classes, labels.long()")
    if len(shape) != 2 or shape[1] < 2:
        remedy = "give [batch, classes]; of p, the probability of one of two classes, torch.stack([1 - p, p], -1)"
        raise InputError(f"probabilities have the shape {shape}: {remedy}")
    _require_shape("labels", labels, shape[:1])
    rows = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    gaps = (rows.sum(1) - 1).abs()
    if (rows < 0).any() or (gaps > max(1e-4, torch.finfo(probabilities.dtype).eps)).any():
        raise InputError("probabilities are negative, or a row does not sum to one: give softmax(logits, -1)")
    if labels.min() < 0 or labels.max() >= shape[1]:
        remedy = (
            f"they count from 0, and there are {shape[1]} classes; leave out examples without a class, such as -100"
        )
        raise InputError(f"labels go from {labels.min()} to {labels.max()}: {remedy}")
    return rows, labels.to(rows.device, torch.long)


def _require_numbers(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputTypeError(f"{name} is of the type {type(value).__name__}: give torch.as_tensor({name})")
        if not value.numel():
            raise InputError(f"{name} has the shape {tuple(value.shape)}, which is empty: give data")
        if value.isnan().any():
            raise InputError(f"{name} holds {int(value.isnan().sum())} NaN: repair their source, or leave them out")


def _require_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InputError(f"{name} has the shape {tuple(value.shape)}, but {shape} is what fits: reshape or select it")


def _require_bins(bins: int) -> None:
    checks.whole("bins", bins, 1, "a whole number of bins, such as 15")


def _torchmetrics(part: str, name: str) -> Callable[..., Tensor]:
    """A function of torchmetrics, which takes a second to import: only where it is used."""
    try:
        found: Callable[..., Tensor] = getattr(import_module(f"torchmetrics.functional.{part}"), name)
    except (ImportError, AttributeError) as missing:
        raise InputError('this needs torchmetrics 1.8 or newer: pip install "secateur[metrics]"') from missing
    return found
