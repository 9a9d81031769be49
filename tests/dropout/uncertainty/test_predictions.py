"""Prediction: closed forms, numpy references, bounds, precision, and errors that say what to do."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.dropout.uncertainty.predictions import Prediction
from secateur.errors import InputError, InputTypeError


def logits(seed, n=7, batch=3, classes=4, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, batch, classes, generator=generator, dtype=torch.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(p > 0, p * np.log(p), 0).sum(-1)


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "n": st.integers(2, 30),
        "batch": st.integers(1, 4),
        "classes": st.integers(2, 12),
        "scale": st.one_of(st.just(0.0), st.floats(0.1, 200)),  # between them, rounding decides which class is first
    }
)


# Moments ------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy():
    x = logits(0)
    p = Prediction(x)
    assert p.n == 7
    np.testing.assert_allclose(p.mean, x.numpy().mean(0))
    np.testing.assert_allclose(p.std, x.numpy().std(0, ddof=1))


def test_std_error_is_the_jackknife():
    x = logits(1)[:, :, 0].numpy()
    without = np.stack([np.delete(x, i, 0).std(0, ddof=1) for i in range(len(x))])
    expected = np.sqrt((len(x) - 1) / len(x) * ((without - without.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(Prediction(torch.from_numpy(x)).std_error, expected, rtol=1e-9)


@pytest.mark.parametrize(("n", "percent"), [(10, 24), (50, 10), (200, 5)])
def test_std_error_of_normal_samples_is_what_a_simulation_finds(n, percent):
    generator = torch.Generator().manual_seed(0)
    p = Prediction(5 + 3 * torch.randn(n, 20_000, generator=generator))
    found = p.std_error.mean().item()
    assert found == pytest.approx(p.std.std().item(), rel=0.03)  # the spread of 20,000 stds that it should predict
    assert found == pytest.approx(3 * percent / 100, rel=0.05)
    assert found == pytest.approx(3 / math.sqrt(2 * (n - 1)), rel=0.03)


def test_std_error_at_the_ends():
    assert Prediction(torch.tensor([[1.0], [2.0]])).std_error.tolist() == [math.inf]
    assert Prediction(torch.full((9, 2), 3.3)).std_error.tolist() == [0, 0]
    one_apart = torch.zeros(9, 200)
    one_apart[0] = torch.rand(200)  # without it no spread is left, which rounding could make negative
    assert Prediction(one_apart).std_error.isfinite().all()


# Intervals ----------------------------------------------------------------------------------------------------


@given(st.integers(19, 60), st.floats(0.05, 0.9), st.integers(0, 1000))
@settings(deadline=None)
def test_interval_is_the_weibull_quantile_of_numpy(n, level, seed):
    x = logits(seed, n=n)
    lower, upper = Prediction(x).interval(level)
    for q, found in (((1 - level) / 2, lower), ((1 + level) / 2, upper)):
        np.testing.assert_allclose(found, np.quantile(x.numpy(), q, axis=0, method="weibull"), atol=1e-9)


@pytest.mark.parametrize(("n", "level"), [(19, 0.9), (50, 0.9), (39, 0.95), (12, 0.5)])
def test_a_further_sample_lies_in_the_interval_as_often_as_the_level_says(n, level):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n + 1, 40_000, generator=generator)
    lower, upper = Prediction(x[:-1]).interval(level)
    assert ((lower <= x[-1]) & (x[-1] <= upper)).float().mean().item() == pytest.approx(level, abs=0.01)


@pytest.mark.parametrize(("level", "needed"), [(0.9, 19), (0.95, 39), (0.99, 199), (0.5, 3), (0.1, 2)])
def test_interval_takes_enough_samples(level, needed):
    x = torch.randn(needed, 5)
    lower, upper = Prediction(x).interval(level)
    if needed > 2:  # the widest that there is
        torch.testing.assert_close((lower, upper), (x.min(0).values, x.max(0).values))
        with pytest.raises(InputError, match=f"at least {needed} samples"):
            Prediction(x[:-1]).interval(level)


@pytest.mark.parametrize("level", [0, 1, 90, -0.1, math.nan])
def test_interval_refuses_other_levels(level):
    with pytest.raises(InputError, match=r"such as 0\.9 for 90 %"):
        Prediction(torch.randn(30, 2)).interval(level)


def test_nan_stays_nan():
    x = torch.randn(30, 2, 3)
    x[4, 1, 2] = math.nan
    p = Prediction(x)
    lower, upper = p.interval()
    for found in (p.mean, p.std, p.std_error, lower, upper):
        assert found.isnan().sum() == found[1, 2].isnan() == 1
    for found in (p.entropy, p.mutual_information, p.aleatoric):
        assert found.isnan().tolist() == [False, True]


# Classes ------------------------------------------------------------------------------------------------------


@given(shapes)
@settings(deadline=None)
def test_classification_agrees_with_numpy(shape):
    x = logits(**shape)
    p, each = Prediction(x), softmax(x.numpy())
    expected = entropy(each.mean(0))
    np.testing.assert_allclose(p.probabilities, each.mean(0), atol=1e-12)
    np.testing.assert_allclose(p.entropy, expected, atol=1e-12)
    np.testing.assert_allclose(p.aleatoric, entropy(each).mean(0), atol=1e-12)
    np.testing.assert_allclose(p.mutual_information, expected - entropy(each).mean(0), atol=1e-12)
    votes = np.array([np.bincount(of_one).max() for of_one in x.numpy().argmax(-1).T])
    np.testing.assert_allclose(p.variation_ratio, 1 - votes / shape["n"], atol=1e-12)


@given(shapes, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@settings(deadline=None)
def test_bounds_and_the_sum_hold_in_every_dtype(shape, dtype):
    x = logits(**shape).to(dtype)
    most = math.log(shape["classes"]) + 1e-5
    for p in (Prediction(x), Prediction(x.softmax(-1))):
        assert ((p.mutual_information >= 0) & (p.mutual_information <= most)).all()
        assert ((p.entropy >= 0) & (p.entropy <= most)).all()
        assert ((p.variation_ratio >= 0) & (p.variation_ratio < 1)).all()
        torch.testing.assert_close(p.epistemic + p.aleatoric, p.total, atol=1e-5, rtol=0)
        torch.testing.assert_close(p.probabilities.sum(-1), torch.ones_like(p.entropy))


def test_samples_that_agree_tell_nothing_and_opposite_ones_a_bit():
    same = Prediction(logits(0, n=1).expand(5, -1, -1))
    assert same.mutual_information.max() < 1e-12
    assert same.variation_ratio.tolist() == [0, 0, 0]
    opposite = Prediction(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))  # sure, but of different things
    assert opposite.mutual_information.item() == pytest.approx(math.log(2))
    assert opposite.aleatoric.item() == 0
    assert opposite.variation_ratio.item() == 0.5
    fair = Prediction(torch.full((4, 1, 2), 0.5))  # of one mind: it is a coin
    assert fair.mutual_information.item() == 0
    assert fair.aleatoric.item() == pytest.approx(math.log(2))


def test_classes_lie_along_the_last_of_any_number_of_dimensions():
    x = torch.randn(5, 2, 3, 6, 4)
    p = Prediction(x)
    assert p.probabilities.shape == (2, 3, 6, 4)
    for found in (p.entropy, p.mutual_information, p.variation_ratio, p.aleatoric, p.epistemic, p.total):
        assert found.shape == (2, 3, 6)
    torch.testing.assert_close(p.entropy[1, 2, 3], Prediction(x[:, 1, 2, 3:4]).entropy[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_log_probabilities_and_probabilities_are_one(dtype):
    x = logits(3, classes=10)
    expected = x.softmax(-1).mean(0)
    near = 1e-6 if dtype in (torch.float64, torch.float32) else 0.02
    for given_ in (x, x.log_softmax(-1), x.softmax(-1)):
        found = Prediction(given_.to(dtype)).probabilities
        torch.testing.assert_close(found.double(), expected, atol=near, rtol=0)


def test_one_row_that_does_not_sum_to_one_makes_logits_of_all():
    x = torch.full((3, 2, 2), 0.5)
    x[1, 1] = torch.tensor([0.5, 0.6])
    torch.testing.assert_close(Prediction(x).probabilities, x.softmax(-1).mean(0))
    x[1, 1] = torch.tensor([-0.5, 1.5])
    torch.testing.assert_close(Prediction(x).probabilities, x.softmax(-1).mean(0))


def test_huge_and_missing_logits():
    p = Prediction(torch.tensor([[[1e5, -1e5, -math.inf]], [[1e5, 1e5, -math.inf]]]))
    assert p.probabilities.tolist() == [[0.75, 0.25, 0]]
    assert p.entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert p.aleatoric.item() == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    x = torch.randn(40, 3, 5).to(dtype)
    low, high = Prediction(x), Prediction(x.float())
    for name in ("mean", "std", "std_error", "entropy", "mutual_information", "variation_ratio"):
        assert getattr(low, name).dtype == torch.float32
        torch.testing.assert_close(getattr(low, name), getattr(high, name))
    assert low.interval()[0].dtype == torch.float32


# Regression with noise ----------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(2, 20))
@settings(deadline=None, max_examples=30)
def test_total_is_the_variance_of_the_mixture(seed, n):
    x = logits(seed, n=n)
    noise = logits(seed + 1, n=n).square()
    p = Prediction(x, noise)
    second = (x.square() + noise).mean(0)  # of a mixture of normals with these means and variances
    torch.testing.assert_close(p.total, second - x.mean(0).square())
    torch.testing.assert_close(p.epistemic + p.aleatoric, p.total)
    torch.testing.assert_close(p.aleatoric, noise.mean(0))
    torch.testing.assert_close(p.epistemic, x.var(0, correction=0))


# Tables and dictionaries --------------------------------------------------------------------------------------


def test_table_of_classes():
    p = Prediction(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]], [[0.8, 0.2]]]))
    head, _, row, note = str(p).splitlines()[1:]
    assert head.split() == ["class", "probability", "std", "entropy", "mutual", "information"]
    error = Prediction(torch.tensor([[0.9], [0.1], [0.8]])).std_error.item()
    assert row.split() == ["0", "0", "0.6", "0.436", "±", f"{error:.2g}", "0.673", "0.2895"]
    assert "nats" in note


def test_table_of_values_shows_the_first_rows_and_says_so():
    text = str(Prediction(torch.randn(4, 3, 5), torch.rand(4, 3, 5)))
    assert "aleatoric" in text
    assert "\n1, 2 " in text
    assert "\n1, 3 " not in text
    assert text.endswith("the first 8 of 15 rows")
    assert "± inf" in str(Prediction(torch.randn(2, 3)))
    assert len(Prediction(torch.randn(4, 3)).table(rows=2).rows) == 2


@pytest.mark.parametrize(
    ("p", "names"),
    [
        (Prediction(torch.randn(4, 3)), set()),
        (Prediction(torch.randn(4, 3), torch.rand(4, 3)), {"aleatoric", "epistemic"}),
        (
            Prediction(torch.randn(4, 3, 2)),
            {"probabilities", "entropy", "mutual_information", "variation_ratio", "aleatoric", "epistemic"},
        ),
    ],
    ids=["values", "noise", "classes"],
)
def test_to_dict_is_plain_data(p, names):
    data = json.loads(json.dumps(p.to_dict()))
    assert set(data) == {"n", "mean", "std", "std_error"} | names
    torch.testing.assert_close(torch.tensor(data["std"]), p.std)
    for name in names:
        torch.testing.assert_close(torch.tensor(data[name]), getattr(p, name))


# Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [torch.ones(3, 2, dtype=torch.int64), [[1.0], [2.0]], torch.ones(3, 2).bool()])
def test_samples_must_be_floating(samples):
    with pytest.raises(InputTypeError, match=r"give a floating-point tensor, such as samples\.float"):
        Prediction(samples)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Prediction(torch.ones(1, 2)), "raise n"),
        (lambda: Prediction(torch.ones(5)), r"samples\.unsqueeze"),
        (lambda: Prediction(torch.ones(5, 2), torch.ones(5, 1)), "one variance for each value"),
        (lambda: Prediction(torch.ones(5, 2), -torch.ones(5, 2)), r"give its exp\(\)"),
        (lambda: Prediction(torch.ones(5, 2, 1)).entropy, "for regression use std"),
        (lambda: Prediction(torch.ones(5, 2, 1)).epistemic, "for regression use std"),
        (lambda: Prediction(torch.ones(5, 2)).mutual_information, r"samples\.unsqueeze"),
        (lambda: Prediction(torch.ones(5, 2, 3), torch.ones(5, 2, 3)).entropy, "without noise"),
    ],
)
def test_errors_say_what_to_do(make, remedy):
    with pytest.raises(InputError, match=remedy):
        make()


def test_noise_must_be_floating():
    with pytest.raises(InputTypeError, match=r"noise\.float"):
        Prediction(torch.ones(5, 2), torch.ones(5, 2, dtype=torch.int32))


def test_the_remedy_for_a_single_logit_works():
    x = torch.randn(6, 3, 1)
    found = Prediction(torch.nn.functional.pad(x, (1, 0))).probabilities
    torch.testing.assert_close(found[..., 1:], x.sigmoid().mean(0))
