"""What the numbers of each dtype are made of: words of bits, for the files and for the coder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from secateur.errors import InputTypeError
from secateur.support import bits, checks


@dataclass(frozen=True)
class Kind:
    """How one dtype is stored.

    Attributes:
        code: its name in a safetensors file; None if it has none there.
        number: numpy's type of the numbers that the coder takes (those numpy lacks go as whole numbers).
        signed: the highest bit is a sign, to be coded apart from the magnitude.
        parts: numbers that make one element (2 if complex).
    """

    code: str | None
    number: np.dtype[Any]
    signed: bool = False
    parts: int = 1

    @property
    def word(self) -> np.dtype[Any]:
        """The unsigned integer of the size of one number."""
        return np.dtype(f"<u{self.number.itemsize}")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.number.itemsize * self.parts


def _kind(code: str | None, number: str, signed: bool = False, parts: int = 1) -> Kind:
    return Kind(code, np.dtype(f"<{number}"), signed, parts)


KINDS: dict[torch.dtype, Kind] = {
    torch.float64: _kind("F64", "f8", signed=True),
    torch.float32: _kind("F32", "f4", signed=True),
    torch.float16: _kind("F16", "f2", signed=True),
    torch.bfloat16: _kind("BF16", "u2", signed=True),
    torch.float8_e4m3fn: _kind("F8_E4M3", "u1", signed=True),
    torch.float8_e5m2: _kind("F8_E5M2", "u1", signed=True),
    torch.float8_e4m3fnuz: _kind("F8_E4M3FNUZ", "u1", signed=True),
    torch.float8_e5m2fnuz: _kind("F8_E5M2FNUZ", "u1", signed=True),
    torch.float8_e8m0fnu: _kind("F8_E8M0", "u1"),
    torch.float4_e2m1fn_x2: _kind("F4", "u1"),
    torch.complex128: _kind(None, "f8", signed=True, parts=2),
    torch.complex64: _kind("C64", "f4", signed=True, parts=2),
    torch.complex32: _kind(None, "f2", signed=True, parts=2),
    torch.int64: _kind("I64", "i8"),
    torch.int32: _kind("I32", "i4"),
    torch.int16: _kind("I16", "i2"),
    torch.int8: _kind("I8", "i1"),
    torch.uint64: _kind("U64", "u8"),
    torch.uint32: _kind("U32", "u4"),
    torch.uint16: _kind("U16", "u2"),
    torch.uint8: _kind("U8", "u1"),
    torch.bool: _kind("BOOL", "u1"),
}
"""Each dtype that can be stored."""

BY_CODE = {kind.code: dtype for dtype, kind in KINDS.items() if kind.code is not None}
BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in KINDS}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch.": "float32"."""
    return str(dtype).removeprefix("torch.")


def kind_of(name: str, tensor: Tensor) -> Kind:
    """Return how a tensor is stored.

    Raises:
        InputTypeError: it is sparse, or `require_values` refuses it.
    """
    require_values(name, tensor)
    if tensor.layout is not torch.strided:
        raise InputTypeError(f"{name} is {tensor.layout}, which no .safetensors file holds: save tensor.to_dense()")
    return KINDS[tensor.dtype]


def require_values(name: str, tensor: Tensor) -> None:
    """See that a tensor is made of plain numbers; it may be sparse.

    Raises:
        InputTypeError: it is nested, quantized, sharded, on the meta device, or of a dtype that no file holds.
    """
    if is_lazy(tensor):
        raise InputTypeError(f"{name} is lazy: run one batch through the model first, so that its shape is known")
    if tensor.is_nested:
        raise InputTypeError(f"{name} is a nested tensor, of rows of several sizes: save each of tensor.unbind()")
    if tensor.is_meta:
        raise InputTypeError(bits.valueless(name, tensor))
    if type(tensor.detach()) not in (Tensor, torch.nn.Parameter):
        raise InputTypeError(f"{name} is {checks.kind(tensor)}, not a plain tensor: save what it stands for")
    if tensor.is_quantized or tensor.dtype not in KINDS:
        remedy = "tensor.dequantize()" if tensor.is_quantized else "it as another dtype"
        raise InputTypeError(f"{name} is {tensor.dtype}, which no .safetensors file holds: save {remedy}")


def words_of(flat: Tensor) -> npt.NDArray[Any]:
    """View a flat, contiguous CPU tensor as words of bits: two for a complex number."""
    kind = KINDS[flat.dtype]
    return flat.detach().view(torch.uint8).numpy().view(kind.word)
