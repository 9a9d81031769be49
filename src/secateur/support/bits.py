"""One bit a weight: pack, unpack, count, and set the pruned weights of a tensor to +0.0.

Bit `i % 8` of byte `i // 8` tells whether weight `i`, in row-major order, is kept; the spare bits of the last
byte are 0. The bits live on the device of the weights. On a CPU numpy does the work; elsewhere torch does.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]
"""Row-major indices of numbers in a tensor, or indices along one of its dimensions."""

CHUNK = 1 << 18
"""Weights handled at a time: about as many as stay in a core's cache. A multiple of 8."""

SMALL = 1 << 16
"""Weights of a tensor, at most, whose mask is held ready: there a look-up would take longer than the AND."""

_BYTES = np.arange(256, dtype=np.uint8)[:, None]
_ONES = np.unpackbits(_BYTES, axis=1, bitorder="little")  # [256, 8]: the bits of each byte
_CAPS = np.where(_ONES, np.inf, -np.inf)
"""For each byte of mask what the scores of eight weights are at most: those of pruned ones are -inf."""
_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_KEPT = {
    **{size: -_ONES.astype(f"i{size}") for size in _WORD},
    16: -np.repeat(_ONES, 2, axis=1).astype("i8"),  # two words a weight
}
"""By bytes a weight, what a byte of mask keeps of eight weights: words of ones or zeros, which are ANDed with them."""


_TENSORS = "torch.distributed.tensor"  # which takes long to import: a DTensor exists only where somebody has


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, of which a process holds a part."""
    return _TENSORS in sys.modules and isinstance(tensor, sys.modules[_TENSORS].DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here, detached, in the memory of the tensor; of one that is no DTensor all of it."""
    if is_sharded(tensor):
        found: Any = tensor
        with torch.no_grad():  # of which autograd, and detach() of a DTensor, would take a hundred times as long
            tensor = found.to_local()
    return tensor.detach()


def valueless(name: str, tensor: Tensor) -> str:
    """That a tensor on the meta device holds no values and what to do; its class may know better, as `remedy`."""
    remedy = getattr(tensor, "remedy", "materialise it first (to_empty, then load)")
    return f"{name} is on the meta device and holds no values: {remedy}"


def on_cpu(tensor: Tensor) -> bool:
    """Whether numpy can do the work; torch gives the same results elsewhere, and on a CPU too, but slower."""
    return tensor.is_cpu


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor holds codes, and not the numbers they stand for: torch's own kinds, and those of torchao."""
    return tensor.is_quantized or type(tensor.data).dequantize is not Tensor.dequantize


def plain(tensor: Tensor) -> Tensor:
    """The numbers that a tensor stands for: itself, or what a quantized or sparse one is made whole to."""
    if tensor.layout is not torch.strided:
        return tensor.detach().to_dense()
    numbers: Tensor = tensor.detach().dequantize() if is_quantized(tensor) else tensor
    return numbers


