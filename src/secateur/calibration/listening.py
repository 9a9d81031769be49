"""What the weights of a model read in its forward, seen at the functions of torch that they are given to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.calibration import padding
from secateur.calibration.grams import Grams, Reader
from secateur.calibration.moments import Moments
from secateur.calibration.patches import Geometry, patches
from secateur.calibration.reading import Weights
from secateur.scope import Member

Handle = Callable[..., Any]
_HANDLED: dict[str, Handle] = {}


class Listener(TorchFunctionMode):
    """Sums what weights read while a model runs under it.

    Args:
        members: the weights, by name.
    """

    def __init__(self, members: Mapping[str, Member]) -> None:
        super().__init__()
        self.weights = Weights(members)
        self.grams = Grams()
        self._masks: Sequence[Tensor] = ()
        self._time_first = False

    @contextmanager
    def forward(self, masks: Sequence[Tensor] = ()) -> Iterator[None]:
        """Listen to one forward.

        Args:
            masks: of its batch, from `padding.real_positions`: samples that are padding are left out.
        """
        self._masks = masks
        with self:
            yield
        self.grams.flush()

    def moments(self) -> list[Moments]:
        """What was summed over all forwards."""
        return self.grams.moments(self.weights.groups)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handle = _HANDLED.get(getattr(func, "__name__", "").strip("_"))
        if handle is not None:
            with torch.no_grad():
                handle(self, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def product(self, weight: object, letters: str, x: Tensor, x_letters: str) -> None:
        """Add what a weight reads in a product; nothing if it is none of the weights.

        Args:
            weight: the operand that may be one.
            letters: of its dimensions, see `Weights.held`.
            x: the other operand.
            x_letters: of its dimensions; "s" are samples.
        """
        held = self.weights.held(weight, letters)
        if held is None or not isinstance(x, Tensor):
            return
        groups = [d for d, letter in enumerate(x_letters) if letter == "g"]
        samples = [d for d, letter in enumerate(x_letters) if letter == "s"]
        inputs = [d for d, letter in enumerate(x_letters) if letter == "i"]
        real = padding.kept(self._masks, [x.shape[d] for d in samples], self._time_first) if not groups else None

        def rows() -> Iterator[Tensor]:
            count = held.groups if groups else 1
            flat = x.detach().permute(*groups, *samples, *inputs)
            flat = flat.reshape(count, -1, torch.Size([x.shape[d] for d in inputs]).numel())
            yield flat if real is None else flat[:, real]

        parts = held.groups if not groups else 1  # one input for all of several matrices: each reads it
        height = (held.stop - held.start) // parts
        for part in range(parts):
            start = held.start + part * height
            self.grams.add(Reader((held.name,), start, start + height), x, (x_letters, self._time_first), rows)

    def convolution(self, weight: object, x: Tensor, geometry: Callable[[tuple[int, ...]], Geometry]) -> None:
        """Add what the kernel of a convolution reads."""
        held = self.weights.kernel(weight)
        if held is not None and isinstance(weight, Tensor):
            made = geometry(tuple(weight.shape[2:]))
            reader = Reader((held.name,), held.start, held.stop)
            self.grams.add(reader, x, made, lambda: patches(x.detach(), made))


def handles(*names: str) -> Callable[[Handle], Handle]:
    """Let a function see the calls of some functions of torch, by plain name: its arguments are named as theirs."""

    def register(handle: Handle) -> Handle:
        _HANDLED.update(dict.fromkeys(names, handle))
        return handle

    return register


@handles("linear")
def _linear(listener: Listener, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    listener.product(weight, "oi"[-weight.ndim :], input, "s" * (input.ndim - 1) + "i")


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
