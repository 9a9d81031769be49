"""The functions of torch that multiply weights with what they read: `listening` asks here what a call reads.

Each is said in letters, one for each dimension of an operand: "o" outputs, "i" inputs that are summed over, "g"
matrices side by side, "s" samples.
"""

from __future__ import annotations

import inspect
import string
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.calibration import padding as paddings
from secateur.calibration.grams import Reader
from secateur.calibration.listening import Listener, handles, replaces
from secateur.calibration.patches import Geometry

_SAMPLES = 1024
"""Of a bilinear layer, whose inputs are products, at a time."""


@handles("linear")
def _linear(listener: Listener, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    listener.product(weight, "oi"[-weight.ndim :], input, "s" * (input.ndim - 1) + "i")


@handles("matmul", "mm", "bmm", "mv")
def _matmul(listener: Listener, input: Tensor, *others: Tensor, **named: Tensor) -> None:
    other = [*others, *(named[name] for name in ("mat2", "other", "tensor2", "vec") if name in named)][0]
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return
    left, right = input.ndim, other.ndim
    if right >= 2:  # input @ weight
        lead = _aligned(input, other)
        listener.product(other, "g" * (right - 2) + "io", input, lead + ("s" if left > 1 else "") + "i")
    if left >= 2:  # weight @ other
        lead = _aligned(other, input)
        listener.product(input, "g" * (left - 2) + "oi", other, lead + ("is" if right > 1 else "i"))


@handles("rmatmul")
def _rmatmul(listener: Listener, input: Tensor, other: Tensor) -> None:
    _matmul(listener, other, input)


@handles("addmm", "baddbmm")
def _addmm(listener: Listener, input: Tensor, first: Tensor, second: Tensor, **more: object) -> None:
    _matmul(listener, first, second)


def _aligned(x: Tensor, weight: Tensor) -> str:
    """The letters of what stands before the last two dimensions of an operand: matrices side by side, or samples."""
    found = ""
    for d in range(x.ndim - 2):
        theirs = d - x.ndim + weight.ndim
        found += "g" if theirs >= 0 and x.shape[d] > 1 and weight.shape[theirs] > 1 else "s"
    return found


@handles("einsum")
def _einsum(listener: Listener, equation: object, *operands: Any) -> None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return
    given, _, wanted = equation.replace(" ", "").partition("->")
    dots = [one.ndim - len(term.replace("...", "")) for term, one in zip(given.split(","), operands, strict=True)]
    terms = [_spelled(term, count) for term, count in zip(given.split(","), dots, strict=True)]
    out = _spelled(wanted, max(dots))
    for (mine, weight), (theirs, x) in zip(
        zip(terms, operands, strict=True), zip(terms[::-1], operands[::-1], strict=True), strict=True
    ):
        alone = [c for c in mine + theirs if (c in mine) + (c in theirs) + (c in out) == 1 or mine.count(c) > 1]
        letters = "".join("i" if c not in out else "g" if c in theirs else "o" for c in mine)
        others = "".join("s" if c not in mine else "i" if c not in out else "g" for c in theirs)
        if not alone and letters.count("g") <= 1:
            listener.product(weight, letters, x, others, [theirs.find(c) for c in mine])


def _spelled(term: str, dots: int) -> str:
    """A term of an einsum with letters for its dots, counted from the last dimension that they stand for."""
    return term.replace("...", string.digits[:dots][::-1])


@handles("grouped_mm", "grouped_mm_fallback")
def _grouped(listener: Listener, input: Tensor, weight: Tensor, offs: Tensor | None = None, **more: object) -> None:
    if offs is None or weight.ndim != 3 or not listener.weights.has(weight):
        return
    start = 0
    for expert, stop in enumerate(offs.tolist()):
        if stop > start:
            listener.product(weight[expert], "io", input[start:stop], "si")
        start = stop


@handles("bilinear")
def _bilinear(listener: Listener, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    held = listener.weights.held(weight, "oii")
    if held is None:
        return
    first, second = (x.detach().reshape(-1, x.shape[-1]) for x in (input1, input2))

    def rows() -> Iterator[Tensor]:
        for one, other in zip(torch.split(first, _SAMPLES), torch.split(second, _SAMPLES), strict=True):
            yield (one.unsqueeze(2) * other.unsqueeze(1)).flatten(1).unsqueeze(0)

    listener.grams.add(Reader((held.name,), held.start, held.stop), first, object(), rows)


@handles("conv1d", "conv2d", "conv3d")
def _convolution(
    listener: Listener,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> None:
    listener.convolution(weight, input, lambda kernel: Geometry.of(kernel, stride, padding, dilation, groups))


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(
    listener: Listener,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: object = 1,
    padding: object = 0,
    output_padding: object = 0,
    groups: int = 1,
    dilation: object = 1,
) -> None:
    def geometry(kernel: tuple[int, ...]) -> Geometry:
        return Geometry.turned(kernel, stride, padding, dilation, groups, output_padding)

    listener.convolution(weight, input, geometry)


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


@replaces("multi_head_attention_forward")
def _attention(listener: Listener, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attention of torch.nn: its projections are called where no one sees them.

    The last one is taken out of the call, and an identity put in its place: what it reads comes out.
    """
    call = _ATTENTION.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    sides = [given[name] for name in ("query", "key", "value")]
    if given["use_separate_proj_weight"]:
        weights = [given[f"{side}_proj_weight"] for side in "qkv"]
    else:
        weights = list(given["in_proj_weight"].chunk(3))
    letters = "s" * (sides[0].ndim - 1) + "i"
    last, bias = given["out_proj_weight"], given["out_proj_bias"]
    real = paddings.real_keys(given["key_padding_mask"])
    if sides[0].is_set_to(sides[1]):  # it attends to itself, so that the mask tells of all that follows
        listener.tell(given["q_proj_weight" if given["use_separate_proj_weight"] else "in_proj_weight"], sides[0], real)
        real = []
    given |= {"out_proj_weight": torch.eye(len(last), dtype=last.dtype, device=last.device), "out_proj_bias": None}
    with listener.time_first():
        for weight, x, masks in zip(weights, sides, ([], real, real), strict=True):
            listener.product(weight, "oi", x, letters, masks=masks)
        inner, *rest = func(**given)
        listener.product(last, "oi", inner, letters)
    return F.linear(inner, last, bias), *rest
