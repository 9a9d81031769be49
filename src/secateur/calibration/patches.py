"""What a convolution reads at each position of its output, as rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_NUMBERS = 1 << 22
"""In a piece of rows: 16 MB, so that memory stays bounded however large the maps are."""
_POSITIONS = 1024
"""Of an example, at least: where a map has more, and more than four times the inputs, neighbours tell the same."""

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input; each field has one number a dimension of the kernel.

    Attributes:
        kernel: sizes.
        stride: steps of the output, in the input.
        padding: zeros before and after.
        dilation: steps of the kernel, in the input.
        groups: of channels, each read by its own outputs.
        transposed: whether the input is spread by the stride, and the kernel turned around, as a transposed
            convolution does.
    """

    kernel: Sizes
    stride: Sizes
    padding: tuple[tuple[int, int], ...]
    dilation: Sizes
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, kernel: Sequence[int], stride: object, padding: object, dilation: object, groups: int = 1) -> Geometry:
        """Read the arguments of torch's convolutions: numbers for all dimensions or for each, `padding` also in words.

        >>> Geometry.of((3, 2), 1, "same", 1).padding
        ((1, 1), (0, 1))
        """
        size = len(kernel)
        steps = _each(dilation, size)
        if padding == "same":
            both = [step * (k - 1) for step, k in zip(steps, kernel, strict=True)]
            around = tuple((n // 2, n - n // 2) for n in both)
        else:
            around = tuple((n, n) for n in _each(0 if padding == "valid" else padding, size))
        return cls(tuple(kernel), _each(stride, size), around, steps, groups)

    @classmethod
    def turned(
        cls,
        kernel: Sequence[int],
        stride: object,
        padding: object,
        dilation: object,
        groups: int,
        more: object,
    ) -> Geometry:
        """Read the arguments of torch's transposed convolutions: `more` is `output_padding`."""
        size = len(kernel)
        steps, less, after = _each(dilation, size), _each(padding, size), _each(more, size)
        full = [step * (k - 1) - n for step, k, n in zip(steps, kernel, less, strict=True)]
        around = tuple((n, n + extra) for n, extra in zip(full, after, strict=True))
        return cls(tuple(kernel), _each(stride, size), around, steps, groups, True)


def patches(x: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Yield [groups, samples, inputs / groups * kernel]: a row a position of the output, in pieces.

    Of a large map some positions are left out, in steps that are odd, so that patterns of even period are met in all
    their phases; at least 1,024 positions of an example are taken, and four times as many as there are inputs.

    Args:
        x: [examples, inputs, *size], or without examples.
        geometry: of the convolution.
    """
    dims = len(geometry.kernel)
    x = x.unsqueeze(0) if x.ndim == dims + 1 else x
    if geometry.transposed:
        x = _spread(x, geometry.stride)
    x = F.pad(x, [n for pair in reversed(geometry.padding) for n in pair])
    for d, (k, step) in enumerate(zip(geometry.kernel, geometry.dilation, strict=True)):
        stride = 1 if geometry.transposed else geometry.stride[d]
        x = x.unfold(2 + d, (k - 1) * step + 1, stride)[..., ::step]
    if geometry.transposed:
        x = x.flip(tuple(range(-dims, 0)))
    x = (
        x.reshape(len(x), geometry.groups, x.shape[1] // geometry.groups, *x.shape[2:])
        .movedim(1, 0)
        .movedim(2, 2 + dims)
    )  # groups, examples, *out, inputs, *k
    inputs = math.prod(x.shape[2 + dims :])
    step = _step(x.shape[2 : 2 + dims], max(_POSITIONS, 4 * inputs))
    for d in range(2, 2 + dims):
        x = x[(slice(None),) * d + (slice(step // 2, None, step),)]
    rows = max(1, _NUMBERS // (geometry.groups * inputs * max(1, math.prod(x.shape[3 : 2 + dims]))))
    examples = max(1, rows // max(1, x.shape[2]))
    for some in torch.split(x, examples, 1):
        for part in torch.split(some, rows, 2):
            yield part.reshape(geometry.groups, math.prod(part.shape[1 : 2 + dims]), inputs)


def _step(sizes: Sequence[int], least: int) -> int:
    """The odd step between positions with which at least so many of them are taken."""
    step = int((math.prod(sizes) / least) ** (1 / len(sizes)))
    return max(1, step - (step % 2 == 0))


def _spread(x: Tensor, stride: Sizes) -> Tensor:
    """The input with zeros between: a transposed convolution is a plain one over this."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = torch.zeros(*x.shape[:2], *sizes, dtype=x.dtype, device=x.device)
    inner = wide
    for d, s in enumerate(stride, 2):
        inner = inner[(slice(None),) * d + (slice(None, None, s),)]
    inner.copy_(x)
    return wide


def _each(value: object, size: int) -> Sizes:
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    return tuple(int(n) for n in numbers) * (size if len(numbers) == 1 else 1)
