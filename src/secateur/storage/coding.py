"""The coder: a block of numbers to bytes and back, near the entropy of the numbers.

A block of mostly zeros is stored as the gaps between the numbers that are not zero, their signs and their magnitudes;
another one as signs and magnitudes. Gaps and magnitudes are coded with pcodec. A lossy level codes magnitudes of 16
bits, in which 0 marks a number that they cannot hold: it follows exactly. `docs/format.md` has the layout.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, standalone
from torch import Tensor

from secateur.errors import InputError
from secateur.storage.dtypes import KINDS, Kind, words_of

BLOCK = 1 << 20
"""Elements of a tensor coded together: each block can be decoded by itself, on any thread."""

EFFORTS = {"fast": 4, "normal": 8, "best": 12}
"""Levels of pcodec: `best` takes two to ten times as long to write as `normal`; reading takes the same time."""

STEPS = {"near": 1 / 64, "small": 1 / 16, "tiny": 1 / 4}

MOST_STEPS = np.iinfo(np.uint16).max
"""A number of more steps is stored exactly."""

_PAGE = 1 << 16  # numbers that share a table of pcodec: smaller ones cost more tables, larger ones adapt less
_CACHED = 1 << 18  # numbers handled at a time: few calls, and all of it in cache
_OUTLIER = 64  # times the median: one stray 1e38 must not make the step coarse for all
_HEAD = struct.Struct("<BBHIIIId")  # sparse, codes, 0, numbers, bytes of gaps, of magnitudes, of exact ones, step
SHORTEST = _HEAD.size
"""Bytes that any block takes: so a file cannot claim many blocks in few bytes."""

_EXACT, _FP16, _BF16, _STEPS = range(4)
_CODES = {"lossless": _EXACT, "fp16": _FP16, "bf16": _BF16, "step": _STEPS}
_STEP_DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16

Words = npt.NDArray[Any]


class CodingError(ValueError):
    """A block that cannot be decoded; who reads the file says which tensor it is of."""


@dataclass(frozen=True)
class Level:
    """What may be lost: nothing ("lossless"), the low bits ("fp16", "bf16"), or what is finer than a step.

    Attributes:
        name: "lossless", "fp16", "bf16" or "step".
        step: the step relative to the root mean square of the numbers of a block that are not zero, outliers (beyond
            64 times their median) left out.
    """

    name: str = "lossless"
    step: float = 0.0

    def __str__(self) -> str:
        return f"step {self.step:g}" if self.name == "step" else self.name

    def for_tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Level:
        """The level of one tensor: fp16 and bf16 are for wider floats, a step for floats of two or more dimensions."""
        if self.name == "step":
            return self if dtype in _STEP_DTYPES and len(shape) > 1 else Level()
        return self if dtype in (torch.float32, torch.float64) else Level()


def level_of(name: str, step: float | None) -> Level:
    """Turn what a user may pass as `level=` and `step=` into a Level.

    Raises:
        InputError: an unknown name, both of them, or a step that is not a positive number.
    """
    if step is not None:
        if name != "lossless":
            raise InputError(f"level={name!r} and step={step!r} are two levels: give one of them")
        if isinstance(step, bool) or not isinstance(step, Real) or not 0 < step < math.inf:
            raise InputError(f"step={step!r}: give a step relative to the rms of the weights, such as 1/64")
        return Level("step", float(step))
    if isinstance(name, str) and name in STEPS:
        return Level("step", STEPS[name])
    if name not in ("lossless", "fp16", "bf16"):
        raise InputError(f"no level named {name!r}: choose lossless, fp16, bf16, {', '.join(STEPS)}, or give step=")
    return Level(name)


def effort_of(name: str) -> int:
    """Turn what a user may pass as `effort=` into a level of pcodec.

    Raises:
        InputError: an unknown name.
    """
    if not isinstance(name, str) or name not in EFFORTS:
        raise InputError(f"no effort named {name!r}: choose {', '.join(EFFORTS)}")
    return EFFORTS[name]


def step_of(flat: Tensor, level: Level) -> float:
    """The step that the numbers of a block are coded with, at a level that has one.

    Args:
        flat: the numbers, of a dtype that steps are for.
        level: of a step.
    """
    return _step(flat[flat != 0].abs().double().numpy(), level)


def encode(words: Words, dtype: torch.dtype, level: Level, effort: int, step: float | None = None) -> bytes:
    """Code one block.

    Args:
        words: the bits of at most BLOCK elements, flat, as `dtypes.words_of` gives them.
        dtype: of the elements.
        level: what may be lost.
        effort: level of pcodec, 0 to 12.
        step: where the numbers are whole steps already: of what length. By default `step_of` them.
    """
    kind = KINDS[dtype]
    sign = _sign(kind)
    lossy = level.name != "lossless"
    survivors = np.flatnonzero(words & ~sign if lossy else words)  # only a lossless block keeps -0.0
    sparse = lossy or words.size - survivors.size >= words.size // 8
    kept = words[survivors] if sparse else words
    magnitudes, exact, length = kept & ~sign, b"", 0.0
    if lossy:
        codes, length = _quantize(magnitudes, dtype, level, step)
        wrong = codes == 0
        exact = _compress(magnitudes[wrong].view(kind.number), effort)
        magnitudes = codes
        kind = KINDS[torch.uint16]
    gaps = _compress(np.diff(survivors, prepend=-1).astype(np.uint32) - np.uint32(1), effort) if sparse else b""
    coded = _compress(magnitudes.view(kind.number), effort)
    signs = np.packbits(kept & sign != 0, bitorder="little").tobytes() if sign else b""
    head = _HEAD.pack(sparse, _CODES[level.name], 0, kept.size, len(gaps), len(coded), len(exact), length)
    return head + gaps + signs + coded + exact


class Decoder:
    """Decodes blocks, one after the other; keeps its buffers between them: fresh memory costs more than decoding."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def room(self, size: int) -> memoryview:
        """Return memory to read a block into; it is the same for each block."""
        return self._buffer("data", size, np.uint8).data

    def __call__(self, data: bytes | memoryview, dtype: torch.dtype, out: Words) -> None:
        """Decode one block into `out`, flat words of the block's size, overwriting all of them.

        Raises:
            CodingError: the bytes are no such block.
        """
        kind = KINDS[dtype]
        sparse, how, count, step, (gaps, signs, coded, exact) = _sections(data, kind, out.size)
        if how != _EXACT and dtype not in _STEP_DTYPES:
            raise CodingError(f"has a block that says that a {dtype} lost bits")
        kept = self._buffer("kept", count, kind.word) if sparse else out
        if how == _EXACT:
            _decompress(coded, kept.view(kind.number))
        else:
            codes = self._buffer("codes", count, np.uint16)
            _decompress(coded, codes)
            kept[:] = _restore(codes, dtype, how, step)
            wrong = np.flatnonzero(codes == 0)
            exactly = np.empty(wrong.size, kind.word)
            _decompress(exact, exactly.view(kind.number))
            kept[wrong] = exactly
        if kind.signed:
            _sign_all(kept, np.frombuffer(signs, np.uint8))
        if sparse:
            distances = self._buffer("distances", count, np.uint32)
            _decompress(gaps, distances)
            distances[1:] += np.uint32(1)
            places = np.cumsum(distances, out=self._buffer("places", count, np.int64))
            if count and places[-1] >= out.size:
                raise CodingError("has a block with numbers beyond its end")
            out.fill(0)
            out[places] = kept

    def _buffer(self, name: str, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        size = count * np.dtype(dtype).itemsize
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, np.uint8)
        return self._buffers[name][:size].view(dtype)


