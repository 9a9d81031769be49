"""What an error at a place is measured by: the variance over several batches, of which each may be a single row."""

import pytest
import torch

from secateur.calibration.spreads import Spreads


def noted(rows, sizes, alike=False):
    spreads = Spreads(alike)
    for batch in rows.split(sizes):
        spreads.note("place", batch)
    return spreads.of("place", rows)


@pytest.mark.parametrize("sizes", [1, 7, 32, 100])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_it_is_the_variance_of_all_rows_however_they_came(sizes, size):
    rows = size * (torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(5))
    assert noted(rows, sizes) == pytest.approx(float(rows.double().var(0).mean()), rel=1e-4)


def test_a_constant_weighs_little():
    assert noted(torch.full((20, 4), 3.0), 5) == pytest.approx(0.09)
    assert noted(torch.zeros(20, 4), 5) == 0


def test_of_a_single_row_it_is_the_mean_square():
    assert noted(torch.full((1, 4), 3.0), 1) == pytest.approx(9)


def test_rows_of_other_widths_have_means_of_their_own():
    spreads, rows = (
        Spreads(False),
        torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + 20 * torch.eye(50, 8),
    )
    for cut in (rows, rows[:, :3] + 7, rows[:1, :5]):
        spreads.note("place", cut)
    exact = (49 * 8 * rows.var(0).mean() + 49 * 3 * rows[:, :3].var(0).mean()) / (49 * 11)
    assert spreads.of("place", rows) == pytest.approx(float(exact), rel=1e-4)


def test_what_came_late_is_measured_when_it_comes_and_stays():
    spreads, rows = Spreads(True), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    first = spreads.of("late", rows)
    assert first == pytest.approx(float(rows.var(0).mean()), rel=1e-4)
    assert spreads.of("late", 100 * rows) == first


def test_no_row_tells_nothing():
    spreads, rows = Spreads(True), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for cut in (rows[:0], rows, rows[:0]):
        spreads.note("place", cut)
    assert spreads.of("place", rows) == pytest.approx(float(rows.var(0).mean()), rel=1e-4)
    assert Spreads(True).of("empty", rows[:0]) == 0


@pytest.mark.parametrize(("size", "expected"), [(0.0, 1e-2), (1e-20, 1e-3), (0.1, 1e-2), (10.0, 1e2)])
def test_next_to_nothing_weighs_little_among_places_that_are_alike(size, expected):
    spreads, generator = Spreads(True), torch.Generator().manual_seed(0)
    for place in "abc":
        spreads.note(place, torch.randn(5000, 4, generator=generator))
    rows = size * torch.randn(5000, 4, generator=generator)
    spreads.note("d", rows)
    assert spreads.of("d", rows) == pytest.approx(expected, rel=0.1)


def test_nan_is_not_hidden():
    assert torch.tensor(noted(torch.full((4, 4), float("nan")), 2, alike=True)).isnan()
