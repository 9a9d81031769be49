"""Distillation: a dense teacher tells a pruned student what to say, by its logits. A loss for any loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.support import checks


def loss(student: Tensor, teacher: Tensor, *, temperature: float = 2.0, where: Tensor | None = None) -> Tensor:
    """How far the student is from what the teacher says: T^2 KL(teacher || student), both softened by T.

    It is computed in float32, or in float64 where both logits are. Only the student gets a gradient.

    Args:
        student: logits of shape [..., classes]: what the model says, before any softmax.
        teacher: logits of the same shape for the same inputs; compute them under `torch.no_grad()`, in `eval()`.
        temperature: T, above 0: how soft both are made. The factor T^2 keeps the gradients of one size.
        where: bool, of shape [...]: the positions that count, so not those of padding; by default all.

    Returns:
        A number, the mean over the positions, in nats: 0 where student and teacher agree.

    Raises:
        InputTypeError: no tensors of real floating-point numbers; a `where` that is not bool.
        InputError: shapes or devices that differ, a single class, a temperature that is not above 0, no position.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    >>> say = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> round(loss(say, torch.tensor([[2.0, 0.0], [9.0, -9.0]]), where=torch.tensor([True, False])).item(), 6)
    0.0
    """
    for name, given in (("student", student), ("teacher", teacher)):
        if not isinstance(given, Tensor):
            raise checks.wrong(name, given, "logits, a tensor of shape [..., classes], such as output.logits")
        if not given.is_floating_point():
            raise checks.wrong(f"the dtype of {name}", str(given.dtype), "logits, which are floating-point numbers")
    checks.number("temperature", temperature, "a number above 0, such as 2.0")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}: give a number above 0, such as 2.0")
    if student.shape != teacher.shape or not student.ndim:
        raise InputError(
            f"the student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: give both for "
            "the same inputs, of shape [..., classes]"
        )
    if student.shape[-1] < 2:
        raise InputError(
            f"logits of {student.shape[-1]} class have nothing to tell, a softmax over them is 1: for one logit of yes "
            "or no give torch.cat([logits, torch.zeros_like(logits)], -1)"
        )
    if student.device != teacher.device:
        raise InputError(f"the student is on {student.device}, the teacher on {teacher.device}: move one to the other")
    if where is not None:
        if not isinstance(where, Tensor) or where.dtype != torch.bool:
            got = str(where.dtype) if isinstance(where, Tensor) else where
            raise checks.wrong("where", got, "a tensor of bool, such as labels != -100 or attention_mask.bool()")
        if where.shape != student.shape[:-1]:
            raise InputError(f"where is {tuple(where.shape)}: give one bool for each of {tuple(student.shape[:-1])}")
        student, teacher = student[where], teacher[where]
    if not student.numel():
        raise InputError("there is no position to learn from: where is False everywhere, or the batch is empty")
    exact = torch.float64 if student.dtype == teacher.dtype == torch.float64 else torch.float32
    said = (student.to(exact) / temperature).log_softmax(-1)
    wanted = (teacher.detach().to(exact) / temperature).log_softmax(-1)
    share = wanted.exp()
    apart = (share * (wanted - said).masked_fill(share == 0, 0)).sum(-1)  # a class at -inf has no part, and is no NaN
    return temperature**2 * apart.mean()
