"""Ways of computing several samples in one pass: one after the other, folded into the batch, or mapped by vmap.

All give the same numbers; which is fastest, and which a model allows, `secateur.dropout.sampling` finds by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.dropout.interception.followers import Unsuitable
from secateur.dropout.interception.handlers import Combine
from secateur.dropout.interception.recurrent_calls import Recurrence
from secateur.dropout.sampling.generators import Streams

Outputs = tuple[Tensor, ...]


@dataclass(slots=True)
class Noise:
    """What one call asks for.

    Attributes:
        shape: of the random numbers of one sample; sizes of 1 are shared.
        repeats: how often the numbers are repeated along each dimension, () for not at all.
        normal: standard normal numbers rather than uniform ones.
        combine: how they get into a tensor.
        before: the shape of that tensor in a pass of one sample.
    """

    shape: Sequence[int]
    combine: Combine
    before: torch.Size
    repeats: Sequence[int] = ()
    normal: bool = False

    def draw(self, streams: Streams, device: torch.device) -> Tensor:
        """Draw for each sample: `[samples, ...]`, with as many dimensions as `before`."""
        numbers = streams.draw(self.shape, device, normal=self.normal)
        if self.repeats:
            numbers = numbers.repeat(1, *self.repeats)
        missing = len(self.before) + 1 - numbers.ndim
        return numbers.reshape(len(numbers), *(1,) * missing, *numbers.shape[1:]) if missing else numbers


class Alone:
    """One sample a pass.

    Args:
        exact: write into the tensor where a model asks for that (`inplace=True`), as training does.
    """

    def __init__(self, streams: Streams, *, exact: bool = False) -> None:
        self.streams = streams
        self.exact = exact

    def put(self, noise: Noise, x: Tensor, axis: int = 0) -> Tensor:
        """Put noise into a tensor whose batch lies along `axis`."""
        return noise.combine(x, noise.draw(self.streams, x.device)[0])

    def numbers(self, noise: Noise, device: torch.device) -> Tensor:
        """Give the random numbers themselves."""
        return noise.draw(self.streams, device)[0]

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        """Run a recurrent layer."""
        return recurrence.result

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that has no noise in it."""
        return func(*args, **kwargs)

    def run(self, forward: Callable[[], Outputs], shapes: Sequence[torch.Size]) -> Outputs:
        """Run the model; each output gets a dimension of samples in front."""
        return tuple(output.unsqueeze(0) for output in forward())


class Folded(Alone):
    """The samples folded into the batch, from the first dropout on: `[samples * batch, ...]`.

    Fits a model in which everything after the first dropout takes any batch, and nothing from before is used again.
    """

    def put(self, noise: Noise, x: Tensor, axis: int = 0) -> Tensor:
        samples = len(self.streams.samples)
        folded = list(noise.before)
        folded[axis] *= samples
        if x.shape == noise.before:
            rows = x.unsqueeze(0)
        elif list(x.shape) == folded:
            rows = torch.unflatten(x, axis, (samples, -1)).movedim(axis, 0)
        else:
            raise Unsuitable(f"dropout of shape {tuple(x.shape)}, where one sample has {tuple(noise.before)}")
        return noise.combine(rows, noise.draw(self.streams, x.device)).movedim(0, axis).flatten(axis, axis + 1)

    def numbers(self, noise: Noise, device: torch.device) -> Tensor:
        raise Unsuitable("noise that is not put into a tensor")

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        if recurrence.batch_sizes is not None:
            raise Unsuitable("a packed sequence")
        return recurrence.result

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _READS:
            raise Unsuitable("a value is read, on which the model may decide for all samples at once")
        return func(*args, **kwargs)

    def run(self, forward: Callable[[], Outputs], shapes: Sequence[torch.Size]) -> Outputs:
        samples = len(self.streams.samples)
        outputs = forward()
        if [tuple(output.shape) for output in outputs] != [(samples * shape[0], *shape[1:]) for shape in shapes]:
            raise Unsuitable(f"outputs of shape {[tuple(output.shape) for output in outputs]}")
        return tuple(torch.unflatten(output, 0, (samples, -1)) for output in outputs)


_READS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__contains__, Tensor.__array__, Tensor.nonzero, torch.nonzero, torch.equal, Tensor.equal, torch.allclose,
    torch.is_nonzero,
}  # fmt: skip


