"""The container: a safetensors file, its header read and checked, its tensors mapped, its bytes written in one go."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from secateur.errors import FileError
from secateur.storage.dtypes import BY_CODE, KINDS

ALIGNMENT = 8
_DIMENSIONS = 1000  # no tensor has so many; the product of millions would take very long


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a file: the code of its dtype, its shape, its first byte and the one after its last."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; the slots are in the order of their bytes."""

    path: Path
    metadata: dict[str, str]
    slots: dict[str, Slot]


def read_header(path: Path) -> Header:
    """Read a header; safetensors itself sees that sizes and places agree with one another and with the file.

    Raises:
        FileError: the file is damaged, cut short or of another kind.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise FileError(damaged(path, str(error))) from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    metadata = entries.pop("__metadata__", None) or {}
    slots = {
        name: Slot(name, entry["dtype"], tuple(entry["shape"]), *(8 + length + end for end in entry["data_offsets"]))
        for name, entry in entries.items()
    }
    return Header(path, metadata, dict(sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop))))


def torch_form(slot: Slot) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """Return dtype and shape of a slot as torch has them; None if torch has no such tensor."""
    dtype, shape = BY_CODE.get(slot.code), slot.shape
    if dtype is torch.float4_e2m1fn_x2:  # torch counts the bytes, of two numbers each
        if not shape or shape[-1] % 2:
            return None
        shape = (*shape[:-1], shape[-1] // 2)
    return None if dtype is None or not possible(dtype, shape) else (dtype, shape)


def possible(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Tell whether torch can make a tensor of that shape, were there the memory."""
    return len(shape) <= _DIMENSIONS and math.prod(max(n, 1) for n in shape) * dtype.itemsize < 2**63


def file_form(dtype: torch.dtype, shape: Sequence[int]) -> tuple[str | None, tuple[int, ...]]:
    """Return the code and shape that a file has for a tensor of torch's: the inverse of `torch_form`."""
    code = KINDS[dtype].code
    if code != "F4":
        return code, tuple(shape)
    return (code, (*shape[:-1], 2 * shape[-1])) if shape else (None, ())  # a scalar would be half a number


class Writer:
    """Writes a safetensors file from front to back; the room before the data is for the header, written last.

    Args:
        file: opened for writing, empty.
        room: bytes to keep for the header, a multiple of 8: `room_for` says how many.
    """

    def __init__(self, file: BinaryIO, room: int) -> None:
        self.file = file
        self.room = room
        self.slots: list[Slot] = []
        file.seek(8 + room)

    @property
    def position(self) -> int:
        """Where the next byte goes."""
        return self.file.tell()

    def close(self, name: str, code: str, shape: Sequence[int], start: int) -> Slot:
        """Note that the bytes from `start` up to here are a tensor."""
        self.slots.append(Slot(name, code, tuple(shape), start, self.position))
        return self.slots[-1]

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header into its room."""
        header = _header(self.slots, metadata, 8 + self.room)
        assert len(header) <= self.room, (len(header), self.room)
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))


def room_for(slots: Sequence[Slot], metadata: Mapping[str, str]) -> int:
    """Return the bytes that a header of these slots, or of slots that end no later, may take."""
    return math.ceil(len(_header(slots, metadata, 0)) / ALIGNMENT) * ALIGNMENT


def _header(slots: Sequence[Slot], metadata: Mapping[str, str], origin: int) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for slot in slots:
        ends = [slot.start - origin, slot.stop - origin]
        entries[slot.name] = {"dtype": slot.code, "shape": list(slot.shape), "data_offsets": ends}
    return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()


def damaged(path: Path, reason: str) -> str:
    """Word the message for a file that cannot be read."""
    reason = reason.strip().split("\n")[0]
    return f"{path} is damaged or cut short, or is not of its suffix ({reason}): copy or download it again"
