"""The steps of a recovery: how large they are, and back where they led to something worse."""

import pytest
import torch
from torch import nn

from secateur.calibration.courses import Course
from secateur.errors import NotFiniteError


def made(dtype=torch.float32, lr=0.02, steps=20):
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype))
    stays = torch.tensor([[True, False], [True, True]])
    return weight, Course({"weight": weight}, {id(weight): stays}, steps, lr)


def loss(weight):
    return (weight.float() - torch.tensor([[2.0, 2.0], [4.0, 0.0]])).square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_weights_are_zero_from_the_start_and_stay_so(dtype):
    weight, course = made(dtype)
    with course:
        assert weight[0, 1] == 0
        course.check(1.0)
        for _ in range(20):
            course.step(loss(weight))
        course.check(0.5)
    assert weight[0, 1] == 0
    assert weight.dtype is dtype
    assert weight[1, 1] < 4


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_steps_are_relative_to_the_weights_and_rise_and_fall(scale):
    weight = nn.Parameter(torch.full((2, 2), scale))
    course, moved = Course({"weight": weight}, {}, 40, 0.1), []
    with course:
        course.check(1.0)
        for _ in range(40):
            before = weight.detach().clone()
            course.step(weight.sum())
            moved.append(float((weight.detach() - before).abs().max()) / scale)
    assert max(moved) == pytest.approx(0.1, rel=0.05)
    assert moved[0] < max(moved) / 2
    assert moved[-1] < max(moved) / 20


@pytest.mark.parametrize("worse", [9.0, float("nan"), float("inf")])
def test_where_it_got_worse_it_goes_back_and_makes_half_the_steps(worse):
    weight, course = made(steps=1000)
    with course:
        course.check(5.0)
        for _ in range(200):
            course.step(weight.sum())
        course.check(4.0)
        best = weight.detach().clone()
        course.step(weight.sum())
        whole = (weight.detach() - best).abs().max()
        course.check(4.5)  # not enough to go back
        assert not torch.equal(weight, best)
        course.check(worse)
        assert torch.equal(weight, best)
        course.step(weight.sum())
        assert float((weight.detach() - best).abs().max() / whole) == pytest.approx(0.5, rel=0.2)
    assert torch.equal(weight, best)
    assert course.gained


def test_without_a_gain_the_weights_are_those_of_before():
    weight, course = made()
    with course:
        course.check(1.0)
        course.step(loss(weight))
        course.check(1.1)
    assert not course.gained
    assert torch.equal(weight, torch.tensor([[1.0, 0.0], [3.0, 4.0]]))


def test_after_a_failure_even_pruned_weights_are_those_of_before():
    weight, course = made()
    before = weight.detach().clone()

    def fail():
        with course:
            course.check(1.0)
            course.step(loss(weight))
            course.check(0.5)
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fail()
    assert torch.equal(weight, before)


def test_a_loss_that_is_no_number_is_refused():
    weight, course = made()
    with pytest.raises(NotFiniteError, match="give a lower lr"), course:
        course.check(float("inf"))
    with pytest.raises(NotFiniteError, match="look for NaN or inf in the batches"), course:
        course.step(loss(weight) * torch.nan)