class Mapped(Alone):
    """The samples as a dimension that `torch.vmap` carries through the model, from the first dropout on."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        self._samples = torch.arange(len(streams.samples))
        self._index: Tensor | None = None
        """Of the sample: what vmap maps over."""

    def put(self, noise: Noise, x: Tensor, axis: int = 0) -> Tensor:
        def combine(index: Tensor, tensor: Tensor) -> Tensor:
            return noise.combine(tensor, noise.draw(self.streams, tensor.device))

        found: Tensor = _Spread.apply(combine, self._index, x)  # type: ignore[no-untyped-call]
        return found

    def numbers(self, noise: Noise, device: torch.device) -> Tensor:
        def draw(index: Tensor) -> Tensor:
            return noise.draw(self.streams, device)

        found: Tensor = _Spread.apply(draw, self._index)  # type: ignore[no-untyped-call]
        return found

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        packed = recurrence.batch_sizes is not None
        count = len(recurrence.states)
        axes = (recurrence.batch_axis, *(1,) * count, *(None,) * len(recurrence.weights))

        def call(samples: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            sizes = None if recurrence.batch_sizes is None else recurrence.batch_sizes * samples
            states, weights = tensors[:count], tensors[count:]
            return replace(recurrence, x=x, batch_sizes=sizes, states=states, weights=weights).result

        spec = _FoldableCall(call, axes, (recurrence.batch_axis, *(1,) * count), inner=packed)
        return tuple(_Fold.apply(spec, recurrence.x, *recurrence.states, *recurrence.weights))  # type: ignore[no-untyped-call]

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _CELLS:
            x, hx, *weights = args
            states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
            return self._cell(func, x, states, weights)
        if func == functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func == torch._pack_padded_sequence:
            return self._pack(*args)
        if func == torch._pad_packed_sequence:
            return self._pad(*args)
        return func(*args, **kwargs)

    def _pack(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, ...]:
        """torch.vmap has no rule for packing: here each sequence of the batch becomes as many as there are samples."""

        def call(samples: int, x: Tensor) -> tuple[Tensor, ...]:
            data, sizes = torch._pack_padded_sequence(x, lengths.repeat_interleave(samples), batch_first)
            return data, sizes // samples

        return tuple(_Fold.apply(_FoldableCall(call, (0 if batch_first else 1,), (0, None), inner=True), x))  # type: ignore[no-untyped-call]

    def _pad(self, data: Tensor, sizes: Tensor, batch_first: bool, *options: Any) -> tuple[Tensor, ...]:
        def call(samples: int, data: Tensor) -> tuple[Tensor, ...]:
            padded, lengths = torch._pad_packed_sequence(data, sizes * samples, batch_first, *options)
            return padded, lengths[::samples]

        return tuple(_Fold.apply(_FoldableCall(call, (0,), (0 if batch_first else 1, None), inner=True), data))  # type: ignore[no-untyped-call]

    def _cell(self, func: Any, x: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor]) -> Any:
        """torch.vmap has no rule for the cells of recurrent layers."""

        def call(samples: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            hx = tensors[0] if len(states) == 1 else list(tensors[: len(states)])
            found = func(x, hx, *tensors[len(states) :])
            return (found,) if isinstance(found, Tensor) else tuple(found)

        spec = _FoldableCall(call, (0, *(0,) * len(states), *(None,) * len(weights)), (0,) * len(states))
        found = _Fold.apply(spec, x, *states, *weights)  # type: ignore[no-untyped-call]
        return found[0] if len(states) == 1 else tuple(found)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Any, **kwargs: Any) -> Tensor:
        """torch.vmap runs the attention of the CPU sample by sample."""
        given = [] if attn_mask is None else [attn_mask]

        def call(samples: int, query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> tuple[Tensor, ...]:
            attn_mask = mask[0] if mask else None
            return (functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs),)

        batched = given and given[0].ndim == query.ndim and given[0].shape[0] > 1
        axis = 0 if query.ndim > 2 else None
        spec = _FoldableCall(call, (axis, axis, axis, *(0 if batched else None for _ in given)), (0,))
        found: Tensor = _Fold.apply(spec, query, key, value, *given)[0]  # type: ignore[no-untyped-call]
        return found

    def run(self, forward: Callable[[], Outputs], shapes: Sequence[torch.Size]) -> Outputs:
        def sample(index: Tensor) -> Outputs:
            self._index = index
            return forward()

        found: Outputs = torch.vmap(sample, randomness="different")(self._samples)
        return found


_CELLS = {torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell}


class _Spread(torch.autograd.Function):
    """`combine(*tensors)`, each tensor with a dimension of samples in front, of size 1 where all share it."""

    generate_vmap_rule = False

    @staticmethod
    def forward(combine: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        raise Unsuitable("noise outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, combine: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, int]:
        dims = in_dims[1:]
        return combine(
            *(t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True))
        ), 0


@dataclass(frozen=True)
class _FoldableCall:
    """A call into whose batch samples can be folded.

    Attributes:
        func: `func(samples, *tensors)`, gives a tuple of tensors.
        axes: the batch dimension of each tensor; None for one that the batch shares.
        out_axes: those of the results; None for one that all samples share.
        inner: the samples of one element of the batch lie side by side, rather than those of one sample.
    """

    func: Callable[..., tuple[Tensor, ...]]
    axes: tuple[int | None, ...]
    out_axes: tuple[int | None, ...]
    inner: bool = False


class _Fold(torch.autograd.Function):
    """Under vmap: a call with samples folded into its batch or, where what the batch shares differs, one by one."""

    generate_vmap_rule = False

    @staticmethod
    def forward(call: _FoldableCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.func(1, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, call: _FoldableCall, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        samples, dims = info.batch_size, in_dims[1:]
        triples = list(zip(tensors, dims, call.axes, strict=True))
        if any(dim is not None and axis is None for _, dim, axis in triples):
            each = [call.func(1, *(t if d is None else t.select(d, i) for t, d, _ in triples)) for i in range(samples)]
            return tuple(torch.stack(outputs) for outputs in zip(*each, strict=True)), (0,) * len(each[0])
        shift = 1 if call.inner else 0
        folded = []
        for tensor, dim, axis in triples:
            if axis is not None:
                rows = tensor.unsqueeze(0).expand(samples, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
                tensor = rows.movedim(0, axis + shift).flatten(axis, axis + 1)
            folded.append(tensor)
        outputs = call.func(samples, *folded)
        sizes = (-1, samples) if call.inner else (samples, -1)
        pairs = list(zip(outputs, call.out_axes, strict=True))
        unfolded = tuple(out if axis is None else torch.unflatten(out, axis, sizes) for out, axis in pairs)
        return unfolded, tuple(None if axis is None else axis + shift for _, axis in pairs)
