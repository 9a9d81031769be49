"""Linear layers that are 2:4 on a CUDA device: torch's semi-structured tensors take the place of their weights.

What such a tensor can do besides a product (be copied, moved, pickled) differs from torch to torch: it is a prototype.
So none is ever asked to: a layer makes its own anew from the dense weights, which it keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from secateur.errors import InputError
from secateur.runtime import products
from secateur.runtime.swapping import Sparse, sparse
from secateur.runtime.weight_checks import Snapshot, checksum
from secateur.structure.calls import tensors
from secateur.structure.proof import distance, tolerance
from secateur.support.inputs import Arguments

__all__: list[str] = []  # reached through secateur.accelerate alone

_DTYPES = (torch.float16, torch.bfloat16)  # of float32 torch knows 1:2 only, and rounds it


@sparse
class SemiStructuredLinear(Sparse, nn.Linear):
    """An nn.Linear on a CUDA device, at most two of each four of whose weights along the inputs are not zero."""

    plain = nn.Linear
    device = "cuda"
    code_from = None
    serves = "float16 and bfloat16 on CUDA"
    _packed: Tensor | None
    """The semi-structured tensor; no buffer, as those are copied and moved. None where there is no kernel for it."""
    _sum: int
    """Of the weights that it was made from."""

    @classmethod
    def suits(cls, tensor: Tensor) -> bool:
        return tensor.device.type == cls.device and tensor.dtype in _DTYPES

    @classmethod
    def obstacle(cls, module: Any) -> str:
        return "" if two_of_four(module.weight) else "more than two of four weights along the inputs are not zero"

    def prepare(self, place: str) -> None:
        super().prepare(place)
        self._packed, self._sum = None, 0

    def pack(self, values: torch.dtype = torch.float32) -> None:
        """Make the semi-structured tensor of the weights as they are, in their own dtype whatever `values` is.

        Raises:
            InputError: torch has no kernel for it on this device.
        """
        self._packed = semi_structured(self.weight.detach())
        self._sum = checksum(self.weight)
        self.stamp()

    def stamp(self) -> None:
        # to read weights means to wait for the device, so calls look at addresses and versions alone
        self._packed_from = Snapshot({"weight": self.weight}, trusted=True)

    def fresh(self) -> bool:
        weight = self._parameters.get("weight")
        return self._packed_from is not None and weight is not None and checksum(weight) == self._sum

    def rows(self, input: Tensor) -> int:
        return input.numel() // self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear: [..., in_features] to [..., out_features]; dense in graphs of torch.compile."""
        if torch.compiler.is_compiling() or not self._ready(input) or self._packed is None:
            return super().forward(input)
        if (found := products.matrix(input, self.in_features, self._choices)) is None:
            return super().forward(input)
        out = F.linear(found[0].view(-1, self.in_features), self._packed, self.bias)
        return out.view(*input.shape[:-1], self.out_features)

    def _takes_input(self, *inputs: Tensor) -> bool:
        dtype, device = self.weight.dtype, self.weight.device
        return super()._takes_input(*inputs) and all(x.dtype is dtype and x.device == device for x in inputs)

    def _revive(self) -> None:
        self._packed = None
        if self.suits(self.weight):
            with suppress(InputError):  # another device than that where it was chosen
                self._packed = semi_structured(self.weight.detach())
        self._sum = checksum(self.weight)  # the dtype may be another one
        self.stamp()

    _moved = _revive

    def _extras(self) -> tuple[str, ...]:
        return ("_packed", "_sum")

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, given, state, *rest = super().__reduce_ex__(protocol)
        return made, given, {**state, "_packed": None}, *rest


def two_of_four(weight: Tensor) -> bool:
    """Whether of each four numbers in a row of a matrix, the first four on, at most two are not zero.

    >>> two_of_four(torch.tensor([[1.0, 0, 2, 0]])), two_of_four(torch.tensor([[0.0, 0, 0, 1, 1, 1, 0, 0]]))
    (True, True)
    >>> two_of_four(torch.tensor([[1.0, 0, 2, 3]]))
    False
    """
    if weight.shape[1] % 4:
        return False
    kept = (weight.detach() != 0).reshape(-1, 4).sum(1)
    return bool((kept <= 2).all())


def semi_structured(weight: Tensor) -> Tensor:
    """Make torch's semi-structured tensor of a 2:4 matrix, and check that its product gives the weights.

    Args:
        weight: float16 or bfloat16 [out, in] on a CUDA device.

    Raises:
        InputError: torch has no kernel for this shape or device, or its product gives other numbers.
    """
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")  # it is a prototype
            made: Tensor = to_sparse_semi_structured(weight.contiguous())
            unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            right = torch.equal(F.linear(unit, made).t(), weight)  # each sum has one term that is not zero
    except RuntimeError as error:
        raise InputError(f"torch has no 2:4 kernel for it: {str(error).partition(chr(10))[0]}") from error
    if not right:
        raise InputError("torch's 2:4 kernel gives other numbers than the dense one")
    return made


def disagreement(model: nn.Module, call: Arguments, layers: Sequence[Sparse]) -> str:
    """Tell how a model computes something else with some layers sparse, as they are, than with all of them dense.

    Afterwards they are dense. Empty if each output is the same but for rounding: it differs by less than the parameters
    of the least exact dtype allow, relative to its largest number.
    """
    with torch.inference_mode():
        fast = _floats(model, call)
        for layer in layers:
            layer.choose(0)
        plain = _floats(model, call)
    allowed, found = tolerance(model), max(map(distance, plain, fast), default=0.0)
    return "" if found <= allowed else f"the output differs by {found:.2g} of its largest number, above {allowed:.2g}"


def _floats(model: nn.Module, call: Arguments) -> list[Tensor]:
    return [tensor for tensor in tensors(model(*call[0], **call[1])) if tensor.is_floating_point()]
