"""Sparse Linear layers; also the transposed ones of transformers' GPT-2 (`Conv1D`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.anatomy import Layer
from secateur.runtime import operators as operators  # registers torch.ops.secateur
from secateur.runtime import products
from secateur.runtime.releasing import Releasable, Released
from secateur.runtime.swapping import sparse

__all__: list[str] = []  # reached through secateur.accelerate alone


class _Around(threading.local):
    """What each thread is in the middle of: a call of a module that has some of its layers computed together."""

    call: Any = None


around = _Around()


@sparse
class SparseLinear(Releasable, nn.Linear):
    """An nn.Linear with packed weights."""

    plain = nn.Linear
    packed_weight: Tensor

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        yield "weight", self.rebuilt() if self._released else self.weight, 1

    def rebuilt(self) -> Tensor:
        return products.unpack(self.packed_weight, *self.weight.shape)

    def rows(self, input: Tensor) -> int:
        return input.numel() // int(self.weight.shape[1])

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear: [..., in_features] to [..., out_features]."""
        if torch.compiler.is_compiling():
            if self._released:
                return _traced(self, input, *self.weight.shape)
            if not self._traceable(input):
                return super().forward(input)
            found: Tensor = torch.ops.secateur.linear(input, self.weight, self.packed_weight, self.bias, self._choices)
            return found
        if (call := around.call) is not None and (out := call.take(self, input)) is not None:
            return out  # type: ignore[no-any-return]
        if not self._ready(input):
            return F.linear(input, products.dense(self.weight, self.packed_weight), self.bias)
        own: Any = self._parameters
        packed: Any = self._buffers["packed_weight"]
        code = self._codes.get("weight")
        return products.linear(input, own["weight"], packed, own["bias"], self._choices, code)


@sparse
class SparseTransposedLinear(Releasable):
    """A Linear whose weight is [in, out], such as `Conv1D` of transformers."""

    bias: Tensor
    packed_weight: Tensor

    @classmethod
    def takes(cls, kind: type[nn.Module], layer: Layer) -> bool:
        return layer.family == "linear" and layer.weights == {"weight": "io"}

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        yield "weight", self.rebuilt().t() if self._released else self.weight.t(), 1

    def rebuilt(self) -> Tensor:
        return products.unpack(self.packed_weight, *self.weight.shape[::-1]).t().contiguous()

    def rows(self, x: Tensor) -> int:
        return x.numel() // int(self.weight.shape[0])

    def forward(self, x: Tensor) -> Any:
        """[..., in] to [..., out]."""
        if torch.compiler.is_compiling() and self._released:
            columns, rows = self.weight.shape
            return _traced(self, x, rows, columns)
        weight = self.weight.turned if isinstance(self.weight, Released) else self.weight.t()
        given = (x, weight, self.packed_weight, self.bias, self._choices)
        if torch.compiler.is_compiling():
            return torch.ops.secateur.linear(*given) if self._traceable(x) else super().forward(x)
        if self._ready(x):
            return products.linear(*given, self._codes.get("weight"))
        if self._released:
            return F.linear(x, products.dense(weight, self.packed_weight), self.bias)
        return super().forward(x)


def _traced(layer: Any, x: Tensor, rows: int, columns: int) -> Tensor:
    """A layer whose dense weight was released, in a graph, which has no place for tensors without values."""
    packed, bias = layer.packed_weight, layer.bias
    found: Tensor
    if layer._traceable(x):
        found = torch.ops.secateur.packed_linear(x, packed, bias, rows, columns, layer._choices)
    else:
        found = F.linear(x, torch.ops.secateur.unpack(packed, rows, columns), bias)
    return found
