"""Sparse LSTMCell, GRUCell and RNNCell, which models that stream call once a frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime import operators as operators  # registers torch.ops.secateur
from secateur.runtime import products, recurrent_products
from secateur.runtime.swapping import Sparse, sparse, worth_packing

__all__: list[str] = []  # reached through secateur.accelerate alone

_States = tuple[Tensor | None, Tensor | None]


class _SparseCell(Sparse, nn.RNNCellBase):
    """What the cells share."""

    code_from = None  # a frame is of one stream, or of a few

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        return "a recurrent layer needs the native library" if products.form() == "csr" else ""

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        if worth_packing(self.weight_ih):
            yield "weight_ih", self.weight_ih, 1
        yield "weight_hh", self.weight_hh, 1

    def watched(self) -> tuple[str, ...]:
        return "weight_ih", "weight_hh"

    def rows(self, input: Tensor, hx: Any = None) -> int:
        return input.shape[0] if input.dim() == 2 else 1

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the plain cell: [batch, features] or [features], and states likewise."""
        if (states := self._states(hx)) is None:
            return super().forward(input, hx)
        h, c = states
        given = [input, *(state for state in states if state is not None)]
        own, packed = self._parameters, self._buffers
        weights = own["weight_ih"], own["weight_hh"], own["bias_ih"], own["bias_hh"]
        blobs = packed.get("packed_weight_ih"), packed.get("packed_weight_hh")
        if torch.compiler.is_compiling():
            if input.dim() in (1, 2) and all(map(self._traceable, given)):
                return self._traced(input, states, weights, blobs)
        elif self._ready(*given):
            found = recurrent_products.cell(self._kind(), input, h, c, weights, blobs, self._choices)
            if found is not None:
                return found if found[1] is not None else found[0]
        return super().forward(input, hx)

    def _kind(self) -> int:
        """Which of `recurrent_products.KINDS`."""
        raise NotImplementedError

    def _states(self, hx: Any) -> _States | None:
        """States and cells; None of what is neither, as torch says why."""
        return (hx, None) if hx is None or isinstance(hx, Tensor) else None

    def _traced(self, x: Tensor, states: _States, weights: Any, blobs: Any) -> Any:
        """The cell in a graph, whose operator takes [batch, features] and states alone."""
        kind, single = self._kind(), x.dim() == 1
        x = x.unsqueeze(0) if single else x
        zeros = x.new_zeros(x.shape[0], self.hidden_size)
        h, c = (zeros if one is None else one.unsqueeze(0) if single else one for one in states)
        given = (x, h, c if kind == recurrent_products.LSTM else None, weights, blobs, self._choices)
        found = [one.squeeze(0) if single else one for one in torch.ops.secateur.cell(kind, *given)]
        return tuple(found) if kind == recurrent_products.LSTM else found[0]


@sparse
class SparseLSTMCell(_SparseCell, nn.LSTMCell):
    """An nn.LSTMCell with packed weights."""

    plain = nn.LSTMCell

    def _kind(self) -> int:
        return recurrent_products.LSTM

    def _states(self, hx: Any) -> _States | None:
        if hx is None:
            return None, None
        pair = isinstance(hx, tuple | list) and len(hx) == 2 and all(isinstance(one, Tensor) for one in hx)
        return (hx[0], hx[1]) if pair else None


@sparse
class SparseGRUCell(_SparseCell, nn.GRUCell):
    """An nn.GRUCell with packed weights."""

    plain = nn.GRUCell

    def _kind(self) -> int:
        return recurrent_products.GRU


@sparse
class SparseRNNCell(_SparseCell, nn.RNNCell):
    """An nn.RNNCell with packed weights."""

    plain = nn.RNNCell

    def _kind(self) -> int:
        return recurrent_products.KINDS.index(f"RNN_{self.nonlinearity.upper()}")
