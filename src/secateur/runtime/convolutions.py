"""Sparse Conv1d and Conv2d with zero padding: stride, dilation and groups as they are."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.runtime import operators as operators  # registers torch.ops.secateur
from secateur.runtime import products
from secateur.runtime.swapping import Sparse, sparse

__all__: list[str] = []  # reached through secateur.accelerate alone


class _SparseConvolution(Sparse):
    """What both share: a signal is an image of one row."""

    packed_weight: Tensor
    weight: Tensor
    groups: int
    kernel_size: tuple[int, ...]

    @classmethod
    def obstacle(cls, module: Any) -> str:
        if products.form() == "csr":
            return "a convolution needs the native library"
        return "" if module.padding_mode == "zeros" else f"padding_mode={module.padding_mode!r}"

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        yield "weight", self.weight.flatten(1), self.groups

    def rows(self, input: Tensor) -> int:
        return _pixels(self._image(input), self)

    def forward(self, input: Tensor) -> Any:
        """As the plain class: [batch, in, height, width] or [batch, in, length], or without the batch."""
        usable = self._traceable(input) if torch.compiler.is_compiling() else self._ready(input)
        if not usable or input.dim() not in (self._single, self._single + 1):
            return super().forward(input)
        out = _convolve(self, self._image(input))
        out = out if self._single == 3 else out.squeeze(2)
        return out[0] if input.dim() == self._single else out

    @property
    def _single(self) -> int:
        """Dimensions of an input without the batch."""
        return 1 + len(self.kernel_size)

    def _image(self, input: Tensor) -> Tensor:
        """[batch, in, height, width]"""
        batch = input[None] if input.dim() == self._single else input
        return batch if self._single == 3 else batch.unsqueeze(2)


@sparse
class SparseConv2d(_SparseConvolution, nn.Conv2d):
    """An nn.Conv2d with packed weights; what it gives is contiguous."""

    plain = nn.Conv2d


@sparse
class SparseConv1d(_SparseConvolution, nn.Conv1d):
    """An nn.Conv1d with packed weights."""

    plain = nn.Conv1d


def _spread(
    kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: str | tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Stride, padding at both ends, what the far end gets more, and dilation, each for height and width."""
    more = (0,) * len(kernel_size)
    if padding == "valid":
        padding = more
    elif isinstance(padding, str):
        total = [spread * (size - 1) for spread, size in zip(dilation, kernel_size, strict=True)]
        padding, more = tuple(t // 2 for t in total), tuple(t % 2 for t in total)
    return _two(stride, 1), _two(padding, 0), _two(more, 0), _two(dilation, 1)


def _two(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    return (fill, *values) if len(values) == 1 else values


_remembered = functools.cache(_spread)


def _pixels(image: Tensor, layer: Any) -> int:
    stride, padding, more, dilation = _spread(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    size = (image.shape[2] + more[0], image.shape[3] + more[1])
    height, width = products.conv_size(size, _two(layer.kernel_size, 1), stride, padding, dilation)
    return image.shape[0] * height * width


def _convolve(layer: Any, image: Tensor) -> Tensor:
    compiling = torch.compiler.is_compiling()
    spread = _spread if compiling else _remembered
    stride, padding, more, dilation = spread(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    if any(more):
        image = F.pad(image, (0, more[1], 0, more[0]))
    weight = layer.weight if layer.weight.dim() == 4 else layer.weight.unsqueeze(2)
    run = torch.ops.secateur.conv2d if compiling else products.conv2d
    found: Tensor = run(
        image, weight, layer.packed_weight, layer.bias, stride, padding, dilation, layer.groups, layer._choices
    )
    return found
