"""Sparse LSTM, GRU and plain RNN: all layers and directions, projections, packed sequences, initial states."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from secateur.runtime import native, products, recurrent_products
from secateur.runtime import operators as operators  # registers torch.ops.secateur
from secateur.runtime.swapping import Sparse, sparse, worth_packing

__all__: list[str] = []  # reached through secateur.accelerate alone

_States = tuple[Tensor, ...]


class _SparseRecurrent(Sparse, nn.RNNBase):
    """What the layers share."""

    code_from = 0  # some steps of a few sequences are one product with the inputs

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        return "a recurrent layer needs the native library" if products.form() == "csr" else ""

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        for name in self._matrix_names():
            weight = getattr(self, name)
            if "_ih_" not in name or worth_packing(weight):  # the steps have no dense kernel
                yield name, weight, 1

    def code_for(self, name: str, packed: Tensor) -> native.Code | None:
        return native.generate(packed, adds="_hh_" in name and self.mode != "GRU")

    def watched(self) -> list[str]:
        return self._matrix_names()

    def rows(self, input: Tensor | PackedSequence, hx: Any = None) -> int:
        if isinstance(input, PackedSequence):
            return int(input.batch_sizes[0])
        return 1 if input.dim() == 2 else input.shape[0 if self.batch_first else 1]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the plain layer; batch, steps and features as `batch_first` says, or a PackedSequence."""
        packed = isinstance(input, PackedSequence)
        x: Any = input.data if packed else input
        states: _States = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if (
            not self._takes(x, states)
            or (self.training and self.dropout)
            or (packed and (x.dim() != 2 or self._compiling()))
        ):
            return super().forward(input, hx)
        single = not packed and x.dim() == 2
        if single:
            x, states = x.unsqueeze(1), tuple(state.unsqueeze(1) for state in states)
        elif self.batch_first and not packed:
            x = x.transpose(0, 1)
        sizes, order, back = (input.batch_sizes, *input[2:]) if packed else (None, None, None)
        batch = int(sizes[0]) if sizes is not None else x.shape[1]
        if not self._compiling() and not self._choices >> products.bucket(batch) & 1:
            return super().forward(input, hx)
        states = states or self._zeros(x, batch)
        if not self._fits(x, states, batch):
            return super().forward(input, hx)  # which says what is wrong
        if order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        out: Any
        out, *last = self._run(x, sizes, states)
        if back is not None:
            last = [state.index_select(1, back) for state in last]
        if single:
            out, last = out.squeeze(1), [state.squeeze(1) for state in last]
        elif packed:
            out = PackedSequence(out, sizes, order, back)
        elif self.batch_first:
            out = out.transpose(0, 1)
        return out, tuple(last) if self.mode == "LSTM" else last[0]

    def _compiling(self) -> bool:
        return torch.compiler.is_compiling()

    def _takes(self, x: Tensor, states: _States) -> bool:
        if x.dim() not in (2, 3):
            return False
        return all(map(self._traceable, (x, *states))) if self._compiling() else self._ready(x, *states)

    def _widths(self) -> tuple[int, ...]:
        state = self.proj_size or self.hidden_size
        return (state, self.hidden_size) if self.mode == "LSTM" else (state,)

    def _zeros(self, x: Tensor, batch: int) -> _States:
        count = self.num_layers * (2 if self.bidirectional else 1)
        return tuple(x.new_zeros((count, batch, width)) for width in self._widths())

    def _fits(self, x: Tensor, states: _States, batch: int) -> bool:
        count = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(count, batch, width) for width in self._widths()]
        if x.shape[-1] != self.input_size or [tuple(state.shape) for state in states] != shapes:
            return False
        weights = [self._parameters[name] for name in self._flat_weights_names]
        settings = self.mode, self.input_size, self.hidden_size, self.num_layers, self.bias, self.bidirectional
        wanted = (_weight_shapes if self._compiling() else _remembered)(*settings, self.proj_size)
        return [None if weight is None else tuple(weight.shape) for weight in weights] == wanted

    def _run(self, x: Tensor, sizes: Tensor | None, states: _States) -> list[Tensor]:
        run = torch.ops.secateur.recurrent if self._compiling() else recurrent_products.recurrent
        h, c = (*states, None)[:2]
        weights = [self._parameters[name] for name in self._flat_weights_names]
        kind = recurrent_products.KINDS.index(self.mode)
        given: Any = (x, sizes, h, c, weights, self._packed(x), self.bidirectional, kind, self._choices)
        codes: Any = () if self._compiling() else ([self._codes.get(name) for name in self._matrix_names()],)
        return list(run(*given, *codes))[: 1 + len(states)]

    def _packed(self, x: Tensor) -> list[Tensor]:
        none = x.new_empty(0, dtype=torch.uint8)
        return [self._buffers.get(f"packed_{name}", none) for name in self._matrix_names()]  # type: ignore[misc]

    def _matrix_names(self) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith("weight")]


def _weight_shapes(
    mode: str, input: int, hidden: int, layers: int, bias: bool, bidirectional: bool, projection: int
) -> list[tuple[int, ...]]:
    """What the weights of a layer with such attributes have; kernels, unlike torch, do not look at all of them."""
    gates, state = {"LSTM": 4, "GRU": 3}.get(mode, 1) * hidden, projection or hidden
    directions = 2 if bidirectional else 1
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        one = [(gates, state * directions if layer else input), (gates, state), *([(gates,)] * 2 if bias else [])]
        shapes += [*one, *([(projection, hidden)] if projection else [])] * directions
    return shapes


_remembered = functools.cache(_weight_shapes)


@sparse
class SparseLSTM(_SparseRecurrent, nn.LSTM):
    """An nn.LSTM with packed weights."""

    plain = nn.LSTM


@sparse
class SparseGRU(_SparseRecurrent, nn.GRU):
    """An nn.GRU with packed weights."""

    plain = nn.GRU


@sparse
class SparseRNN(_SparseRecurrent, nn.RNN):
    """An nn.RNN, of tanh or ReLU, with packed weights."""

    plain = nn.RNN
