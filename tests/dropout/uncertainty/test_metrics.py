"""The metrics against a few lines of numpy, closed forms, simulations with a known answer, and their errors."""

import importlib
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.dropout.uncertainty.metrics import (
    adaptive_ece,
    brier,
    calibration_curve,
    coverage,
    crps,
    ece,
    nll,
    risk_coverage,
)
from secateur.errors import InputError, InputTypeError

SCORES = (nll, brier, ece, adaptive_ece, calibration_curve)


def batch(seed, size=40, classes=4, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = (scale * torch.randn(size, classes, generator=generator, dtype=dtype)).softmax(-1)
    return rows, torch.randint(classes, (size,), generator=generator)


def calibrated(size, classes=3, seed=0):
    """Labels drawn from the very probabilities: a perfect model."""
    generator = torch.Generator().manual_seed(seed)
    rows = (2 * torch.randn(size, classes, generator=generator)).softmax(-1)
    return rows, torch.multinomial(rows, 1, generator=generator).squeeze(1)


def gap(confidence, right, groups):
    """Calibration error over groups of indices, by the definition."""
    return sum(len(g) / len(right) * abs(confidence[g].mean() - right[g].mean()) for g in groups if len(g))


def ece_reference(rows, labels, bins):
    confidence, right = rows.max(1), (rows.argmax(1) == labels).astype(float)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return gap(confidence, right, [np.flatnonzero(place == i) for i in range(bins)])


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "size": st.integers(1, 60),
        "classes": st.integers(2, 8),
        "scale": st.floats(0.1, 30),
    }
)


# Scores of probabilities --------------------------------------------------------------------------------------


@given(cases)
@settings(deadline=None)
def test_nll_and_brier_by_the_definition(case):
    rows, labels = batch(**case)
    p, y = rows.numpy(), labels.numpy()
    assert nll(rows, labels) == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean())
    assert brier(rows, labels) == pytest.approx(((p - np.eye(case["classes"])[y]) ** 2).sum(1).mean())


def test_scores_at_the_ends():
    sure, labels = torch.eye(3), torch.arange(3)
    assert nll(sure, labels) == brier(sure, labels) == 0
    assert ece(sure, labels) == pytest.approx(0, abs=1e-6)
    wrong = labels.roll(1)
    assert nll(sure, wrong) == math.inf
    assert brier(sure, wrong) == 2
    assert ece(sure, wrong) == pytest.approx(1)
    flat = torch.full((3, 3), 1 / 3)
    assert nll(flat, labels) == pytest.approx(math.log(3))
    assert brier(flat, labels) == pytest.approx(2 / 3)


@pytest.mark.parametrize("score", [nll, brier])
def test_proper_scores_are_best_for_the_true_probabilities(score):
    rows, labels = calibrated(20_000)
    best = score(rows, labels)
    for power in (0.5, 0.8, 1.25, 2):
        other = rows**power
        assert score(other / other.sum(1, keepdim=True), labels) > best


# Calibration --------------------------------------------------------------------------------------------------


@given(cases, st.integers(1, 20))
@settings(deadline=None)
def test_ece_by_the_definition_and_as_its_curve(case, bins):
    rows, labels = batch(**case, dtype=torch.float32)
    expected = ece_reference(rows.double().numpy(), labels.numpy(), bins)
    curve = calibration_curve(rows, labels, bins=bins)
    assert ece(rows, labels, bins=bins) == pytest.approx(curve.error, abs=1e-5)
    assert curve.error == pytest.approx(expected, abs=1e-6)
    assert sum(curve.count) == len(labels)
    assert list(curve.confidence) == sorted(curve.confidence)


