"""What follows from samples of a model: mean, spread, and how much of it more training data would remove.

`secateur.dropout.sample` returns a `Prediction`; samples of an ensemble, or of another library, make one as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from secateur.errors import InputError, InputTypeError
from secateur.support import checks
from secateur.support.tables import Printed, Table, counted

__all__ = ["Prediction"]


@dataclass(frozen=True, eq=False)
class Prediction(Printed):
    """Samples of a model's output, and what follows from them; `str()` is a table of the first rows.

    Everything is computed in float32, in float64 where the samples are float64. NaN in a sample stays NaN.

    Classes lie along the last dimension, [n, batch, ..., classes]. Samples are taken as logits (log-probabilities will
    do) unless every row is non-negative and sums to one, within 1e-4 or the precision of a shorter dtype: then they
    are probabilities. For classes in another dimension, as in segmentation: `Prediction(samples.movedim(2, -1))`.

    Attributes:
        samples: [n, batch, ...], floating-point, n >= 2.
        noise: [n, batch, ...], variances that the model itself predicts with each sample (regression), or None.

    Raises:
        InputError: fewer than 2 samples, no batch, noise that is negative or of another shape.
        InputTypeError: no floating-point tensor.

    Example:
        >>> p = Prediction(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]], [[0.8, 0.2]]]))
        >>> p.probabilities
        tensor([[0.6000, 0.4000]])
        >>> p.entropy, p.mutual_information
        (tensor([0.6730]), tensor([0.2895]))
    """

    samples: Tensor
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        _require_floating("samples", self.samples)
        shape = tuple(self.samples.shape)
        if len(shape) < 2:
            raise InputError(
                f"samples has the shape {shape}: give [n, batch, ...]; of a single output, samples.unsqueeze(1)"
            )
        if self.n < 2:
            raise InputError(f"there are {self.n} samples, and a spread needs at least 2: raise n; 50 is a good start")
        if self.noise is None:
            return
        _require_floating("noise", self.noise)
        if self.noise.shape != self.samples.shape:
            raise InputError(
                f"noise has the shape {tuple(self.noise.shape)}, samples {shape}: give one variance for each value"
            )
        if (self.noise < 0).any():
            raise InputError(
                f"noise holds {self.noise.min():.3g}, and no variance is negative: if the model predicts the logarithm "
                "of a variance, give its exp()"
            )

    @property
    def n(self) -> int:
        """How many samples there are."""
        return self.samples.shape[0]

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, [batch, ...], in the unit of the output."""
        return _single(self.samples).mean(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the samples (divisor n - 1), [batch, ...], in the unit of the output."""
        return _single(self.samples).std(0)

    @property
    def std_error(self) -> Tensor:
        """Standard error of `std`, [batch, ...], in the unit of the output: how much `std` varies from n samples to
        others.

        For near-normal samples about `std / sqrt(2 (n - 1))`: 24 % of it at n = 10, 10 % at 50, 5 % at 200. With heavy
        tails the error is larger, and for small n this estimate of it is too small. By the jackknife (Efron and Stein
        1981), as the sample's fourth moment makes it 29 % too small at n = 10, even for normal samples. Infinite for n
        = 2.
        """
        if self.n == 2:
            return torch.full_like(self.mean, math.inf)
        deviations = _single(self.samples) - self.mean
        squares, n = deviations.square(), self.n
        left_out = (squares.sum(0) - squares * (n / (n - 1))).clamp(min=0).div(n - 2).sqrt()  # std without each sample
        return left_out.std(0, correction=0) * math.sqrt(n - 1)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval that a further sample lies in with probability `level`.

        Quantile q of n samples stands at the place q (n + 1) of the sorted ones, interpolated linearly (numpy's
        "weibull"): so a further sample lies inside with probability `level` whatever the distribution, and not just
        as n grows. Smallest and largest of n samples enclose (n - 1) / (n + 1): no interval of a higher level exists,
        and 0.9 takes at least 19 samples, 0.95 takes 39.

        It is an interval of `samples`: the noise of the data, `noise` included, is not in it.

        Args:
            level: probability of the interval, 0 < level < 1.

        Returns:
            Two tensors [batch, ...], in the unit of the output.

        Raises:
            InputError: a level outside (0, 1), or too few samples for it.

        Example:
            >>> lower, upper = Prediction(torch.arange(1.0, 100.0).view(99, 1)).interval(0.9)
            >>> lower, upper
            (tensor([5.]), tensor([95.]))
        """
        checks.number("level", level, "a probability between 0 and 1, such as 0.9 for 90 %")
        if not 0 < level < 1:
            raise InputError(f"level is {level}: give a probability between 0 and 1, such as 0.9 for 90 %")
        needed = math.ceil((1 + level) / (1 - level) - 1e-9)
        if self.n < needed:
            raise InputError(
                f"{self.n} samples have no interval of level {level}: smallest and largest enclose a further one with "
                f"probability {(self.n - 1) / (self.n + 1):.2f}; take at least {needed} samples, or a lower level"
            )
        ordered = _single(self.samples).sort(0).values  # torch.quantile knows no such place, and has a limit of size
        ordered = torch.where(ordered[-1].isnan(), math.nan, ordered)  # which a sort puts last
        place = max((1 - level) / 2 * (self.n + 1) - 1, 0.0)
        below, part = int(place), place - int(place)
        lower = torch.lerp(ordered[below], ordered[below + 1], part)
        return lower, torch.lerp(ordered[-1 - below], ordered[-2 - below], part)

    @property
    def probabilities(self) -> Tensor:
        """Predictive probabilities [batch, ..., classes]: the mean over the samples of their softmax."""
        return self._class_probabilities().mean(0)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the predictive probabilities in nats, [batch, ...], 0 to log(classes): the whole uncertainty."""
        return _entropy(self.probabilities)

    @property
    def mutual_information(self) -> Tensor:
        """Mutual information of label and model, in nats, [batch, ...], 0 to log(classes): how much samples disagree.

        `entropy` less the mean entropy of the samples: BALD (Houlsby 2011; Gal 2017).
        """
        each = self._class_probabilities()
        return (_entropy(each.mean(0)) - _entropy(each).mean(0)).clamp(min=0)  # rounding can leave -1e-8

    @property
    def variation_ratio(self) -> Tensor:
        """Share of samples that are not of the most frequent class, [batch, ...], from 0, below 1 (Freeman 1965)."""
        each = self._class_probabilities()
        votes = each.argmax(-1)
        return (votes != votes.mode(0).values).to(each.dtype).mean(0)

    @property
    def aleatoric(self) -> Tensor:
        """Uncertainty that more training data would not remove, [batch, ...].

        With `noise`, its mean, in the squared unit of the output (Kendall and Gal 2017, eq. 9); otherwise the mean
        entropy of the samples' classes, in nats (Depeweg 2018).
        """
        if self.noise is not None:
            return _single(self.noise).mean(0)
        return _entropy(self._class_probabilities()).mean(0)

    @property
    def epistemic(self) -> Tensor:
        """Uncertainty about the model, which more training data would remove, [batch, ...].

        With `noise`, the variance of the samples (divisor n, so that the sum with `aleatoric` is the variance of the
        mixture), in the squared unit of the output (Kendall and Gal 2017, eq. 9); otherwise `mutual_information`.
        """
        if self.noise is not None:
            return _single(self.samples).var(0, correction=0)
        return self.mutual_information

    @property
    def total(self) -> Tensor:
        """Whole uncertainty, `aleatoric + epistemic`, [batch, ...]: predictive variance, or `entropy`."""
        return self.aleatoric + self.epistemic if self.noise is not None else self.entropy

    def table(self, rows: int = 8) -> Table:
        """Show the first rows: the most probable class where the last of three or more dimensions is larger than 1.

        Otherwise, and where there is `noise`, each value of the output. The std carries its standard error.
        """
        shape: tuple[int, ...] = tuple(self.samples.shape[1:])
        if self._has_classes:
            shape = shape[:-1]
            shown = Prediction(self._class_probabilities().flatten(1, -2)[:, :rows])
            top = shown.probabilities.argmax(-1)
            best = Prediction(shown.samples.gather(-1, top.expand(self.n, -1).unsqueeze(-1)).squeeze(-1))
            columns = {"class": _words(top, "d"), "probability": _words(best.mean), "std": _plus_minus(best)}
            columns |= {"entropy": _words(shown.entropy), "mutual information": _words(shown.mutual_information)}
            notes = ["std: of the probability; entropy and mutual information in nats"]
        else:
            noise = None if self.noise is None else self.noise.flatten(1)[:, :rows]
            shown = Prediction(self.samples.flatten(1)[:, :rows], noise)
            columns, notes = {"mean": _words(shown.mean), "std": _plus_minus(shown)}, []
            if noise is not None:
                columns |= {"aleatoric": _words(shown.aleatoric), "epistemic": _words(shown.epistemic)}
                notes = ["aleatoric and epistemic: variances"]
        labels = [", ".join(map(str, place)) for place in islice(product(*map(range, shape)), rows)]
        if math.prod(shape) > len(labels):
            notes.append(f"the first {len(labels)} of {math.prod(shape)} rows")
        lines = [list(cells) for cells in zip(labels, *columns.values(), strict=True)]
        return Table(["", *columns], lines, counted(self.n, "sample"), notes)

    def to_dict(self) -> dict[str, Any]:
        """What follows from the samples, without the samples, as plain data for JSON."""
        names = ["mean", "std", "std_error"]
        if self._has_classes:
            names += ["probabilities", "entropy", "mutual_information", "variation_ratio"]
        if self._has_classes or self.noise is not None:
            names += ["aleatoric", "epistemic"]
        return {"n": self.n, **{name: getattr(self, name).tolist() for name in names}}

    @property
    def _has_classes(self) -> bool:
        return self.noise is None and self.samples.ndim > 2 and self.samples.shape[-1] > 1

    def _class_probabilities(self) -> Tensor:
        """Each sample's probabilities, [n, batch, ..., classes]."""
        shape = tuple(self.samples.shape)
        if self.noise is not None:
            raise InputError(
                "noise is given, so the samples are values, not classes: use std, aleatoric and epistemic; "
                "for classes, Prediction(samples) without noise"
            )
        if not self._has_classes:
            raise InputError(
                f"samples of shape {shape} have no classes, which lie along the last of [n, batch, ..., classes]: "
                "for regression use std and interval; for one logit of two classes, "
                "Prediction(torch.nn.functional.pad(samples, (1, 0))); for an input without batch, samples.unsqueeze(1)"
            )
        values = _single(self.samples)
        sums = values.sum(-1, keepdim=True)
        close = max(1e-4, torch.finfo(self.samples.dtype).eps)
        if bool((values >= 0).all()) and bool(((sums - 1).abs() <= close).all()):
            return values / sums
        return values.softmax(-1)


def _require_floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputTypeError(f"{name} is of the type {found}: give a floating-point tensor, such as {name}.float()")


def _single(x: Tensor) -> Tensor:
    """The tensor in single precision, or double where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy along the last dimension in nats; a probability of zero adds nothing."""
    parts: Tensor = torch.special.entr(probabilities)
    return parts.sum(-1)


def _words(values: Tensor, form: str = ".4g") -> list[str]:
    return [format(value, form) for value in values.tolist()]


def _plus_minus(prediction: Prediction) -> list[str]:
    pairs = zip(prediction.std.tolist(), prediction.std_error.tolist(), strict=True)
    return [f"{std:.3g} ± {error:.2g}" for std, error in pairs]