def _sections(data: bytes | memoryview, kind: Kind, size: int) -> tuple[bool, int, int, float, list[memoryview]]:
    """Take a block apart: sparse, how numbers are coded, their count, the step; gaps, signs, magnitudes, exact ones."""
    if len(data) < _HEAD.size:
        raise CodingError("has a block that is cut short")
    sparse, how, zero, count, *lengths, step = _HEAD.unpack_from(data)
    ends = list(accumulate([_HEAD.size, lengths[0], -(-count // 8) if kind.signed else 0, *lengths[1:]]))
    dense = not sparse and how == _EXACT and count == size and not lengths[0]
    if sparse > 1 or how > _STEPS or zero or count > size or ends[-1] != len(data) or not (sparse or dense):
        raise CodingError("has a block that contradicts itself")
    return bool(sparse), how, count, step, [memoryview(data)[start:stop] for start, stop in pairwise(ends)]


def _step(magnitudes: npt.NDArray[np.float64], level: Level) -> float:
    """The step for some magnitudes, none of them zero."""
    with np.errstate(all="ignore"):
        finite = magnitudes[np.isfinite(magnitudes)]
        usual = magnitudes[magnitudes <= _OUTLIER * np.median(finite)] if finite.size else magnitudes
        return level.step * float(np.sqrt(np.square(usual).mean())) if usual.size else 0.0


def _quantize(magnitudes: Words, dtype: torch.dtype, level: Level, given: float | None) -> tuple[Words, float]:
    """Give each magnitude a code of 16 bits, 0 where that would make it zero or infinite; and the step."""
    values = torch.from_numpy(magnitudes.view(np.uint8)).view(dtype)
    how, step = _CODES[level.name], 0.0
    if how == _STEPS:
        wide = values.double().numpy()
        step = _step(wide, level) if given is None else given
        with np.errstate(all="ignore"):  # NaN, infinite and huge numbers get no code
            steps = np.rint(wide / step)
            codes = np.where(steps <= MOST_STEPS, np.maximum(steps, 1), 0).astype(np.uint16)
    else:
        narrow = values.to(torch.float16 if how == _FP16 else torch.bfloat16)
        codes = narrow.view(torch.uint8).numpy().view(np.uint16)
    restored = torch.from_numpy(_restore(codes, dtype, how, step).view(np.uint8)).view(dtype)
    return np.where((restored != 0) & torch.isfinite(restored), codes, np.uint16(0)), step


def _restore(codes: Words, dtype: torch.dtype, how: int, step: float) -> Words:
    """The magnitudes that codes stand for, as words of the dtype."""
    if how == _STEPS:
        wide = np.float64 if dtype is torch.float64 else np.float32
        with np.errstate(all="ignore"):  # what overflows is stored exactly
            values = torch.from_numpy(codes.astype(wide) * wide(step))
    else:
        values = torch.from_numpy(codes.view(np.uint8)).view(torch.float16 if how == _FP16 else torch.bfloat16)
    fresh = torch.empty(len(codes), dtype=dtype).copy_(values)
    return words_of(fresh)


def _sign_all(words: Words, signs: npt.NDArray[np.uint8]) -> None:
    """Set the highest bit of each word whose bit in `signs` is set."""
    shift = words.dtype.type(8 * words.itemsize - 1)
    for start in range(0, words.size, _CACHED):
        piece = words[start : start + _CACHED]
        highest = np.unpackbits(signs[start // 8 :], count=piece.size, bitorder="little").astype(words.dtype)
        highest <<= shift
        piece |= highest


def _sign(kind: Kind) -> Any:
    return kind.word.type(1 << (8 * kind.word.itemsize - 1) if kind.signed else 0)


def _compress(numbers: npt.NDArray[Any], effort: int) -> bytes:
    config = ChunkConfig(
        compression_level=effort,
        mode_spec=ModeSpec.auto(),
        delta_spec=DeltaSpec.auto() if numbers.dtype.kind == "i" else DeltaSpec.no_op(),  # positions, not weights
        paging_spec=PagingSpec.equal_pages_up_to(_PAGE),
        enable_8_bit=True,
    )
    return bytes(standalone.simple_compress(numbers, config)) if numbers.size else b""


def _decompress(data: memoryview, out: npt.NDArray[Any]) -> None:
    if not out.size:
        if data:
            raise CodingError("has a block with numbers that nothing asks for")
        return
    try:
        progress = standalone.simple_decompress_into(bytes(data), out)
    except BaseException as error:  # a panic of the decoder is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CodingError(f"has a block that cannot be decoded ({error})") from error
        raise
    if progress.n_processed != out.size or not progress.finished:
        raise CodingError("has a block with more or fewer numbers than it says")