def chunks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield `(index of the first weight, flat piece)` in row-major order; the pieces are views where they can be.

    Of a DTensor only the part that is here.
    """
    for start, piece in _slices(local(tensor)):
        yield start, piece.reshape(-1)


def _slices(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield views of about CHUNK weights in row-major order, each beginning with a whole byte of its mask."""
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    row = tensor[0].numel() if len(tensor) else 0
    chunk = CHUNK if on_cpu(tensor) else 64 * CHUNK  # an accelerator wants few large kernels
    step = max(8, chunk // max(row, 1) // 8 * 8)
    for first in range(0, len(tensor), step):
        yield first * row, tensor[first : first + step]


def pack(kept: Tensor) -> Tensor:
    """Turn booleans of any shape into bits, `uint8 [ceil(n / 8)]`."""
    flat = kept.reshape(-1)
    if on_cpu(flat):
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, count: int, start: int = 0) -> Tensor:
    """Turn bits back into `count` booleans, flat, from weight `start` on (a multiple of 8)."""
    bits = bits[start // 8 : (start + count + 7) // 8]
    if on_cpu(bits):
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little").view(np.bool_))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).view(-1)[:count].bool()


def floor(scores: Tensor, bits: Tensor, start: int = 0) -> Tensor:
    """Return flat real scores, which begin at weight `start` (a multiple of 8), with -inf where the bit is 0."""
    kept = bits[start // 8 : (start + scores.numel() + 7) // 8]
    if not on_cpu(scores):
        return scores.masked_fill(~unpack(kept, scores.numel()), -math.inf)
    values = scores.numpy()
    caps = _CAPS.astype(values.dtype).take(kept.numpy(), axis=0).reshape(-1)[: values.size]
    return torch.from_numpy(np.minimum(values, caps, out=caps))


def pack_rows(kept: Tensor) -> Tensor:
    """Turn booleans into bits, `uint8 [rows, ceil(n / 8)]`: each row of n by itself, so that they can be dealt out."""
    rows = kept.reshape(len(kept), math.prod(kept.shape[1:]))
    padded = rows.new_zeros(len(rows), -(-rows.shape[1] // 8) * 8)
    padded[:, : rows.shape[1]] = rows
    return pack(padded).view(len(rows), padded.shape[1] // 8)


def unpack_rows(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Turn bits of rows back into booleans of this shape."""
    found = unpack(bits.reshape(-1), bits.numel() * 8).view(len(bits), bits.shape[1] * 8)
    return found[:, : math.prod(shape[1:])].reshape(shape)


def count(bits: Tensor) -> int:
    """Count the kept weights."""
    array, step = bits.cpu().numpy(), CHUNK // 8
    parts = (array[start : start + step] for start in range(0, array.size, step))
    return sum(int(np.count_nonzero(np.unpackbits(part))) for part in parts)


def alive(tensor: Tensor, bits: Tensor) -> int:
    """Count the pruned weights of `tensor` that are not zero (NaN counts)."""
    total = 0
    for start, piece in chunks(tensor.detach()):
        kept = unpack(bits, piece.numel(), start)
        total += int(torch.count_nonzero((piece != 0) & ~kept))
    return total


def subnormal(values: Tensor) -> Tensor:
    """Tell which floating-point numbers are subnormal, by their bits: a comparison may miss them."""
    words, normal = _words(values)
    magnitude = words & torch.iinfo(words.dtype).max  # all but the sign
    return (magnitude > 0) & (magnitude < normal)


def lift_subnormals(values: Tensor) -> None:
    """Replace subnormal numbers, in place, by the smallest normal one of their sign: zeros stay as many as they are."""
    values = torch.view_as_real(local(values)) if values.is_complex() else local(values)
    words, normal = _words(values)
    words.copy_(torch.where(subnormal(values), words & torch.iinfo(words.dtype).min | normal, words))


def _words(values: Tensor) -> tuple[Tensor, int]:
    """View floating-point numbers as integers of their size, and give the smallest normal one as such."""
    integer = _WORD[values.element_size()]
    tiny = torch.tensor(torch.finfo(values.dtype).tiny, dtype=values.dtype)
    return values.view(integer), int(tiny.view(integer))


class _Ready(NamedTuple):
    """For the bits of a small tensor: what they keep, and the tensor they were set upon last; both as words."""

    bits: weakref.ref[Tensor]
    kept: Tensor
    words: Tensor
    place: tuple[object, ...]


class Zeroer:
    """Sets pruned weights to +0.0 in place, whatever they hold (inf and NaN too).

    For small tensors the words that their bits stand for are held ready, as long as the bits are there: a million at
    most.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[int, torch.device], Tensor] = {}
        self._ready: dict[tuple[int, torch.dtype], _Ready] = {}  # by the ids of the bits
        self._room = 1 << 20

    def __reduce__(self) -> tuple[type[Zeroer], tuple[()]]:
        return Zeroer, ()

    def __call__(self, tensor: Tensor, bits: Tensor) -> None:
        """Zero the weights of `tensor` whose bit is 0; `tensor` may require grad, its version is raised.

        Of a DTensor only the part that is here. The bits are never changed afterwards.
        """
        tensor = local(tensor) if is_sharded(tensor) else tensor
        key = id(bits), tensor.dtype
        ready = self._ready.get(key)
        if ready is None or ready.place != _place(tensor):
            if ready is None and tensor.numel() > min(SMALL, self._room):
                self._by_chunks(tensor.detach(), bits.to(tensor.device))
                return
            ready = self._ready[key] = self._prepared(tensor.detach(), bits, key)
        ready.words.bitwise_and_(ready.kept)

    def _prepared(self, tensor: Tensor, bits: Tensor, key: tuple[int, torch.dtype]) -> _Ready:
        words, before = _integers(tensor), self._ready.get(key)
        if before is not None and before.kept.shape == words.shape and before.kept.device == words.device:
            return before._replace(words=words, place=_place(tensor))
        kept = self._words(tensor, bits.to(tensor.device))  # the model may have moved since its masks were made
        if before is not None:
            return _Ready(before.bits, kept, words, _place(tensor))

        def gone(_: object) -> None:
            del self._ready[key]
            self._room += size

        size = tensor.numel()
        self._room -= size
        return _Ready(weakref.ref(bits, gone), kept, words, _place(tensor))

    def _by_chunks(self, tensor: Tensor, bits: Tensor) -> None:
        if on_cpu(tensor) and tensor.is_contiguous():
            _zero(_integers(tensor).view(-1).numpy(), bits.numpy(), _KEPT[tensor.element_size()])
            torch.autograd.graph.increment_version(tensor)
            return
        for start, piece in _slices(tensor):
            _integers(piece).bitwise_and_(self._words(piece, bits[start // 8 : (start + piece.numel() + 7) // 8]))

    def _words(self, tensor: Tensor, bits: Tensor) -> Tensor:
        """Words of ones or zeros, as `_integers` would view the tensor."""
        key = (tensor.element_size(), tensor.device)
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(_KEPT[key[0]]).to(tensor.device)
        like = _integers(tensor)
        return self._tables[key].index_select(0, bits.int()).view(-1)[: like.numel()].view(like.shape)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where the numbers of a tensor lie in memory, and in what order."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device


def _integers(tensor: Tensor) -> Tensor:
    """View numbers as integers of their size; complex ones of 16 bytes as two, in a last dimension."""
    tensor = torch.view_as_real(tensor) if tensor.element_size() == 16 else tensor
    return tensor.view(_WORD[tensor.element_size()])


def _zero(words: npt.NDArray[Any], bits: npt.NDArray[np.uint8], table: npt.NDArray[Any]) -> None:
    each = table.shape[1] // 8  # words a weight
    for start in range(0, words.size, CHUNK * each):
        piece = words[start : start + CHUNK * each]
        first = start // each // 8
        kept = table.take(bits[first : first + CHUNK // 8], axis=0).reshape(-1)
        np.bitwise_and(piece, kept[: piece.size], out=piece)
