"""secateur.distillation: Hinton's loss, exact in half precision, deaf to padding, refusals with the remedy."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.distillation import loss
from secateur.errors import InputError, InputTypeError


def logits(*shape, seed=0, dtype=torch.float32):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def by_hand(student, teacher, temperature):
    """In plain Python, position by position."""

    def shares(row):
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    rows = zip(student.flatten(0, -2).tolist(), teacher.flatten(0, -2).tolist(), strict=True)
    each = [sum(p * math.log(p / q) for p, q in zip(shares(t), shares(s), strict=True)) for s, t in rows]
    return temperature**2 * sum(each) / len(each)


@given(st.sampled_from([(3,), (4, 3), (2, 5, 7)]), st.floats(0.3, 20), st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_is_hintons(shape, temperature, seed):
    student, teacher = (logits(*shape, seed=seed + i, dtype=torch.float64) for i in (0, 1))
    found = loss(student, teacher, temperature=temperature)
    rows = (student.reshape(-1, shape[-1]), teacher.reshape(-1, shape[-1]))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(by_hand(*rows, temperature), rel=1e-9)
    said, wanted = ((row / temperature).log_softmax(-1) for row in rows)
    torch_says = temperature**2 * F.kl_div(said, wanted, reduction="batchmean", log_target=True)
    assert torch.allclose(found, torch_says, rtol=1e-9)
    assert float(loss(teacher, teacher, temperature=temperature)) == pytest.approx(0, abs=1e-12)


def test_its_gradient_is_that_of_the_student_alone():
    """d/ds = T (softmax(s / T) - softmax(t / T)) over the number of positions (Hinton et al. 2015, eq. 2)."""
    student, teacher = logits(6, 4, seed=1).requires_grad_(), logits(6, 4, seed=2).requires_grad_()
    loss(student, teacher, temperature=3.0).backward()
    want = 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 6
    assert torch.allclose(student.grad, want, atol=1e-6)
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_that_of_the_same_logits(dtype):
    student, teacher = logits(50, 1000, seed=1, dtype=dtype), logits(50, 1000, seed=2, dtype=dtype)
    want = float(loss(student.double(), teacher.double()))
    found = loss(student.requires_grad_(), teacher)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(want, rel=1e-5)
    found.backward()
    assert student.grad.dtype == dtype
    assert bool(student.grad.isfinite().all())


def test_padding_has_no_part():
    student, teacher = logits(2, 5, 7, seed=1), logits(2, 5, 7, seed=2)
    where = torch.tensor([[True] * 5, [True, False, True, False, False]])
    want = loss(student[where], teacher[where])
    student[~where] = float("nan")
    teacher[~where] = float("inf")
    student.requires_grad_()
    found = loss(student, teacher, where=where)
    assert torch.equal(found, want)
    found.backward()
    assert not student.grad[~where].any()
    assert bool(student.grad[where].all())


def test_classes_that_are_ruled_out():
    """-inf in both, as some models write it for the unused part of a vocabulary."""
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    want = loss(student[:, :3], teacher[:, :3])
    student[:, 3:] = teacher[:, 3:] = -math.inf
    student.requires_grad_()
    found = loss(student, teacher)
    assert torch.allclose(found, want)
    found.backward()
    assert not student.grad[:, 3:].any()
    assert bool(student.grad.isfinite().all())


GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"student": [1.0]}, InputTypeError, r"student is a list: give logits.*output\.logits"),
        ({"teacher": GOOD.long()}, InputTypeError, r"dtype of teacher is 'torch\.int64': give logits"),
        ({"student": GOOD.to(torch.complex64)}, InputTypeError, r"dtype of student is 'torch\.complex64': give logits"),
        ({"teacher": torch.zeros(2, 4)}, InputError, r"\(2, 3\) and the teacher's \(2, 4\): give both for the same"),
        ({"teacher": torch.zeros(3)}, InputError, r"\(2, 3\) and the teacher's \(3,\): give both for the same inputs"),
        ({"student": torch.zeros(()), "teacher": torch.zeros(())}, InputError, r"of shape \[\.\.\., classes\]"),
        ({"student": GOOD[:, :1], "teacher": GOOD[:, :1]}, InputError, r"1 class .*torch\.cat\(\[logits"),
        ({"teacher": GOOD.to("meta")}, InputError, "on cpu, the teacher on meta: move one to the other"),
        ({"student": GOOD[:0], "teacher": GOOD[:0]}, InputError, "no position to learn from.*the batch is empty"),
        ({"where": torch.zeros(2, dtype=torch.bool)}, InputError, "where is False everywhere"),
        ({"where": torch.ones(2)}, InputTypeError, r"where is 'torch\.float32': give a tensor of bool"),
        (
            {"where": torch.ones(2, 3, dtype=torch.bool)},
            InputError,
            r"where is \(2, 3\): give one bool for each of \(2,",
        ),
        ({"where": True}, InputTypeError, "where is True: give a tensor of bool, such as labels != -100"),
        ({"temperature": 0}, InputError, "temperature is 0: give a number above 0"),
        ({"temperature": -1.5}, InputError, r"temperature is -1\.5: give a number above 0"),
        ({"temperature": float("nan")}, InputError, "temperature is nan: give a number above 0"),
        ({"temperature": float("inf")}, InputError, "temperature is inf: give a number above 0"),
        ({"temperature": "2"}, InputTypeError, "temperature is '2': give a number above 0"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        loss(**{"student": GOOD, "teacher": GOOD, **arguments})


def test_the_logit_of_yes_or_no_as_the_error_says():
    student, teacher = logits(8, 1, seed=1), logits(8, 1, seed=2)
    both = [torch.cat([one, torch.zeros_like(one)], -1) for one in (student, teacher)]
    p = (teacher / 2).sigmoid()
    want = 4 * (F.binary_cross_entropy_with_logits(student / 2, p) - F.binary_cross_entropy(p, p))
    assert torch.allclose(loss(*both), want, atol=1e-6)
