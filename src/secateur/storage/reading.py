"""Packed files, version 1, read with every check; `docs/format.md` is their specification."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from secateur.errors import FileError
from secateur.storage.coding import BLOCK, SHORTEST, CodingError, Decoder
from secateur.storage.container import ALIGNMENT, Header, Slot, possible
from secateur.storage.dtypes import BY_NAME, KINDS, name_of, words_of
from secateur.storage.stored import Alias, InFile, Stored, parts, weights_of
from secateur.support.files import Reader

VERSION = 1
SUFFIX = ":packed-by-secateur"
"""Added to the name of a packed tensor, so that a program that loads it without unpacking finds it missing."""

MANIFEST, SEAL = "secateur", "secateur.crc32"
"""Keys of the metadata: the manifest, and its CRC-32."""

_READ = 1 << 17  # stays in cache


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a tensor: the form it has in memory, how it is stored, and the CRC-32 of that."""

    dtype: torch.dtype
    shape: torch.Size
    level: str
    nonzeros: int
    crc32: str

    @classmethod
    def read(cls, dtype: str, shape: list[int], level: str, nonzeros: int, crc32: str) -> Entry:
        """Read an entry as it stands in the manifest.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        if any(type(n) is not int or n < 0 for n in shape) or not possible(BY_NAME[dtype], shape):
            raise ValueError(f"no tensor has the shape {shape}")
        if type(nonzeros) is not int or not 0 <= nonzeros <= weights_of(BY_NAME[dtype], shape):
            raise ValueError(f"a tensor of the shape {shape} does not hold {nonzeros} numbers")
        return cls(BY_NAME[dtype], torch.Size(shape), str(level), nonzeros, str(crc32))

    def written(self) -> list[object]:
        """Return the entry as it stands in the manifest."""
        return [name_of(self.dtype), list(self.shape), self.level, self.nonzeros, self.crc32]


class PackedTensor(Stored):
    """A tensor that is packed in a file."""

    def __init__(self, name: str, entry: Entry, slot: Slot, file: Reader) -> None:
        super().__init__(name, entry.dtype, entry.shape)
        self._entry = entry
        self._slot = slot
        self._file = file

    @property
    def coding(self) -> str:
        return self._entry.level

    @property
    def stored_bytes(self) -> int:
        return self._slot.nbytes

    def zeros(self) -> int:
        return self.weights - self._entry.nonzeros

    def check(self) -> None:
        _check(self._file, self._slot, self._entry.crc32, self.name)
        self.blocks()

    def blocks(self) -> list[tuple[int, int, int]]:
        """Return, for each block, its first element, its first byte in the file, and its number of bytes.

        Raises:
            FileError: the table of blocks does not fit the shape, or the blob.
        """
        count = -(-self.numel() // BLOCK)
        table = 4 * count
        if table > self._slot.nbytes:
            raise self._error(f"claims {self.numel():,} elements in {self._slot.nbytes:,} bytes")
        read = self._file.read(self._slot.stop - table, table)
        if len(read) < table:
            raise self._error("is cut short")
        lengths = struct.unpack(f"<{count}I", read)
        begins = list(accumulate(lengths, initial=self._slot.start))
        if not 0 <= self._slot.stop - table - begins.pop() < ALIGNMENT or min(lengths, default=SHORTEST) < SHORTEST:
            raise self._error("has a table of blocks that does not fit")
        return [(i * BLOCK, begin, length) for i, (begin, length) in enumerate(zip(begins, lengths, strict=True))]

    def decode(self, block: tuple[int, int, int], out: Tensor, decoder: Decoder) -> None:
        """Decode one block into `out`, flat, of the size of the block.

        Raises:
            FileError: the block is damaged.
        """
        _, begin, length = block
        data = decoder.room(length)
        if self._file.read_into(begin, data) < length:
            raise self._error("is cut short")
        try:
            decoder(data, self.dtype, words_of(out))
        except CodingError as error:
            raise self._error(str(error)) from error

    def pieces(self, count: int) -> Iterator[Tensor]:
        self.check()
        decoder, room = Decoder(), torch.empty(min(BLOCK, self.numel()), dtype=self.dtype)
        for block in self.blocks():
            whole = room[: self.numel() - block[0]]
            self.decode(block, whole, decoder)
            yield from parts(whole, count)

    def fillers(self, flat: Tensor) -> list[Callable[[Decoder], None]]:
        return [partial(self.decode, block, flat[block[0] : block[0] + BLOCK]) for block in self.blocks()]

    def _error(self, what: str) -> FileError:
        return FileError(f"{self._file.path}: {self.name} {what}: the file is damaged, copy or download it again")


class CheckedInFile(InFile):
    """A tensor that lies as it is in a packed file, with its checksum."""

    def __init__(self, name: str, entry: Entry, slot: Slot, file: Reader) -> None:
        super().__init__(name, entry.dtype, entry.shape, file.path, slot.start)
        self._entry = entry
        self._slot = slot
        self._file = file

    def check(self) -> None:
        _check(self._file, self._slot, self._entry.crc32, self.name)

    def pieces(self, count: int) -> Iterator[Tensor]:
        self.check()
        yield from super().pieces(count)


def is_packed(header: Header) -> bool:
    """Tell whether a file is packed, of whatever version."""
    return MANIFEST in header.metadata


def read_packed(header: Header) -> tuple[list[Stored], dict[str, str], str]:
    """Return the tensors of a packed file in their order, its metadata, and the SHA-256 of its state.

    Raises:
        FileError: another version; a manifest that is damaged or does not fit the file.
    """
    path, text = header.path, header.metadata[MANIFEST]
    try:
        manifest = json.loads(text)
        version = manifest["version"]
        if version == VERSION and header.metadata.get(SEAL) != crc32_of(text.encode()):
            raise FileError(f"{path}: its manifest is damaged (its checksum differs): copy or download it again")
        if version != VERSION:
            raise FileError(
                f"{path} is packed in version {version!r} of the format, and this secateur reads version {VERSION}: "
                "update it with pip install --upgrade secateur"
            )
        entries, file = manifest["tensors"], Reader(path)
        own = {n: _tensor(header, file, n, Entry.read(*e)) for n, e in entries.items() if isinstance(e, list)}
        if len(own) != len(header.slots):
            raise ValueError("it does not list each tensor once")
        metadata = {str(key): str(value) for key, value in manifest["metadata"].items()}
        tensors = [own[name] if name in own else Alias(name, own[of]) for name, of in entries.items()]
        return tensors, metadata, str(manifest["sha256"])
    except FileError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise FileError(f"{path}: its manifest does not fit the file ({error!r}): copy or download it again") from error


def _tensor(header: Header, file: Reader, name: str, entry: Entry) -> Stored:
    plain = entry.level == "plain"
    slot = header.slots[name if plain else name + SUFFIX]
    nbytes = entry.shape.numel() * entry.dtype.itemsize
    if slot.code != (KINDS[entry.dtype].code if plain else "U8") or (plain and slot.nbytes != nbytes):
        raise ValueError(f"{name} is not stored as its entry says")
    return (CheckedInFile if plain else PackedTensor)(name, entry, slot, file)


def _check(file: Reader, slot: Slot, crc32: str, name: str) -> None:
    """Compare the checksum of a slot with what it should be."""
    crc, room = 0, memoryview(bytearray(min(_READ, slot.nbytes)))
    for start in range(slot.start, slot.stop, _READ):
        read = file.read_into(start, room[: slot.stop - start])
        crc = zlib.crc32(room[:read], crc)
    if f"{crc:08x}" != crc32:
        raise FileError(f"{file.path}: {name} is damaged (its checksum differs): copy or download the file again")


def crc32_of(data: bytes) -> str:
    """Return the CRC-32 as a manifest has it, eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"
