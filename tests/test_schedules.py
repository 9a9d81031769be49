"""secateur.schedules: never falling, within 0 and the target, exactly on target at the end."""

import io
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur import schedules
from secateur.errors import InputError, InputTypeError
from secateur.schedules import Schedule

KINDS = ["one_shot", "linear", "cubic", "geometric", "cosine", "gmp_star"]

finals = st.one_of(st.fractions(0, 1, max_denominator=10**6), st.floats(0, 1).map(lambda s: Fraction(str(s))))


@st.composite
def any_schedule(draw, longest=10**4):
    start = draw(st.integers(0, longest))
    stop = start + draw(st.integers(0, longest))
    return Schedule(draw(st.sampled_from(KINDS)), start, stop, draw(st.integers(1, 2 * longest)))


@given(any_schedule(), finals)
@settings(deadline=None, max_examples=200)
def test_exact_at_the_end_and_zero_before_the_start(schedule, final):
    for step in (schedule.stop, schedule.stop + 1, 10**9):
        assert schedule.sparsity(step, final) == final
    if schedule.start:
        assert schedule.sparsity(schedule.start - 1, final) == 0
        assert schedule.sparsity(0, final) == 0


@given(any_schedule(), finals, st.lists(st.integers(0, 3 * 10**4), min_size=2, max_size=20))
@example(Schedule("geometric", 0, 4), Fraction("2.220446049250313e-16"), [0, 3])  # rounds to 2**-52, which is more
@settings(deadline=None, max_examples=300)
def test_within_zero_and_the_target_and_never_falling(schedule, final, steps):
    steps = sorted([*steps, schedule.start, max(schedule.stop - 1, 0), schedule.stop])
    values = [schedule.sparsity(step, final) for step in steps]
    assert all(0 <= value <= final for value in values)
    assert values == sorted(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("final", ["0.9", "0.7", "0.3", "0.123456789"])
def test_not_above_the_target_on_the_last_step_of_a_long_schedule(kind, final):
    """Near the end of a million steps a curve in floating point rounds to its end."""
    schedule = Schedule(kind, 0, 10**6)
    assert schedule.sparsity(10**6 - 1, Fraction(final)) <= Fraction(final)


@given(any_schedule(longest=60), finals)
@settings(deadline=None, max_examples=100)
def test_changes_only_every_so_often_and_at_the_end(schedule, final):
    values = [schedule.sparsity(step, final) for step in range(schedule.stop + 2)]
    for step in range(schedule.start + 1, schedule.stop + 2):
        if values[step] != values[step - 1]:
            assert (step - schedule.start) % schedule.every == 0 or step == schedule.stop


@given(any_schedule(longest=200), finals, st.integers(1, 50))
@settings(deadline=None, max_examples=60)
def test_in_epochs(schedule, final, steps_per_epoch):
    longer = schedule.in_epochs(steps_per_epoch)
    for epoch in {0, schedule.start, (schedule.start + schedule.stop) // 2, schedule.stop}:
        got, want = longer.sparsity(epoch * steps_per_epoch, final), schedule.sparsity(epoch, final)
        assert math.isclose(got, want, rel_tol=1e-12, abs_tol=1e-15)
    assert longer.sparsity(schedule.stop * steps_per_epoch, final) == final


@pytest.mark.parametrize(
    ("kind", "quarter", "half"),
    [
        ("linear", 0.2, 0.4),
        ("cubic", 0.8 * (1 - 0.75**3), 0.8 * 0.875),
        ("geometric", 1 - 0.2**0.25, 1 - 0.2**0.5),
        ("cosine", 0.8 * (1 - 0.5**0.5) / 2, 0.4),
        ("one_shot", 0.8, 0.8),
        ("gmp_star", 0.8 - 0.1 * 0.75**3, 0.8 - 0.1 * 0.125),
    ],
)
def test_the_curves(kind, quarter, half):
    schedule = Schedule(kind, 10, 50)
    assert float(schedule.sparsity(20, Fraction(8, 10))) == pytest.approx(quarter, rel=1e-12)
    assert float(schedule.sparsity(30, Fraction(8, 10))) == pytest.approx(half, rel=1e-12)
    assert schedule.sparsity(50, Fraction(8, 10)) == Fraction(8, 10)


def test_geometric_removes_the_same_fraction_of_what_remains():
    schedule = schedules.geometric(0, 10)
    kept = [1 - float(schedule.sparsity(step, Fraction(9, 10))) for step in range(11)]
    ratios = [b / a for a, b in itertools.pairwise(kept)]
    assert max(ratios) - min(ratios) < 1e-12
    assert kept[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_of_all_and_of_nothing(kind):
    schedule = Schedule(kind, 2, 9, 3)
    for final in (Fraction(0), Fraction(1)):
        values = [schedule.sparsity(step, final) for step in range(12)]
        assert values == sorted(values)
        assert values[0] == 0
        assert values[-1] == final


def test_verbs_make_schedules():
    assert schedules.one_shot(7) == Schedule("one_shot", 7, 7)
    assert schedules.one_shot().sparsity(0, Fraction(1, 2)) == Fraction(1, 2)
    for kind in KINDS[1:]:
        assert getattr(schedules, kind)(start=1, stop=9, every=2) == Schedule(kind, 1, 9, 2)
    assert str(schedules.cubic(1, 2)) == "cubic(start=1, stop=2, every=1)"


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    ("start", "stop", "every", "error", "message"),
    [
        (5, 4, 1, InputError, "ends before it starts: give a stop of at least 5"),
        (-1, 4, 1, InputError, "start must be 0 or more"),
        (0, 4, 0, InputError, "every 1 or more"),
        (0, 4, -3, InputError, "every 1 or more"),
        (0.0, 4, 1, InputError, "both in steps, or both as fractions"),
        (0.1, 4, 1, InputError, "both in steps, or both as fractions"),
        (1, 0.5, 1, InputError, "both in steps, or both as fractions"),
        (0.1, 1.5, 1, InputError, "write steps without a point"),
        (-0.1, 0.5, 1, InputError, "write steps without a point"),
        (0.1, float("nan"), 1, InputError, "write steps without a point"),
        (float("nan"), 0.5, 1, InputError, "write steps without a point"),
        (0.7, 0.5, 1, InputError, "ends before it starts"),
        (0.1, 0.5, 0.1, InputTypeError, r"every=0\.1\): give a whole number of steps$"),
        (0, "4", 1, InputTypeError, "stop='4'"),
        (0, 4, True, InputTypeError, "every=True"),
    ],
)
def test_bad_numbers(kind, start, stop, every, error, message):
    with pytest.raises(error, match=message):
        getattr(schedules, kind)(start, stop, every)


def test_bad_epochs():
    with pytest.raises(InputError, match="at least one step"):
        schedules.linear(0, 2).in_epochs(0)


def test_an_unknown_kind_is_refused_at_once():
    with pytest.raises(InputError, match="cubic"):
        Schedule("cubik", 0, 10)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_fractions_of_a_training(kind):
    schedule = Schedule(kind, 0.1, 0.7, 10)
    assert schedule.over(1000) == Schedule(kind, 100, 700, 10)
    assert schedule.over(1000).over(5) == Schedule(kind, 100, 700, 10)
    assert Schedule(kind, 0, 1.0).over(7) == Schedule(kind, 0, 7)
    with pytest.raises(InputError, match=r"fractions of the training, whose length is not known.*over\(total_steps\)"):
        schedule.sparsity(3, Fraction(1, 2))
    with pytest.raises(InputError, match=r"over\(total_steps\) in place of in_epochs"):
        schedule.in_epochs(10)
    with pytest.raises(InputError, match="1 or more"):
        schedule.over(0)


def test_one_shot_after_a_fraction():
    assert schedules.one_shot(0.5).over(21) == schedules.one_shot(10)


def test_ac_dc_is_sparse_and_dense_in_turn():
    schedule = schedules.ac_dc(start=2, stop=9, every=2)
    told = [float(schedule.sparsity(step, Fraction(9, 10))) for step in range(11)]
    assert told == [0, 0, 0.9, 0.9, 0, 0, 0.9, 0.9, 0, 0.9, 0.9]
    assert [each.lifts for each in (schedule, schedules.cubic(0, 9))] == [True, False]
    with pytest.raises(InputError, match=r"never lifts the masks: give an every that is less than stop - start"):
        schedules.ac_dc(0, 10, every=10)
    with pytest.raises(InputError, match=r"never lifts"):
        schedules.ac_dc(0.0, 0.5, every=10).over(20)


@pytest.mark.parametrize(("final", "first"), [("0.97", 0.7), ("0.75", 0.7), ("0.6", 0.6)])
def test_gmp_star_prunes_most_at_once(final, first):
    schedule = schedules.gmp_star(start=4, stop=20, every=4)
    told = [float(schedule.sparsity(step, Fraction(final))) for step in range(21)]
    assert told[3] == 0
    assert told[4] == told[7] == first
    assert told[8] == pytest.approx(float(final) - (float(final) - first) * 0.75**3)
    assert told[20] == float(final)


def rates(schedule, total_steps, **options):
    """The rates at which a loop really steps, by torch's own scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules.cycles(schedule, total_steps, **options))
    seen = []
    for _ in range(total_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@given(st.integers(0, 20), st.integers(0, 30), st.integers(1, 12), st.integers(1, 30), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_the_rate_is_whole_after_each_change_of_the_masks_and_falls_in_between(start, length, every, rest, low):
    """The step after the one that changes the masks is the first with the whole rate."""
    schedule = Schedule("linear", start, start + length, every)
    seen = rates(schedule, schedule.stop + rest, low=low)
    assert all(2 * low <= rate <= 2 for rate in seen)
    begins = {0, *range(start, schedule.stop, every), schedule.stop}
    for step in range(1, len(seen)):
        changed = schedule.sparsity(step, Fraction(9, 10)) != schedule.sparsity(step - 1, Fraction(9, 10))
        assert step in begins or not changed
        assert seen[step] == 2 if step in begins else seen[step] <= seen[step - 1]
    factor = schedules.cycles(schedule, schedule.stop + rest, low=low)
    assert factor(schedule.stop + rest) == pytest.approx(low)
    assert factor(schedule.stop + rest + 5) == pytest.approx(low)  # a loop that goes on


def test_cycles_of_a_schedule_in_fractions():
    schedule = schedules.gmp_star(0.1, 0.7, every=20)
    assert rates(schedule, 100) == rates(schedule.over(100), 100)
    assert rates(schedule, 100)[30] == 2
    assert rates(schedule, 100, low=0.5)[-1] == pytest.approx(2 * (1 - 0.5 * 29 / 30))


def test_cycles_go_on_after_a_resume():
    def made():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        factor = schedules.cycles(schedules.cubic(5, 20, every=5), 30)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    (optimizer, scheduler), (other, again) = made(), made()
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["optimizer"])
    again.load_state_dict(state["scheduler"])
    for one, rate in ((optimizer, scheduler), (other, again)):
        one.step()
        rate.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 2 * (1 - 0.9 * 3 / 5)


@pytest.mark.parametrize(
    ("schedule", "total", "low", "error", "message"),
    [
        ("cubic", 10, 0.1, InputTypeError, r"schedule is 'cubic': give the Schedule of the Pruner"),
        (schedules.cubic(0, 10), 10, 0.1, InputError, "ends at step 10.*no last cycle after it: give an earlier stop"),
        (schedules.cubic(0, 1.0), 50, 0.1, InputError, "ends at step 50.*give an earlier stop"),
        (schedules.cubic(0, 0.5), 0, 0.1, InputError, "total_steps is 0: give the number of steps in all, 1 or more"),
        (schedules.cubic(0, 0.5), 0.5, 0.1, InputTypeError, r"total_steps is 0\.5: give the number of steps"),
        (schedules.cubic(0, 5), 10, 1.5, InputError, r"low is 1\.5: give a fraction of the learning rate"),
        (schedules.cubic(0, 5), 10, float("nan"), InputError, r"low is nan: give a fraction"),
        (schedules.cubic(0, 5), 10, "0", InputTypeError, r"low is '0': give a fraction"),
    ],
)
def test_bad_cycles(schedule, total, low, error, message):
    with pytest.raises(error, match=message):
        schedules.cycles(schedule, total, low=low)
