"""The scores of one tensor, or of the part of it that is here, read in pieces: what a selection ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import NotFiniteError
from secateur.scores import Score, evaluate, magnitude
from secateur.sharding import Place
from secateur.support import bits
from secateur.support.bits import Indices


class Source(Protocol):
    """A tensor that is not in memory and is read in pieces."""

    dtype: torch.dtype
    device: torch.device

    def numel(self) -> int:
        """Numbers in the tensor."""

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index of the first number, flat piece)` in row-major order; a piece lasts until the next."""

    def at(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Return the numbers at some row-major indices (ascending)."""


@dataclass(frozen=True)
class Stream:
    """The scores of one tensor, read in pieces.

    Attributes:
        name: of the tensor, for messages.
        values: the scores, or the weights if `score` is given.
        score: an elementwise score of the weights, called on flat pieces.
        kept: bits of the weights kept so far; those pruned already rank below all others.
        protected: row-major indices of `values` that are never pruned; they rank above all others.
        group: weights that stand behind each score (more than 1 where a pattern prunes them together).
        here: whether this process counts it; False only where processes work together, and another one does.
        legal: scores that are not +inf, where that is known without looking.
        place: where `values` lie in the whole tensor, if they are a shard of it.
    """

    name: str
    values: Tensor | Source
    score: Score | None = None
    kept: Tensor | None = None
    protected: range = range(0)
    group: int = 1
    here: bool = True
    legal: int | None = None
    place: Place | None = None

    @property
    def size(self) -> int:
        """Scores of the whole tensor."""
        return self.values.numel() if self.place is None else self.place.numel

    @property
    def wide(self) -> bool:
        """Whether single precision does not hold all its scores."""
        narrow = torch.float16, torch.bfloat16, torch.float32, torch.complex64
        return self.values.dtype not in narrow or (self.score not in (None, magnitude))

    def pieces(
        self, dtype: torch.dtype, *, check: bool = False, within: range | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index of the first, scores)` in row-major order, flat, as `dtype`.

        -inf where pruned, +inf where protected. A piece lasts until the next one: they may share their memory.

        Args:
            dtype: of the scores.
            check: look for NaN and inf in magnitudes.
            within: of the whole tensor; pieces that hold none of these indices are left out.
        """
        room = torch.empty(0, dtype=dtype, device=self.values.device)
        for start, raw in _chunks(self.values):
            if within is not None:
                first, last = self.ends(start, raw.numel())
                if last < within.start or first >= within.stop:
                    continue
            if self.score is magnitude and not raw.is_complex():
                room = room if room.numel() >= raw.numel() else room.new_empty(raw.numel())
                scores = room[: raw.numel()]
                scores = torch.abs(raw, out=scores) if raw.dtype == dtype else scores.copy_(raw).abs_()
            else:
                scores = self._scored(raw)
            if check and self.score is magnitude and not math.isfinite(_highest(scores)):
                require_finite(self.name, self.values)
            yield start, self._ranked(scores.to(dtype), start)

    def whole(self, indices: Indices) -> Indices:
        """The row-major indices in the whole tensor of some in `values`; both ascend."""
        return indices if self.place is None else self.place.to_whole(indices)

    def ends(self, start: int, count: int) -> tuple[int, int]:
        """The first and the last index in the whole tensor of a piece of `values`, which is not empty."""
        first, last = self.whole(np.array([start, start + count - 1])).tolist()
        return first, last

    def sample(self, indices: Indices, dtype: torch.dtype) -> Tensor:
        """Return the scores at some row-major indices of `values` (a protected one may show its own score)."""
        where = torch.from_numpy(indices).to(self.values.device)
        values = self.values
        taken = values.detach().reshape(-1)[where] if isinstance(values, Tensor) else values.at(indices)
        scores = self._scored(taken)
        if self.kept is not None:
            kept = (self.kept[where // 8] >> (where % 8).to(torch.uint8)) & 1
            scores = scores.masked_fill(kept == 0, -math.inf)
        return scores.to("cpu", dtype)

    def bare(self, least: float) -> Stream:
        """This stream without its bits, where only scores from `least` on are looked at: quicker to read.

        The caller leaves out what is pruned, by the bits. With -inf, or protected weights, it is the stream itself.
        """
        return self if least == -math.inf or self.protected else replace(self, kept=None)

    def _scored(self, raw: Tensor) -> Tensor:
        if self.score is None:
            return raw
        if self.score is magnitude:
            return raw.abs()
        return zeros_first(evaluate(self.score, self.name, raw), raw)

    def _ranked(self, scores: Tensor, start: int) -> Tensor:
        stop = start + scores.numel()
        if self.kept is not None:
            scores = bits.floor(scores, self.kept, start)
        first, last = max(self.protected.start, start), min(self.protected.stop, stop)
        if first < last:
            scores = scores.clone()
            scores[first - start : last - start] = math.inf
        return scores


def zeros_first(scores: Tensor, weights: Tensor) -> Tensor:
    """Rank weights that are zero already below the others, so that they count towards the budget, unless protected."""
    return scores.masked_fill((weights == 0) & (scores < math.inf), torch.finfo(scores.dtype).min)


def require_finite(name: str, weight: Tensor | Source) -> None:
    """See that a tensor holds neither NaN nor inf.

    Raises:
        NotFiniteError: it does; the message counts them.
    """
    for _, piece in _chunks(weight):
        if not bool(torch.isfinite(piece.sum())):  # a sum may also overflow: count before judging
            tests = torch.isnan, torch.isinf
            nan, inf = (sum(int(test(part).sum()) for _, part in _chunks(weight)) for test in tests)
            if nan or inf:
                raise NotFiniteError(
                    f"{name} holds {nan:,} NaN and {inf:,} inf among {weight.numel():,} weights, so its scores mean "
                    "nothing: go back to a sound checkpoint, or repair it with torch.nan_to_num_"
                )
            return


def _chunks(values: Tensor | Source) -> Iterator[tuple[int, Tensor]]:
    return bits.chunks(values.detach()) if isinstance(values, Tensor) else values.chunks()


def _highest(scores: Tensor) -> float:
    """The highest score; NaN if there is one."""
    narrow = scores.dtype == torch.bfloat16 or not bits.on_cpu(scores)
    return float(scores.max() if narrow else scores.numpy().max())