@given(cases, st.integers(1, 12))
@settings(deadline=None)
def test_adaptive_ece_by_the_definition(case, bins):
    rows, labels = batch(**{**case, "scale": min(case["scale"], 3)})  # so that no two confidences are the same
    bins = min(bins, len(labels))
    p, y = rows.numpy(), labels.numpy()
    order = np.argsort(p.max(1))
    starts = [i * len(y) // bins for i in range(bins + 1)]
    groups = [order[a:b] for a, b in pairwise(starts)]
    expected = gap(p.max(1), (p.argmax(1) == y).astype(float), groups)
    assert adaptive_ece(rows, labels, bins=bins) == pytest.approx(expected)
    counts = calibration_curve(rows, labels, bins=bins, adaptive=True).count
    assert len(counts) == bins
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("error", [ece, adaptive_ece])
def test_calibration_errors_of_a_perfect_and_an_overconfident_model(error):
    rows, labels = calibrated(50_000)
    assert error(rows, labels) < 0.01
    assert error(rows[:60], labels[:60]) > 0.03  # few data: the bias that the docstring speaks of
    sharper = rows**3
    assert error(sharper / sharper.sum(1, keepdim=True), labels) > 0.1


def test_a_confidence_of_one_or_a_little_more_is_in_the_last_bin():
    rows = torch.tensor([[1.0, 0.0], [0.95, 0.05], [1.00001, 0.0]])
    labels = torch.tensor([0, 1, 0])
    expected = abs((1 + 0.95 + 1.00001) / 3 - 2 / 3)
    assert ece(rows, labels, bins=10) == pytest.approx(expected, abs=1e-5)
    curve = calibration_curve(rows, labels, bins=10)
    assert curve.count == (3,)
    assert curve.error == pytest.approx(expected, abs=1e-5)


def test_equal_confidences_share_a_bin_so_order_does_not_matter():
    rows = torch.tensor([[0.8, 0.2]]).repeat(10, 1)
    for labels in (torch.tensor([0] * 8 + [1] * 2), torch.tensor([1] * 2 + [0] * 8)):
        assert adaptive_ece(rows, labels, bins=5) == pytest.approx(0, abs=1e-6)
        assert calibration_curve(rows, labels, bins=5, adaptive=True).count == (10,)


def test_calibration_table():
    rows = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]])
    curve = calibration_curve(rows, torch.tensor([0, 1, 1]))
    assert (curve.confidence, curve.accuracy, curve.count) == ((0.75, 1.0), (0.5, 1.0), (2, 1))
    assert str(curve) == curve.table().text()
    assert "mean gap: 0.1667" in str(curve)


# Risk and coverage --------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 1000))
@settings(deadline=None)
def test_risk_coverage_by_the_definition(size, seed):
    generator = np.random.default_rng(seed)
    unsure, errors = generator.permutation(size) / size, generator.random(size)
    curve = risk_coverage(torch.from_numpy(unsure), torch.from_numpy(errors))
    order = np.argsort(unsure)
    risk = [errors[order[:k]].mean() for k in range(1, size + 1)]
    np.testing.assert_allclose(curve.risk, risk)
    np.testing.assert_allclose(curve.coverage, np.arange(1, size + 1) / size)
    assert curve.area == pytest.approx(np.mean(risk))


@given(st.integers(1, 200), st.data())
@settings(deadline=None)
def test_area_of_the_best_and_the_worst_order(size, data):
    wrong = data.draw(st.integers(0, size))
    errors = torch.arange(size) >= size - wrong  # the last ones
    right = size - wrong
    best = sum((k - right) / k for k in range(right + 1, size + 1)) / size  # no error until only errors are left
    worst = sum(min(k, wrong) / k for k in range(1, size + 1)) / size
    assert risk_coverage(torch.arange(size), errors).area == pytest.approx(best)
    assert risk_coverage(-torch.arange(size), errors).area == pytest.approx(worst)


def test_area_of_the_best_order_is_near_the_formula():
    errors = torch.arange(10_000) >= 8_000
    r = 0.2
    area = risk_coverage(torch.arange(10_000), errors).area
    assert area == pytest.approx(r + (1 - r) * math.log(1 - r), abs=1e-4)  # Geifman 2019, as the batch grows


