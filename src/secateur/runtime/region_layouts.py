"""How the result of a region lies in memory, where torch computes its operations one after the other.

Strides decide, also those along sizes of 1: torch reads from these too whether an image has its channels last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.runtime.activations import RELU6
from secateur.runtime.convolutions import spreading
from secateur.runtime.layouts import channels_last
from secateur.runtime.operations import ADDITION, CONVOLUTION, NEITHER, NORM, PRODUCT, SAME, Operation
from secateur.runtime.products import conv_size
from secateur.runtime.regions import Region

__all__: list[str] = []  # reached through secateur.accelerate alone


def result_strides(region: Region, image: Tensor) -> tuple[int, ...]:
    """The strides of what a region gives for an image [batch, channels, height, width], which torch would compute.

    The image is not read: what stands for it is on the meta device.
    """
    values = {region.source: torch.empty_strided(image.shape, image.stride(), device="meta")}
    for node, operation in region.operations:
        given = [values[value] for value in operation.values]
        if operation.in_place or operation.kind == SAME:
            values[node] = given[0]
        elif operation.activation == RELU6:  # whose result torch makes by `empty_like`
            values[node] = torch.empty_like(given[0])
        elif operation.kind in (NEITHER, ADDITION, PRODUCT):
            values[node] = elementwise(*given)
        else:
            values[node] = _windowed(operation, given[0])
    return values[region.results[0]].stride()


def _windowed(operation: Operation, image: Tensor) -> Tensor:
    """What a convolution, pooling or BatchNorm gives."""
    batch, channels, *size = image.shape
    last = channels_last(image)
    if operation.kind == CONVOLUTION:
        layer, (stride, padding, _, dilation) = operation.layer, spreading(operation.layer)
        channels, _, *kernel = layer.weight.shape
        size = conv_size(size, kernel, stride, padding, dilation)
        last = last or channels_last(layer.weight)
    elif operation.kind == NORM:
        last = last and not image.is_contiguous()  # which an image of one channel may be as well
    elif (window := operation.window) is not None:
        last = last and not window.summed
        reach = window.size or (size[0], size[1])
        size = conv_size(size, reach, window.stride, window.padding, window.dilation)
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(batch, channels, *size, device="meta", memory_format=form)


def elementwise(*given: Tensor) -> Tensor:
    """What torch's TensorIterator makes for results of images whose sizes are the same, or 1 where they are not."""
    shape = [*map(max, zip(*(image.shape for image in given), strict=True))]
    if all([*image.shape] == shape for image in given):
        for form in (torch.contiguous_format, torch.channels_last):
            if all(image.is_contiguous(memory_format=form) for image in given):
                return torch.empty(shape, device="meta", memory_format=form)
        like = torch.empty_like(given[0])
        if all(image.stride() == like.stride() for image in given):  # which has those of a dense image alone
            return like
    order = _from_inner(shape, [_steps(image, shape) for image in given])[::-1]
    made = torch.empty([shape[axis] for axis in order], device="meta")
    return made.permute([order.index(axis) for axis in range(4)])


def _steps(image: Tensor, shape: Sequence[int]) -> list[int]:
    """Strides, of 0 along axes where an image is repeated."""
    axes = zip(image.stride(), image.shape, shape, strict=True)
    return [step if size == full else 0 for step, size, full in axes]


def _from_inner(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """The axes from the innermost on, sorted as `TensorIteratorBase::reorder_dimensions` does."""
    order = [3, 2, 1, 0]
    for i in range(1, 4):
        at = i
        for before in range(i - 1, -1, -1):
            swap = _swapped(order[before], order[at], shape, strides)
            if swap < 0:
                break
            if swap > 0:
                order[before], order[at] = order[at], order[before]
                at = before
    return order


def _swapped(one: int, other: int, shape: Sequence[int], strides: Sequence[Sequence[int]]) -> int:
    """1 if the first axis belongs behind the other one, -1 if before it, 0 if no image tells."""
    for steps in strides:
        if steps[one] and steps[other]:
            if steps[one] != steps[other]:
                return 1 if steps[one] > steps[other] else -1
            if shape[one] > shape[other]:
                return 1
    return 0
