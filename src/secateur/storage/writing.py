"""Packed files, version 1, written: tensors coded block by block on all threads; `docs/format.md` specifies them."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from secateur.storage import coding
from secateur.storage.coding import BLOCK, Decoder, Level
from secateur.storage.container import ALIGNMENT, Slot, Writer, file_form, room_for
from secateur.storage.contents import TensorInfo, info
from secateur.storage.dtypes import KINDS, words_of
from secateur.storage.reading import MANIFEST, SEAL, SUFFIX, VERSION, Entry, crc32_of
from secateur.storage.state_hash import StateHash
from secateur.storage.stored import Alias, Rounded, Stored, count_zeros
from secateur.support.files import StrPath

_SMALL = 256  # elements: a smaller tensor is not worth a blob

Progress = Callable[[int], None]
"""Called with the bytes (of memory, not of the file) done since the last call."""


def write_packed(
    path: StrPath,
    tensors: Sequence[Stored],
    *,
    level: Level,
    effort: int,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> list[TensorInfo]:
    """Write a packed file of tensors, the aliases among them by name only."""
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
    with open(path, "wb") as file:
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
    return {MANIFEST: text, SEAL: crc32_of(text.encode())}


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
        rounded = tensor.rounded(BLOCK) if isinstance(tensor, Rounded) else repeat(None)
        pieces = zip(tensor.pieces(BLOCK), rounded, strict=False)
        under_way: list[Future[_Block]] = []
        while True:
            wanted = 2 * self._threads - len(under_way)
            for piece, steps in islice(pieces, wanted):  # a piece lasts until the next
                under_way.append(self._pool.submit(_code, piece.clone(), level, self._effort, steps))
            if not under_way:
                return
            yield under_way.pop(0).result()


def _code(piece: Tensor, level: Level, effort: int, rounded: tuple[Tensor, float] | None) -> _Block:
    values, step = (piece, None) if rounded is None else rounded
    data = coding.encode(words_of(values), piece.dtype, level, effort, step)
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