def test_ties_share_their_error_whatever_the_order():
    unsure = torch.tensor([0.5, 0.5, 0.5, 0.1])
    for errors in ([1, 0, 0, 0], [0, 0, 1, 0]):
        assert risk_coverage(unsure, torch.tensor(errors)).risk == pytest.approx((0, 1 / 6, 2 / 9, 1 / 4))
    assert risk_coverage(torch.zeros(50), torch.arange(50) % 5 == 0).area == pytest.approx(0.2)


# Samples and intervals ----------------------------------------------------------------------------------------


@given(st.integers(2, 25), st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_crps_by_the_definition(n, size, seed):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(n, size)), generator.normal(size=size)
    pairs = np.abs(x[:, None] - x[None]).mean((0, 1))
    expected = (np.abs(x - y).mean(0) - pairs / 2).mean()
    assert crps(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, abs=1e-12)


def test_crps_is_the_integral_of_the_squared_difference_of_distribution_functions():
    x = np.array([0.3, -1.2, 0.9, 2.0])
    grid = (np.arange(-50_000, 50_000) + 0.5) / 1e4
    step = (x[:, None] <= grid).mean(0) - (grid >= 0.5)
    expected = (step**2).sum() / 1e4
    assert crps(torch.tensor(x)[:, None], torch.tensor([0.5], dtype=torch.float64)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("target", [0.0, 0.7, -2.0])
def test_crps_of_a_gaussian_is_its_integral(target):
    grid = torch.arange(-10, 10, 1e-3, dtype=torch.float64)
    expected = (torch.special.ndtr(grid) - (grid >= target).double()).square().sum().item() / 1e3
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    samples = torch.special.ndtri(quantiles)[:, None]  # as even as samples can be
    assert crps(samples, torch.tensor([target])) == pytest.approx(expected, abs=1e-3)


def test_crps_of_few_samples_is_larger_by_what_the_docstring_says():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 20_000, generator=generator), torch.randn(20_000, generator=generator)
    true = 1 / math.sqrt(math.pi)  # of the normal distribution, on average
    assert crps(x, y) == pytest.approx(true + 1 / math.sqrt(math.pi) / 10, rel=0.02)


def test_crps_in_parts_is_crps_at_once():
    x, y = torch.randn(3000, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)  # a part holds one
    mean = sum(crps(x[:, i : i + 1], y[i : i + 1]) for i in range(5)) / 5
    assert crps(x, y) == pytest.approx(mean)
    assert crps(x.view(3000, 5, 1), y.view(5, 1)) == pytest.approx(mean)


def test_coverage_counts_what_is_inside():
    lower, upper = torch.zeros(2, 2), torch.ones(2, 2)
    assert coverage(lower, upper, torch.tensor([[0.0, 1.0], [-0.1, 0.5]])) == 0.75


# Precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken(dtype):
    rows, labels = batch(0, classes=10)
    for score in (nll, brier):
        assert score(rows.to(dtype), labels) == pytest.approx(score(rows, labels), abs=0.02)
    for score in (ece, adaptive_ece):  # in one bin, as rounding moves confidences over an edge
        assert score(rows.to(dtype), labels, bins=1) == pytest.approx(score(rows, labels, bins=1), abs=0.02)
    x, y = torch.randn(20, 5), torch.randn(5)
    assert crps(x.to(dtype), y.to(dtype)) == pytest.approx(crps(x, y), abs=0.02)


# Errors -------------------------------------------------------------------------------------------------------

