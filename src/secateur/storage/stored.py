"""Tensors that lie somewhere, in memory or in a file, and are read in pieces: what every verb on files works with."""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.storage.coding import Decoder
from secateur.storage.dtypes import kind_of, name_of, require_values
from secateur.support import bits
from secateur.support.files import Reader
from secateur.support.tables import size

_WINDOW = 1 << 24  # bytes of a file that are mapped at a time
_SPREAD = 1 << 28  # bytes of a state that may be there only by its strides


class Stored(ABC):
    """A tensor that can be read in pieces, as often as one likes; what selection calls a source.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        shape: of the whole.
        device: where its pieces are.
    """

    device = torch.device("cpu")

    def __init__(self, name: str, dtype: torch.dtype, shape: torch.Size) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape

    @property
    def coding(self) -> str:
        """How it is stored: "plain", or the level it is packed at."""
        return "plain"

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.numel() * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes where it lies."""
        return self.nbytes

    @property
    def weights(self) -> int:
        """Numbers in the tensor: its elements, or two for each of float4_e2m1fn_x2."""
        return weights_of(self.dtype, self.shape)

    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape.numel()

    def check(self) -> None:  # noqa: B027
        """See that the stored bytes are those that were written, where that can be told.

        Raises:
            FileError: they are not.
        """

    @abstractmethod
    def pieces(self, count: int) -> Iterator[Tensor]:
        """Yield flat pieces of `count` elements (a power of two; the last has fewer); a piece lasts until the next."""

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index of the first element, flat piece)`, as `bits.chunks` does for a tensor."""
        start = 0
        for piece in self.pieces(bits.CHUNK):
            yield start, piece
            start += piece.numel()

    def at(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Return the elements at some row-major indices, ascending."""
        found = [
            piece[torch.from_numpy(indices[slice(*np.searchsorted(indices, (start, start + piece.numel())))] - start)]
            for start, piece in self.chunks()
        ]
        return torch.cat(found) if found else torch.empty(0, dtype=self.dtype)

    def read_into(self, flat: Tensor) -> None:
        """Fill a flat CPU tensor of the same dtype and size."""
        start, whole = 0, flat.view(torch.uint8)
        for piece in self.pieces(bits.CHUNK):
            copied = piece.view(torch.uint8)
            whole[start : start + copied.numel()] = copied
            start += copied.numel()

    def fillers(self, flat: Tensor) -> list[Callable[[Decoder], None]]:
        """Return jobs that fill a flat CPU tensor together, in any order, on any threads, each with its decoder."""
        return [lambda _: self.read_into(flat)]

    def room(self) -> Tensor:
        """Return memory for the whole tensor, its values arbitrary.

        Raises:
            InputError: there is not enough of it.
        """
        try:
            return torch.empty(self.shape, dtype=self.dtype)
        except RuntimeError as error:
            raise InputError(
                f"{self.name} takes {size(self.nbytes)} of memory, more than there is: use a machine that has it"
            ) from error

    def tensor(self) -> Tensor:
        """Return the whole tensor, in memory."""
        self.check()
        whole, decoder = self.room(), Decoder()
        for fill in self.fillers(whole.view(-1)):
            fill(decoder)
        return whole

    def zeros(self) -> int:
        """Count the elements that are zero."""
        return sum(count_zeros(piece) for piece in self.pieces(bits.CHUNK))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {name_of(self.dtype)}, {tuple(self.shape)})"


class InMemory(Stored):
    """A tensor that is in memory already, on any device, with any strides; a sparse one can only be counted."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        super().__init__(name, tensor.dtype, tensor.shape)
        self._tensor = tensor.detach().resolve_conj().resolve_neg()

    def pieces(self, count: int) -> Iterator[Tensor]:
        kind_of(self.name, self._tensor)
        return parts(self._tensor.cpu().contiguous().view(-1), count)

    def at(self, indices: npt.NDArray[np.int64]) -> Tensor:
        kind_of(self.name, self._tensor)
        return self._tensor.reshape(-1)[torch.from_numpy(indices)]

    def tensor(self) -> Tensor:
        return self._tensor

    def zeros(self) -> int:
        if self._tensor.layout is not torch.strided:  # what a sparse tensor does not store is zero
            found = self._tensor
            values = found.coalesce().values() if found.layout is torch.sparse_coo else found.values()
            return found.numel() - values.numel() + InMemory(self.name, values).zeros()
        return super().zeros()


class Alias(Stored):
    """Another name of a tensor: they are tied."""

    def __init__(self, name: str, of: Stored) -> None:
        super().__init__(name, of.dtype, of.shape)
        self.of = of

    @property
    def coding(self) -> str:
        return f"tied to {self.of.name}"

    @property
    def stored_bytes(self) -> int:
        return 0

    def zeros(self) -> int:
        return self.of.zeros()

    def pieces(self, count: int) -> Iterator[Tensor]:
        return self.of.pieces(count)


class Rounded(InMemory):
    """A tensor in memory, beside numbers that stand for it in a file: whole steps, the length of one for each block.

    Args:
        values: of the same dtype and shape, contiguous, on the CPU.
        steps: of each block of `coding.BLOCK` elements.
    """

    def __init__(self, name: str, tensor: Tensor, values: Tensor, steps: Sequence[float]) -> None:
        super().__init__(name, tensor)
        self._values = values
        self._steps = steps

    def rounded(self, count: int) -> Iterator[tuple[Tensor, float]]:
        """Yield the flat pieces that stand for those of `pieces`, each with its step."""
        return zip(parts(self._values.view(-1), count), self._steps, strict=True)


class InFile(Stored):
    """A tensor that lies in a file as it would in memory, mapped window by window."""

    def __init__(self, name: str, dtype: torch.dtype, shape: torch.Size, file: Path, start: int) -> None:
        super().__init__(name, dtype, shape)
        self.file = file
        self.start = start

    def pieces(self, count: int) -> Iterator[Tensor]:
        per_window = max(_WINDOW // (count * self.dtype.itemsize), 1) * count
        with open(self.file, "rb") as file:
            for first in range(0, self.numel(), per_window):
                many = min(per_window, self.numel() - first)
                window = _mapped(file.fileno(), self.start + first * self.dtype.itemsize, many * self.dtype.itemsize)
                yield from parts(torch.from_numpy(window).view(self.dtype), count)

    def at(self, indices: npt.NDArray[np.int64]) -> Tensor:
        if indices.size * mmap.PAGESIZE > self.nbytes:
            return super().at(indices)
        size = self.dtype.itemsize
        file = Reader(self.file)
        read = bytearray().join(file.read(self.start + i * size, size) for i in indices.tolist())
        return torch.frombuffer(read, dtype=self.dtype) if read else torch.empty(0, dtype=self.dtype)


def stored_of(state: Mapping[str, Tensor]) -> list[Stored]:
    """Return the tensors of a state_dict; those that are the same memory, seen alike, as aliases of the first.

    Raises:
        InputTypeError: one is not made of plain numbers. InputError: strides make one far larger than what it holds.
    """
    firsts: dict[Any, Stored] = {}
    found: list[Stored] = []
    spread = 0
    for name, tensor in state.items():
        require_values(name, tensor)
        place: Any = name
        if tensor.layout is torch.strided and tensor.numel():
            held = tensor.untyped_storage().nbytes()
            spread += max(tensor.nbytes - held, 0)
            if spread > _SPREAD:
                raise InputError(
                    f"{name} is {size(tensor.nbytes)}, of which {size(held)} are stored, as its elements share memory: "
                    "save the tensor that it was expanded from, or copy it with .clone() first"
                )
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            place += (tensor.is_conj(), tensor.is_neg())
        own = InMemory(name, tensor)
        first = firsts.setdefault(place, own)
        found.append(own if first is own else Alias(name, first))
    return found


def _mapped(descriptor: int, start: int, size: int) -> npt.NDArray[np.uint8]:
    base = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    # a private copy: torch warns of memory that it may not write
    mapped = mmap.mmap(descriptor, start + size - base, access=mmap.ACCESS_COPY, offset=base)
    array = np.frombuffer(mapped, np.uint8, offset=start - base)
    return array if start % 8 == 0 else array.copy()


def parts(flat: Tensor, count: int) -> Iterator[Tensor]:
    """Yield views of `count` elements each, the last one shorter."""
    for start in range(0, flat.numel(), count):
        yield flat[start : start + count]


def regrouped(pieces: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """Yield the same elements in pieces of `count`, the last one shorter; a piece lasts until the next."""
    room, filled = torch.empty(0), 0
    for piece in pieces:
        room = room if room.numel() else torch.empty(count, dtype=piece.dtype)
        while piece.numel():
            taken = min(count - filled, piece.numel())
            room[filled : filled + taken] = piece[:taken]
            filled, piece = filled + taken, piece[taken:]
            if filled == count:
                yield room
                filled = 0
    if filled:
        yield room[:filled]


def weights_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Count the numbers in a tensor: its elements, or two for each of float4_e2m1fn_x2."""
    return math.prod(shape) * (2 if dtype is torch.float4_e2m1fn_x2 else 1)


def count_zeros(tensor: Tensor) -> int:
    """Count the zeros of a flat piece, of any dtype (-0.0 is one)."""
    if tensor.dtype is torch.float8_e8m0fnu:  # powers of two only
        return 0
    if tensor.dtype is torch.float4_e2m1fn_x2:  # two a byte, a sign and three bits each
        pairs = tensor.view(torch.uint8)
        return count_zeros(pairs & 0x07) + count_zeros(pairs & 0x70)
    return int(torch.count_nonzero(tensor == 0))
