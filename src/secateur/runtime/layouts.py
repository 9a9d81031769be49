"""What the kernels can read where it lies: biases, and images with their channels first.

Images come with channels last where torch's own convolution has them so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.runtime import native

__all__: list[str] = []  # reached through secateur.accelerate alone


def readable(bias: Tensor | None, size: int) -> bool:
    """Whether the kernels can read a bias of this size by its address, or there is none; if not, torch has to.

    >>> readable(torch.zeros(4), 4), readable(torch.zeros(8)[::2], 4), readable(torch.zeros(1), 4), readable(None, 4)
    (True, False, False, True)
    """
    if bias is None:
        return True
    laid = bias.numel() == size and bias.stride() == (1,)
    return laid and bias.dtype is torch.float32 and bias.is_cpu and not bias.is_neg()


def channels_first(image: Tensor) -> Tensor:
    """An image [batch, channels, height, width] in one piece, channel by channel."""
    if image.is_contiguous() or not image.is_contiguous(memory_format=torch.channels_last):
        return image.contiguous()
    _, channels, height, width = image.shape
    return _turned(image, torch.empty_like(image, memory_format=torch.contiguous_format), height * width, channels)


def like_dense(out: Tensor, *given: Tensor) -> Tensor:
    """The result of a convolution, with channels last if torch's would have them so: if image or weight has."""
    return _with_channels_last(out) if any(map(channels_last, given)) and not channels_last(out) else out


def strided(out: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A contiguous result with the strides that torch's would have, which leave no gaps."""
    if out.stride() == strides:
        return out
    last = _with_channels_last(out)
    return last if last.stride() == strides else out.new_empty_strided(out.shape, strides).copy_(out)


def _with_channels_last(out: Tensor) -> Tensor:
    _, channels, height, width = out.shape
    return _turned(out, torch.empty_like(out, memory_format=torch.channels_last), channels, height * width)


def channels_last(image: Tensor) -> bool:
    """Whether torch takes an image, or the weight of a convolution, to have its channels last.

    As its own `suggest_memory_format`, which Python has not: strides tell, also where sizes of 1 leave it open.

    >>> image = torch.zeros(1, 2, 3, 3)
    >>> channels_last(image), channels_last(image.to(memory_format=torch.channels_last))
    (False, True)
    """
    sizes = _, channels, height, width = image.shape
    n, c, h, w = image.stride()
    return c > 0 and c * channels <= w and w * width <= h and c != h * height <= n and 0 not in sizes


def _turned(image: Tensor, to: Tensor, rows: int, columns: int) -> Tensor:
    """Write each picture of a batch, which lies in memory as [rows, columns], to another tensor as [columns, rows]."""
    lib = native.library()
    if lib is None:
        return to.copy_(image)
    given = image.data_ptr(), image.shape[0], rows, columns, to.data_ptr(), torch.get_num_threads()
    lib.secateur_transpose(*given)
    return to