GOOD, LABELS = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([0, 1])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("rows", "labels", "error", "remedy"),
    [
        (torch.randn(2, 2) * 5, LABELS, InputError, r"softmax\(logits, -1\)"),
        (torch.tensor([[-0.5, 1.5], [0.5, 0.5]]), LABELS, InputError, r"softmax\(logits, -1\)"),
        (torch.tensor([[0.5, 0.501], [0.5, 0.5]]), LABELS, InputError, r"softmax\(logits, -1\)"),
        (torch.tensor([[math.nan, 0.5], [0.5, 0.5]]), LABELS, InputError, "1 NaN"),
        (torch.tensor([[1, 0], [0, 1]]), LABELS, InputTypeError, "softmax"),
        (torch.zeros(0, 2), LABELS[:0], InputError, "give data"),
        (GOOD[0], LABELS, InputError, r"give \[batch, classes\]"),
        (torch.ones(2, 1), LABELS, InputError, r"torch\.stack"),
        (GOOD, LABELS[:1], InputError, r"\(2,\) is what fits"),
        (GOOD, GOOD, InputTypeError, r"labels\.long"),
        (GOOD, LABELS.bool(), InputTypeError, r"labels\.long"),
        (GOOD, LABELS + 1, InputError, "there are 2 classes"),
        (GOOD, torch.tensor([0, -100]), InputError, "leave out"),
        (GOOD.tolist(), LABELS, InputTypeError, r"torch\.as_tensor"),
    ],
)
def test_probabilities_and_labels_are_checked(score, rows, labels, error, remedy):
    with pytest.raises(error, match=remedy):
        score(rows, labels)


@pytest.mark.parametrize("score", [ece, adaptive_ece, calibration_curve])
@pytest.mark.parametrize(("bins", "error"), [(0, InputError), (-1, InputError), (2.5, InputTypeError)])
def test_bins_are_checked(score, bins, error):
    with pytest.raises(error, match="such as 15"):
        score(GOOD, LABELS, bins=bins)


def test_more_bins_than_predictions():
    with pytest.raises(InputError, match="bins of at most 2"):
        adaptive_ece(GOOD, LABELS)


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: crps(torch.ones(1, 3), torch.ones(3)), "n of at least 2"),
        (lambda: crps(torch.ones(5), torch.ones(())), r"give \[n, batch"),
        (lambda: crps(torch.ones(5, 3), torch.ones(2)), r"\(3,\) is what fits"),
        (lambda: crps(torch.ones(5, 3), torch.full((3,), math.nan)), "targets holds 3 NaN"),
        (lambda: coverage(torch.ones(2), torch.zeros(2), torch.zeros(2)), "lower ends first"),
        (lambda: coverage(torch.ones(2), torch.ones(3), torch.zeros(2)), "upper has the shape"),
        (lambda: coverage(torch.ones(2), torch.ones(2), torch.zeros(3)), "targets has the shape"),
        (lambda: coverage(torch.ones(0), torch.ones(0), torch.ones(0)), "give data"),
        (lambda: risk_coverage(torch.ones(2, 2), torch.ones(2, 2)), r"\(4,\) is what fits"),
        (lambda: risk_coverage(torch.ones(2), torch.ones(3)), "errors has the shape"),
        (lambda: risk_coverage(torch.tensor([math.nan]), torch.ones(1)), "uncertainty holds 1 NaN"),
    ],
)
def test_other_tensors_are_checked(call, remedy):
    with pytest.raises(InputError, match=remedy):
        call()


@pytest.mark.parametrize("call", [lambda: ece(GOOD, LABELS), lambda: crps(torch.ones(2, 3), torch.ones(3))])
def test_without_torchmetrics_the_extra_is_named(call, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as if it were not installed
    with pytest.raises(InputError, match=r'pip install "secateur\[metrics\]"') as raised:
        call()
    assert isinstance(raised.value.__cause__, ImportError)
    assert nll(GOOD, LABELS) > 0
    assert adaptive_ece(GOOD, LABELS, bins=1) >= 0


def test_an_old_torchmetrics_is_named_too(monkeypatch):
    place = importlib.import_module("torchmetrics.functional.regression")
    monkeypatch.delattr(place, "continuous_ranked_probability_score")
    with pytest.raises(InputError, match=r"1\.8 or newer"):
        crps(torch.ones(2, 3), torch.ones(3))
