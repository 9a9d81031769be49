"""Sparse ConvTranspose1d and ConvTranspose2d: each is one convolution of stride 1 that makes all phases of the stride.

Output m * stride + i gets, for each a, input m - a by tap a * stride + i. So the taps of phase i, backwards, are a
kernel of their own. The phases are channels of one convolution, and are interleaved in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.runtime import operators, products
from secateur.runtime.layouts import like_dense, readable
from secateur.runtime.swapping import Sparse, sparse

__all__: list[str] = []  # reached through secateur.accelerate alone

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor packed, Tensor? bias, int[] stride, int[] padding, int[] output_padding, "
    "int groups, int[] dilation, int choices) -> Tensor"
)
_Steps = tuple[Sequence[int], Sequence[int], Sequence[int], int, Sequence[int]]
"""Stride, padding, output padding, groups and dilation, in the order of `F.conv_transpose2d`."""


def conv_transpose2d(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, steps: _Steps, choices: int
) -> Tensor | None:
    """A sparse `F.conv_transpose2d(x, weight, bias, ...)`, contiguous; None where dense has to do it.

    Args:
        x: float32 [batch, channels, height, width].
        packed: of `phases(weight, steps)`, flat.
    """
    (high, wide), (top, left), _, groups, _ = steps
    height, width = _size(x.shape[2:], weight.shape[2:], steps)
    if x.shape[1] != weight.shape[0] or 0 in x.shape[2:] or min(height, width) < 1:
        return None
    if not readable(bias, weight.shape[1] * groups):
        return None
    taps = phase_taps(weight.shape[2:], steps)
    shape = (weight.shape[1] * groups * high * wide, weight.shape[0] // groups, *taps)
    offset = None if bias is None else bias.repeat_interleave(high * wide)
    around = (1, 1), (taps[0] - 1, taps[1] - 1), (1, 1)
    if (found := products.convolved(x, shape, packed, offset, around, groups, choices)) is None:
        return None
    n, _, h, w = found.shape
    apart = found.view(n, -1, high, wide, h, w).permute(0, 1, 4, 2, 5, 3)
    cut = apart.reshape(n, -1, h * high, w * wide)[:, :, top : top + height, left : left + width]
    strides = cut.shape[1] * height * width, height * width, width, 1
    return cut.contiguous().as_strided(cut.shape, strides)  # which along sizes of 1 are any after `contiguous`


def phases(weight: Tensor, steps: _Steps) -> Tensor:
    """The kernels of all phases: [out * phases, in / groups, *taps], from weights [in, out / groups, height, width]."""
    (high, wide), _, _, groups, dilation = steps
    inputs, outputs, *kernel = weight.shape
    height, width = phase_taps(kernel, steps)
    spread = weight.new_zeros(inputs, outputs, height * high, width * wide)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    spread[:, :, : reach[0] : dilation[0], : reach[1] : dilation[1]] = weight
    split = spread.view(groups, inputs // groups, outputs, height, high, width, wide).flip(3, 5)
    return split.permute(0, 2, 4, 6, 1, 3, 5).flatten(0, 3)


def phase_taps(kernel: Sequence[int], steps: _Steps) -> tuple[int, int]:
    """Height and width of the kernel of a phase; it ends with zeros where the stride is no divisor."""
    stride, _, more, _, dilation = steps
    axes = zip(kernel, stride, more, dilation, strict=True)
    height, width = (-(-(spread * (k - 1) + 1 + extra) // step) for k, step, extra, spread in axes)
    return height, width


def _size(image: Sequence[int], kernel: Sequence[int], steps: _Steps) -> list[int]:
    stride, padding, more, _, dilation = steps
    axes = zip(image, kernel, stride, padding, more, dilation, strict=True)
    return [(size - 1) * step - 2 * pad + spread * (k - 1) + 1 + extra for size, k, step, pad, extra, spread in axes]


def _operator(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    operators.require_float(x)
    *steps, choices = rest
    found = conv_transpose2d(x, weight, packed, bias, tuple(steps), choices)
    return F.conv_transpose2d(x, weight, bias, *steps).contiguous() if found is None else found


def _shape(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *steps, _ = rest
    return x.new_empty((x.shape[0], weight.shape[1] * steps[3], *_size(x.shape[2:], weight.shape[2:], tuple(steps))))


operators.register("conv_transpose2d", _SCHEMA, _operator, _shape)


class _SparseTransposed(Sparse):
    """What both share: a signal is an image of one row."""

    code_from = None  # not tried
    packed_weight: Tensor
    weight: Tensor
    bias: Tensor | None
    _packed_steps: _Steps | None
    """Those that the phases were packed for: with others the layer is dense."""

    @classmethod
    def obstacle(cls, module: Any) -> str:
        return "a convolution needs the native library" if products.form() == "csr" else ""

    def prepare(self, place: str) -> None:
        super().prepare(place)
        self._packed_steps = None

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        yield "weight", phases(_image(self.weight), self._steps()).flatten(1), self._steps()[3]

    def pack(self, values: torch.dtype = torch.float32) -> None:
        super().pack(values)
        self._packed_steps = self._steps()

    def rows(self, input: Tensor, output_size: Any = None) -> int:
        batch, _, height, width = _image(input if input.dim() == self.weight.dim() else input[None]).shape
        taps = phase_taps(_image(self.weight).shape[2:], self._steps())
        return batch * (height + taps[0] - 1) * (width + taps[1] - 1)

    def forward(self, input: Tensor, output_size: Any = None) -> Any:
        """As the plain class: [batch, in, (height,) width], or without the batch; dense for an `output_size`."""
        single, steps = input.dim() == self.weight.dim() - 1, self._steps()
        fits = (single or input.dim() == self.weight.dim()) and output_size is None and steps == self._packed_steps
        compiling = torch.compiler.is_compiling()
        if not (self._traceable(input) if compiling else self._ready(input)) or not fits:
            return super().forward(input, output_size)
        x, weight = _image(input[None] if single else input), _image(self.weight)
        out: Tensor | None
        if compiling:
            run = torch.ops.secateur.conv_transpose2d
            out = run(x, weight, self.packed_weight, self.bias, *steps, self._choices)
        else:
            out = conv_transpose2d(x, weight, self.packed_weight, self.bias, steps, self._choices)
        if out is None:
            return super().forward(input, output_size)
        if weight.dim() > self.weight.dim():
            out = out.squeeze(2)
        elif not compiling:
            out = like_dense(out, x, weight)
        return out[0] if single else out

    def _steps(self) -> _Steps:
        layer: Any = self
        sides = ((layer.stride, 1), (layer.padding, 0), (layer.output_padding, 0), (layer.dilation, 1))
        dims = self.weight.dim() - 2  # a number that was set since stands for all
        each = (((values,) * dims if isinstance(values, int) else values, fill) for values, fill in sides)
        stride, padding, more, dilation = ((fill, *values)[-2:] for values, fill in each)
        return stride, padding, more, layer.groups, dilation

    def _extras(self) -> tuple[str, ...]:
        return ("_packed_steps",)


def _image(signals: Tensor) -> Tensor:
    """[..., height, width] of a batch or a weight."""
    return signals if signals.dim() == 4 else signals.unsqueeze(-2)


@sparse
class SparseConvTranspose1d(_SparseTransposed, nn.ConvTranspose1d):
    """An nn.ConvTranspose1d with packed weights."""

    plain = nn.ConvTranspose1d


@sparse
class SparseConvTranspose2d(_SparseTransposed, nn.ConvTranspose2d):
    """An nn.ConvTranspose2d with packed weights; what it gives has the layout of torch's, but under `torch.compile`."""

    plain = nn.ConvTranspose2d
