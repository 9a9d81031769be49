"""Sparse Conv1d, Conv2d and Conv3d with zero padding: stride, dilation and groups as they are.

A signal is an image of one row. Of a volume, each place along the depth is an image that has the depth taps of the
kernel for channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.runtime import native, products
from secateur.runtime import operators as operators  # registers torch.ops.secateur
from secateur.runtime.layouts import like_dense
from secateur.runtime.swapping import Sparse, sparse

__all__: list[str] = []  # reached through secateur.accelerate alone


class _SparseConvolution(Sparse):
    """What all share."""

    packed_weight: Tensor
    weight: Tensor
    groups: int
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _single: ClassVar[int]
    """Dimensions of an input without the batch."""
    _packed_groups: int
    """Those that the weight was packed for: with others the layer is dense."""
    _seen: set[tuple[int, ...]]
    """Sizes of the images of the example, [in, height, width]: code is for one of them."""

    def prepare(self, place: str) -> None:
        super().prepare(place)
        self._seen, self._packed_groups = set(), 0

    def pack(self, values: torch.dtype = torch.float32) -> None:
        super().pack(values)
        self._packed_groups = self.groups

    def observe(self, input: Tensor) -> None:
        self._seen.add(tuple(self._image(input).shape[1:]))

    def code_for(self, name: str, packed: Tensor) -> native.Code | None:
        if len(self._seen) != 1:
            return None
        image, weight, spread = _padded(self, torch.empty(1, *self._seen.copy().pop(), device="meta"), _spread)
        shape, _ = products.conv_shape(tuple(image.shape), tuple(weight.shape), *spread)
        return native.generate(packed, tuple(shape))

    def _extras(self) -> tuple[str, ...]:
        return "_seen", "_packed_groups"

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
        """As the plain class: [batch, in, (depth, height,) width], or without the batch."""
        usable = self._traceable(input) if torch.compiler.is_compiling() else self._ready(input)
        if not usable or input.dim() not in (self._single, self._single + 1) or not self._fits(input):
            return super().forward(input)
        out = self._result(_convolve(self, self._image(input)), input)
        return out[0] if input.dim() == self._single else out

    def _fits(self, input: Tensor) -> bool:
        """Whether an input can be made an image, by a layer set as torch allows; if not, torch says why."""
        dims, settings = self._single - 1, (self.stride, self.padding, self.dilation)
        if 0 in input.shape[-dims:] or self.padding_mode != "zeros" or self.groups != self._packed_groups:
            return False
        if not all(isinstance(one, str) or (isinstance(one, tuple) and len(one) == dims) for one in settings):
            return False
        return (_allowed if torch.compiler.is_compiling() else _remembered_allowed)(*settings)

    def _image(self, input: Tensor) -> Tensor:
        """[batch, in, height, width]"""
        batch = input[None] if input.dim() == self._single else input
        return batch if self._single == 3 else batch.unsqueeze(2)

    def _result(self, image: Tensor, input: Tensor) -> Tensor:
        """[batch, out, ...] from the image that was computed."""
        return image if self._single == 3 else image.squeeze(2)


@sparse
class SparseConv2d(_SparseConvolution, nn.Conv2d):
    """An nn.Conv2d with packed weights; what it gives has the layout of torch's, but under `torch.compile`."""

    plain = nn.Conv2d
    _single = 3

    def _result(self, image: Tensor, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return image
        return like_dense(image, self._image(input), self.weight)


@sparse
class SparseConv1d(_SparseConvolution, nn.Conv1d):
    """An nn.Conv1d with packed weights."""

    plain = nn.Conv1d
    _single = 2


@sparse
class SparseConv3d(_SparseConvolution, nn.Conv3d):
    """An nn.Conv3d with packed weights; what it gives is contiguous."""

    plain = nn.Conv3d
    _single = 4

    def _fits(self, input: Tensor) -> bool:
        if not super()._fits(input):
            return False
        before, after, reach = self._along_depth()
        return input.shape[-4] == self.weight.shape[1] * self.groups and input.shape[-3] + before + after >= reach

    def _image(self, input: Tensor) -> Tensor:
        """[batch * depth of the output, in * depth taps, height, width]"""
        batch = input[None] if input.dim() == self._single else input
        before, after, reach = self._along_depth()
        if before or after:
            batch = F.pad(batch, (0, 0, 0, 0, before, after))
        windows = batch.unfold(2, reach, self.stride[0])[..., :: self.dilation[0]]
        return windows.permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)

    def _result(self, image: Tensor, input: Tensor) -> Tensor:
        before, after, reach = self._along_depth()
        depth = (input.shape[-3] + before + after - reach) // self.stride[0] + 1
        return image.view(-1, depth, *image.shape[1:]).transpose(1, 2).contiguous()

    def _along_depth(self) -> tuple[int, int, int]:
        """Padding at both ends of the depth, and how far the taps reach."""
        reach = self.dilation[0] * (self.weight.shape[2] - 1) + 1
        if isinstance(self.padding, str):
            total = 0 if self.padding == "valid" else reach - 1
            return total // 2, total - total // 2, reach
        return self.padding[0], self.padding[0], reach


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
    """Those for height and width, of one, two or three dimensions."""
    return (fill, *values)[-2:]


def _allowed(stride: tuple[int, ...], padding: str | tuple[int, ...], dilation: tuple[int, ...]) -> bool:
    """Whether torch computes with these, which may have been set since the layer was made."""
    if min(*stride, *dilation) < 1:
        return False
    if isinstance(padding, str):
        return padding == "valid" or (padding == "same" and max(stride) == 1)
    return min(padding) >= 0


_remembered, _remembered_allowed = functools.cache(_spread), functools.cache(_allowed)


def even_padding(layer: Any) -> bool:
    """Whether a layer is set as torch allows, and pads both ends alike."""
    settings = layer.stride, layer.padding, layer.dilation
    return bool(_remembered_allowed(*settings)) and not any(spreading(layer)[2])


def spreading(layer: Any) -> tuple[tuple[int, ...], ...]:
    """Stride, padding at both ends, what the far end gets more, and dilation of a layer, each for height and width."""
    return _remembered(layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation)


def _pixels(image: Tensor, layer: Any) -> int:
    kernel = layer.weight.shape[2:]
    stride, padding, more, dilation = _spread(kernel, layer.stride, layer.padding, layer.dilation)
    size = (image.shape[2] + more[0], image.shape[3] + more[1])
    height, width = products.conv_size(size, _two(kernel, 1), stride, padding, dilation)
    return image.shape[0] * height * width


def _convolve(layer: Any, image: Tensor) -> Tensor:
    compiling = torch.compiler.is_compiling()
    image, weight, spread = _padded(layer, image, _spread if compiling else _remembered)
    stride, padding, dilation = spread
    given = (image, weight, layer.packed_weight, layer.bias, stride, padding, dilation, layer.groups, layer._choices)
    if compiling:
        found: Tensor = torch.ops.secateur.conv2d(*given)
        return found
    return products.conv2d(*given, layer._codes.get("weight"))


def _padded(layer: Any, image: Tensor, spread: Callable[..., Any]) -> tuple[Tensor, Tensor, tuple[Any, Any, Any]]:
    """Image, weight, and stride, padding and dilation of a convolution that pads both ends alike."""
    stride, padding, more, dilation = spread(layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation)
    if any(more):
        image = F.pad(image, (0, more[1], 0, more[0]))
    weight = layer.weight.unsqueeze(2) if layer.weight.dim() == 3 else layer.weight
    weight = weight.flatten(1, 2) if weight.dim() == 5 else weight
    return image, weight, (stride, padding, dilation)
