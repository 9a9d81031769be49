"""Legal shapes of zeros: free, n:m, blocks, rows, columns.

A pattern turns the scores of a tensor into one score for each group of weights that goes or stays together, and
the groups that stay back into a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

import torch
from torch import Tensor

from secateur.errors import InputError, InputTypeError, PatternError

Tail = Literal["error", "keep"]


class Pattern(Protocol):
    """What every pattern can do; `dim` is the input dimension of the tensor."""

    @property
    def sparsity(self) -> Fraction | None:
        """The one sparsity that the pattern allows, or None if it allows any."""

    def legal(self, shape: Sequence[int], dim: int) -> int:
        """The most weights of a tensor of this shape that may go."""

    def check(self, name: str, shape: torch.Size, dim: int) -> None:
        """Raise a PatternError where the pattern cannot be laid on a tensor of this shape."""

    def group(self, shape: torch.Size) -> int:
        """Weights in a group."""

    def reduce(self, scores: Tensor, dim: int) -> Tensor:
        """One score for each group; +inf for a group that must stay."""

    def expand(self, kept: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """The mask of a tensor of this shape, from one boolean for each group (flat)."""


@dataclass(frozen=True)
class n_m:
    """At most `n` of every `m` weights along the input dimension stay: `n_m(2, 4)` is 2:4.

    On the way to the target a schedule prunes only weights that the pattern of that moment would prune.

    Args:
        n: weights kept of each group, 0 < n < m.
        m: weights in a group.
        tail: what to do with an input dimension that is no multiple of m: "error", or "keep" the rest dense.
    """

    n: int
    m: int
    tail: Tail = "error"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise InputError(f"n_m({self.n}, {self.m}): n of m weights are kept, so 0 < n < m")
        _check_tail(self.tail)

    @property
    def sparsity(self) -> Fraction:
        """1 - n / m."""
        return Fraction(self.m - self.n, self.m)

    def legal(self, shape: Sequence[int], dim: int) -> int:
        """m - n of each whole group."""
        return math.prod(shape) // max(shape[dim], 1) * (shape[dim] // self.m) * (self.m - self.n)

    def check(self, name: str, shape: torch.Size, dim: int) -> None:
        """See that the input dimension is a multiple of m, or that its tail may stay dense."""
        if len(shape) <= dim:
            raise PatternError(f"{name} of shape {tuple(shape)} has no input dimension: leave it out of the scope")
        if shape[dim] % self.m and self.tail == "error":
            raise PatternError(
                f"{name} of shape {tuple(shape)} has {shape[dim]} inputs, no multiple of {self.m}: keep the last "
                f"{shape[dim] % self.m} dense with n_m({self.n}, {self.m}, tail='keep'), or leave it out of the scope"
            )

    def group(self, shape: torch.Size) -> int:
        """Weights are pruned one by one."""
        return 1

    def reduce(self, scores: Tensor, dim: int) -> Tensor:
        """The scores, +inf for the n highest of each group (of equals, the later ones stay) and for the tail."""
        reduced = torch.full_like(scores, math.inf)
        whole = scores.shape[dim] // self.m * self.m
        rows = scores.movedim(dim, -1)[..., :whole]
        rows = rows.reshape(*rows.shape[:-1], whole // self.m, self.m)
        lowest = rows.argsort(dim=-1, stable=True)[..., : self.m - self.n]
        chosen = torch.full_like(rows, math.inf).scatter(-1, lowest, rows.gather(-1, lowest))
        reduced.movedim(dim, -1)[..., :whole] = chosen.flatten(-2)
        return reduced

    def expand(self, kept: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """The mask itself."""
        return kept.view(shape)


@dataclass(frozen=True)
class blocks:
    """Blocks of `height` outputs by `width` inputs go together; further dimensions (kernels) weight by weight.

    A block scores the mean of its weights. The sparsity is met to the nearest whole block.

    Args:
        height: of a block, along the first dimension of the tensor.
        width: of a block, along the second.
        tail: what to do with a dimension that is no multiple: "error", or "keep" the rest dense.
    """

    height: int
    width: int
    tail: Tail = "error"

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise InputError(f"blocks({self.height}, {self.width}): both sides must be at least 1")
        _check_tail(self.tail)

    @property
    def sparsity(self) -> None:
        """Any."""
        return None

    def legal(self, shape: Sequence[int], dim: int) -> int:
        """All but the tails."""
        return math.prod((shape[0] // self.height * self.height, shape[1] // self.width * self.width, *shape[2:]))

    def check(self, name: str, shape: torch.Size, dim: int) -> None:
        """See that both dimensions are multiples, or that their tails may stay dense."""
        if len(shape) < 2:
            raise PatternError(f"{name} of shape {tuple(shape)} has no blocks: leave it out of the scope")
        if (shape[0] % self.height or shape[1] % self.width) and self.tail == "error":
            raise PatternError(
                f"{name} of shape {tuple(shape)} is not divisible into blocks of {self.height} x {self.width}: keep "
                f"the rest dense with blocks({self.height}, {self.width}, tail='keep'), or leave it out of the scope"
            )

    def group(self, shape: torch.Size) -> int:
        """height x width."""
        return self.height * self.width

    def reduce(self, scores: Tensor, dim: int) -> Tensor:
        """The mean of each whole block, shape [rows of blocks, columns of blocks, ...]."""
        high, wide = scores.shape[0] // self.height, scores.shape[1] // self.width
        whole = scores[: high * self.height, : wide * self.width]
        grid = whole.reshape(high, self.height, wide, self.width, *scores.shape[2:])
        return grid.mean((1, 3))

    def expand(self, kept: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """Each block repeated over its weights; the tails stay."""
        mask = torch.ones(shape, dtype=torch.bool, device=kept.device)
        high, wide = shape[0] // self.height, shape[1] // self.width
        grid = kept.view(high, wide, *shape[2:])
        whole = grid.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)
        mask[: high * self.height, : wide * self.width] = whole
        return mask


@dataclass(frozen=True)
class lines:
    """Whole slices of a tensor go together: `lines(0)` are rows (outputs), `lines(1)` columns (inputs).

    A slice scores the mean of its weights. The sparsity is met to the nearest whole slice. The shapes stay.

    Args:
        along: the dimension that counts the slices, 0 or 1.
    """

    along: int

    def __post_init__(self) -> None:
        if self.along not in (0, 1):
            raise InputError(f"lines({self.along!r}): choose 0 for rows (outputs) or 1 for columns (inputs)")

    @property
    def sparsity(self) -> None:
        """Any."""
        return None

    def legal(self, shape: Sequence[int], dim: int) -> int:
        """All."""
        return math.prod(shape)

    def check(self, name: str, shape: torch.Size, dim: int) -> None:
        """See that the tensor has such slices."""
        if len(shape) < 2:
            raise PatternError(f"{name} of shape {tuple(shape)} has no rows and columns: leave it out of the scope")

    def group(self, shape: torch.Size) -> int:
        """Weights in a slice."""
        return shape.numel() // shape[self.along]

    def reduce(self, scores: Tensor, dim: int) -> Tensor:
        """The mean of each slice, shape [slices]."""
        return scores.movedim(self.along, 0).flatten(1).mean(1)

    def expand(self, kept: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """Each slice repeated over its weights."""
        view = [-1 if d == self.along else 1 for d in range(len(shape))]
        return kept.view(view).expand(shape)


rows = lines(0)
columns = lines(1)

_BY_NAME: dict[str, Pattern | None] = {"free": None, "rows": rows, "columns": columns}


def resolve(pattern: str | Pattern | None) -> Pattern | None:
    """Turn what a user may pass as `pattern=` into a pattern; None is the free one."""
    if isinstance(pattern, str):
        if pattern not in _BY_NAME:
            known = ", ".join(_BY_NAME)
            raise InputError(f"no pattern named {pattern!r}: choose {known}, or sc.n_m(2, 4), sc.blocks(4, 4)")
        return _BY_NAME[pattern]
    if pattern is not None and not hasattr(pattern, "reduce"):
        raise InputTypeError(f"pattern is a {type(pattern).__name__}: give sc.n_m(2, 4), sc.blocks(4, 4) or a name")
    return pattern


def _check_tail(tail: str) -> None:
    if tail not in ("error", "keep"):
        raise InputError(f"tail={tail!r}: choose 'error' or 'keep'")
