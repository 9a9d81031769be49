"""Sparse Linear layers; also the transposed ones of transformers' GPT-2 (`Conv1D`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy import Layer
from secateur.runtime import operators as operators  # registers torch.ops.secateur
from secateur.runtime import products
from secateur.runtime.swapping import Sparse, sparse

__all__: list[str] = []  # reached through secateur.accelerate alone


@sparse
class SparseLinear(Sparse, nn.Linear):
    """An nn.Linear with packed weights."""

    plain = nn.Linear
    packed_weight: Tensor

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        yield "weight", self.weight, 1

    def rows(self, input: Tensor) -> int:
        return input.numel() // self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear: [..., in_features] to [..., out_features]."""
        if torch.compiler.is_compiling():
            if not self._traceable(input):
                return super().forward(input)
            found: Tensor = torch.ops.secateur.linear(input, self.weight, self.packed_weight, self.bias, self._choices)
            return found
        if not self._ready(input):
            return super().forward(input)
        own: Any = self._parameters
        packed: Any = self._buffers["packed_weight"]
        code = self._codes.get("weight")
        return products.linear(input, own["weight"], packed, own["bias"], self._choices, code)


@sparse
class SparseTransposedLinear(Sparse):
    """A Linear whose weight is [in, out], such as `Conv1D` of transformers."""

    weight: Tensor
    bias: Tensor
    packed_weight: Tensor

    @classmethod
    def takes(cls, kind: type[nn.Module], layer: Layer) -> bool:
        return layer.family == "linear" and layer.weights == {"weight": "io"}

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        yield "weight", self.weight.t(), 1

    def rows(self, x: Tensor) -> int:
        return x.numel() // self.weight.shape[0]

    def forward(self, x: Tensor) -> Any:
        """[..., in] to [..., out]."""
        given = (x, self.weight.t(), self.packed_weight, self.bias, self._choices)
        if torch.compiler.is_compiling():
            return torch.ops.secateur.linear(*given) if self._traceable(x) else super().forward(x)
        return products.linear(*given, self._codes.get("weight")) if self._ready(x) else super().forward(x)
