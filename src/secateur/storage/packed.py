"""Packed files, version 1, read with every check, and written; `docs/format.md` is their specification."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from secateur.errors import FileError
from secateur.storage import coding
from secateur.storage.coding import BLOCK, SHORTEST, CodingError, Decoder, Level
from secateur.storage.container import ALIGNMENT, Header, Slot, Writer, file_form, possible, room_for
from secateur.storage.contents import TensorInfo, info
from secateur.storage.dtypes import BY_NAME, KINDS, name_of, words_of
from secateur.storage.stored import Alias, InFile, Stored, count_zeros, parts, weights_of
from secateur.support.files import Reader, StrPath, replacing

VERSION = 1
SUFFIX = ":packed-by-secateur"
"""Added to the name of a packed tensor, so that who loads it without unpacking is told that it is missing."""

_MANIFEST, _SEAL = "secateur", "secateur.crc32"
_SMALL = 256  # elements: a smaller tensor is not worth a blob
_READ = 1 << 17  # stays in cache

Progress = Callable[[int], None]
"""Called with the bytes (of memory, not of the file) done since the last call."""


# ---- reading ----------------------------------------------------------------------------------------------------


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
    return _MANIFEST in header.metadata


def read_packed(header: Header) -> tuple[list[Stored], dict[str, str], str]:
    """Return the tensors of a packed file in their order, its metadata, and the SHA-256 of its state.

    Raises:
        FileError: another version; a manifest that is damaged or does not fit the file.
    """
    path, text = header.path, header.metadata[_MANIFEST]
    try:
        manifest = json.loads(text)
        version = manifest["version"]
        if version == VERSION and header.metadata.get(_SEAL) != _crc(text.encode()):
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
        raise ValueError(f"{name} is not stored as what it is said to be")
    return (CheckedInFile if plain else PackedTensor)(name, entry, slot, file)


def _check(file: Reader, slot: Slot, crc32: str, name: str) -> None:
    """Compare the checksum of a slot with what it should be."""
    crc, room = 0, memoryview(bytearray(min(_READ, slot.nbytes)))
    for start in range(slot.start, slot.stop, _READ):
        read = file.read_into(start, room[: slot.stop - start])
        crc = zlib.crc32(room[:read], crc)
    if f"{crc:08x}" != crc32:
        raise FileError(f"{file.path}: {name} is damaged (its checksum differs): copy or download the file again")


def _crc(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


# ---- the identity of a state ------------------------------------------------------------------------------------


class StateHash:
    """SHA-256 of a state: of the names, dtypes, shapes and bytes of its tensors, whatever their order."""

    def __init__(self) -> None:
        self._tensors: dict[str, str] = {}

    def add(self, tensor: Stored, digest: str) -> None:
        """Add a tensor, with the SHA-256 of its bytes (row-major, little-endian)."""
        shape = ",".join(map(str, tensor.shape))
        self._tensors[tensor.name] = f"{name_of(tensor.dtype)} {shape} {digest}\n"

    def passing(self, tensor: Stored, count: int) -> Iterator[Tensor]:
        """Yield the pieces of a tensor, and add it when they are through; a tied one is no part of the state."""
        digest = hashlib.sha256()
        for piece in tensor.pieces(count):
            digest.update(words_of(piece).data)
            yield piece
        if not isinstance(tensor, Alias):
            self.add(tensor, digest.hexdigest())

    def require(self, sha256: str | None, file: Path) -> None:
        """See that the state is the one that was saved.

        Raises:
            FileError: it is another.
        """
        if self.hexdigest() != sha256:
            raise FileError(f"{file}: what it decodes to is not what was saved: copy or download it again")

    def hexdigest(self) -> str:
        """Return the SHA-256 of the lines `name dtype shape digest`, sorted by name."""
        lines = (f"{name} {rest}" for name, rest in sorted(self._tensors.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---- writing ----------------------------------------------------------------------------------------------------


def write_packed(
    path: StrPath,
    tensors: Sequence[Stored],
    *,
    level: Level,
    effort: int,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> list[TensorInfo]:
    """Write a packed file of tensors (the aliases among them by name only); an old file stays until it is whole.

    Raises:
        WriteError: the system refuses to write.
    """
    own = [tensor for tensor in tensors if not isinstance(tensor, Alias)]
    # so each plain tensor starts at a multiple of its element's size: blobs are of a multiple of 8 bytes
    own.sort(key=lambda tensor: -tensor.dtype.itemsize)
    manifest: dict[str, Any] = {
        "version": VERSION,
        "sha256": "0" * 64,
        "metadata": dict(metadata),
        "tensors": {
            t.name: t.of.name if isinstance(t, Alias) else _entry(t, _longest_level(t, level), t.weights, 0)
            for t in tensors
        },
    }
    state, infos = StateHash(), dict[str, TensorInfo]()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        writer = Writer(file, room_for(_longest(own), _sealed(manifest)))
        with closing(_Coder(file, effort)) as coder:
            for tensor in own:
                done, crc, digest = coder.write(tensor, level.for_tensor(tensor.dtype, tensor.shape), progress)
                _close(writer, tensor, done)
                manifest["tensors"][tensor.name] = _entry(tensor, done.coding, done.weights - done.zeros, crc)
                state.add(tensor, digest)
                infos[tensor.name] = done
        manifest["sha256"] = state.hexdigest()
        writer.finish(_sealed(manifest))
    infos |= {t.name: info(t, infos[t.of.name].zeros) for t in tensors if isinstance(t, Alias)}
    return [infos[tensor.name] for tensor in tensors]


def _entry(tensor: Stored, level: str, nonzeros: int, crc: int) -> list[object]:
    return Entry(tensor.dtype, tensor.shape, level, nonzeros, f"{crc:08x}").written()


def _sealed(manifest: Mapping[str, Any]) -> dict[str, str]:
    text = json.dumps(manifest, ensure_ascii=False, separators=(",", ":"))
    return {_MANIFEST: text, _SEAL: _crc(text.encode())}


def _longest(tensors: Iterable[Stored]) -> list[Slot]:
    """Slots whose header is at least as long as that of what will be written."""
    end = sum(2 * tensor.nbytes + 1024 for tensor in tensors)
    return [Slot(t.name + SUFFIX, KINDS[t.dtype].code or "U8", (end, *t.shape), end, end) for t in tensors]


def _longest_level(tensor: Stored, level: Level) -> str:
    return max("plain", str(level.for_tensor(tensor.dtype, tensor.shape)), key=len)


def _close(writer: Writer, tensor: Stored, done: TensorInfo) -> None:
    start = writer.position - done.stored_bytes
    code, shape = file_form(tensor.dtype, tensor.shape)
    if done.coding == "plain" and code is not None:
        writer.close(tensor.name, code, shape, start)
    else:
        writer.close(tensor.name + SUFFIX, "U8", (done.stored_bytes,), start)


@dataclass(frozen=True)
class _Block:
    data: bytes
    plain: memoryview
    zeros: int
    lost: float
    whole: float


class _Coder:
    """Codes tensors block by block on torch's number of threads, and writes the blocks in order."""

    def __init__(self, file: BinaryIO, effort: int) -> None:
        self._file = file
        self._effort = effort
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def write(self, tensor: Stored, level: Level, progress: Progress | None) -> tuple[TensorInfo, int, str]:
        """Write one tensor; returns what that did, the CRC-32 of what was written, and the SHA-256 of its value."""
        start = self._file.tell()
        code, _ = file_form(tensor.dtype, tensor.shape)
        if tensor.numel() >= _SMALL or code is None:
            done, crc, digest = self._pack(tensor, level, progress)
            if done.stored_bytes < tensor.nbytes or code is None:
                return done, crc, digest
            self._file.seek(start)
            self._file.truncate()
            progress = None  # these bytes were counted
        return _write_plain(self._file, tensor, progress)

    def _pack(self, tensor: Stored, level: Level, progress: Progress | None) -> tuple[TensorInfo, int, str]:
        crc, size, lengths, digest = 0, 0, [], hashlib.sha256()
        zeros, lost, whole = 0, 0.0, 0.0
        for block in self._blocks(tensor, level):
            self._file.write(block.data)
            crc, size = zlib.crc32(block.data, crc), size + len(block.data)
            lengths.append(len(block.data))
            digest.update(block.plain)
            zeros, lost, whole = zeros + block.zeros, lost + block.lost, whole + block.whole
            if progress:
                progress(block.plain.nbytes)
        tail = np.array(lengths, "<u4").tobytes()
        tail = bytes(-(size + len(tail)) % ALIGNMENT) + tail
        self._file.write(tail)
        error = (math.sqrt(lost / whole) if whole else 0.0) if level.name != "lossless" else None
        done = info(tensor, zeros, coding=str(level), stored_bytes=size + len(tail), error=error)
        return done, zlib.crc32(tail, crc), digest.hexdigest()

    def _blocks(self, tensor: Stored, level: Level) -> Iterator[_Block]:
        """Code the blocks of a tensor, a few at a time."""
        pieces = tensor.pieces(BLOCK)
        under_way: list[Future[_Block]] = []
        while True:
            wanted = 2 * self._threads - len(under_way)
            for piece in islice(pieces, wanted):  # a piece lasts until the next
                under_way.append(self._pool.submit(_code, piece.clone(), level, self._effort))
            if not under_way:
                return
            yield under_way.pop(0).result()


def _code(piece: Tensor, level: Level, effort: int) -> _Block:
    words = words_of(piece)
    data = coding.encode(words, piece.dtype, level, effort)
    lost = whole = 0.0
    if level.name != "lossless":
        back = torch.empty_like(piece)
        Decoder()(data, piece.dtype, words_of(back))
        kept = torch.isfinite(piece)  # what is not is stored exactly
        exact = piece[kept].double()
        lost, whole = float((back[kept].double() - exact).square().sum()), float(exact.square().sum())
        piece = back
    return _Block(data, words_of(piece).data, count_zeros(piece), lost, whole)


def _write_plain(file: BinaryIO, tensor: Stored, progress: Progress | None = None) -> tuple[TensorInfo, int, str]:
    """Write one tensor as it is in memory; returns what `_Coder.write` does."""
    crc, digest, zeros = 0, hashlib.sha256(), 0
    for _, piece in tensor.chunks():
        plain = words_of(piece).data
        file.write(plain)
        crc = zlib.crc32(plain, crc)
        digest.update(plain)
        zeros += count_zeros(piece)
        if progress:
            progress(plain.nbytes)
    done = info(tensor, zeros, coding="plain", stored_bytes=tensor.nbytes)
    return done, crc, digest.hexdigest()
