"""Sparse Conv1d and Conv2d with zero padding: stride, dilation and groups as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.runtime import kernels
from secateur.runtime import operators as operators  # registers torch.ops.secateur
from secateur.runtime.layers import Sparse

__all__: list[str] = []  # reached through secateur.accelerate alone


class SparseConv2d(Sparse, nn.Conv2d):
    """An nn.Conv2d with packed weights; what it gives is contiguous."""

    plain = nn.Conv2d
    packed_weight: Tensor

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        return _obstacle(module)

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        yield "weight", self.weight.flatten(1), self.groups

    def rows(self, input: Tensor) -> int:
        return _pixels(input if input.dim() == 4 else input[None], self)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv2d: [batch, in, height, width], or without the batch."""
        usable = self._traceable(input) if torch.compiler.is_compiling() else self._ready(input)
        if not usable or input.dim() not in (3, 4):
            return super().forward(input)
        out = _convolve(self, input if input.dim() == 4 else input[None])
        return out if input.dim() == 4 else out[0]


class SparseConv1d(Sparse, nn.Conv1d):
    """An nn.Conv1d with packed weights: a convolution of an image of one row."""

    plain = nn.Conv1d
    packed_weight: Tensor

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        return _obstacle(module)

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        yield "weight", self.weight.flatten(1), self.groups

    def rows(self, input: Tensor) -> int:
        return _pixels(_image(input), self)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv1d: [batch, in, length], or without the batch."""
        usable = self._traceable(input) if torch.compiler.is_compiling() else self._ready(input)
        if not usable or input.dim() not in (2, 3):
            return super().forward(input)
        out = _convolve(self, _image(input)).squeeze(2)
        return out if input.dim() == 3 else out[0]


def _obstacle(module: Any) -> str:
    if kernels.form() == "csr":
        return "a convolution needs the native library"
    return "" if module.padding_mode == "zeros" else f"padding_mode={module.padding_mode!r}"


def _image(signal: Tensor) -> Tensor:
    """A signal [batch, in, length], or without the batch, as [batch, in, 1, length]."""
    return (signal if signal.dim() == 3 else signal[None]).unsqueeze(2)


def _two(values: Any, fill: int) -> list[int]:
    return [fill, *values] if len(values) == 1 else list(values)


def _padding(layer: Any) -> tuple[list[int], list[int]]:
    """Padding of both ends of height and width, and how much more the far end of each gets."""
    if not isinstance(layer.padding, str):
        return _two(layer.padding, 0), [0, 0]
    if layer.padding == "valid":
        return [0, 0], [0, 0]
    total = [spread * (size - 1) for spread, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return _two([t // 2 for t in total], 0), _two([t % 2 for t in total], 0)


def _pixels(image: Tensor, layer: Any) -> int:
    padding, more = _padding(layer)
    size = [image.shape[2] + more[0], image.shape[3] + more[1]]
    kernel, stride, dilation = _two(layer.kernel_size, 1), _two(layer.stride, 1), _two(layer.dilation, 1)
    height, width = kernels.conv_size(size, kernel, stride, padding, dilation)
    return image.shape[0] * height * width


def _convolve(layer: Any, image: Tensor) -> Tensor:
    padding, more = _padding(layer)
    if any(more):
        image = F.pad(image, (0, more[1], 0, more[0]))
    weight = layer.weight if layer.weight.dim() == 4 else layer.weight.unsqueeze(2)
    stride, dilation = _two(layer.stride, 1), _two(layer.dilation, 1)
    run = torch.ops.secateur.conv2d if torch.compiler.is_compiling() else kernels.conv2d
    found: Tensor = run(
        image, weight, layer.packed_weight, layer.bias, stride, padding, dilation, layer.groups, layer._choices
    )
    return found
