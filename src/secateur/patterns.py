"""Legal shapes of zeros: free, n:m, blocks, rows, columns.

A pattern sees each tensor as [outputs, inputs, *kernel], however its layer stores it. It turns the scores of a tensor
into one score for each group of weights that goes or stays together, and the groups that stay back into a mask.

`print(sc.patterns.PATTERNS)` lists those that have a name. A new one is a class under `@pattern("name")`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from secateur.errors import InputError, InputTypeError, PatternError
from secateur.support import bits, checks
from secateur.support.registry import Registry

Tail = Literal["error", "keep"]
_C = TypeVar("_C", bound=Callable[..., Any])


class Pattern(Protocol):
    """What every pattern can do. Each shape and tensor is [outputs, inputs, *kernel].

    More is read where a pattern has it. `rowwise`, a bool: each group lies within one output, so that some outputs may
    be looked at without the others, which is how files are pruned. `cells(shape)`, a method: how far a group reaches
    along each dimension, from multiples of that on, so that parts of a tensor that cut none may be looked at one by
    one, which is how sharded models are pruned. `joined`, a method (see `Joined`): groups that span several tensors.
    """

    @property
    def sparsity(self) -> Fraction | None:
        """The one sparsity that the pattern allows, or None if it allows any."""

    def legal(self, shape: Sequence[int]) -> int:
        """The most weights of a tensor of this shape that may go."""

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise a PatternError where the pattern cannot be laid on a tensor of this shape."""

    def group(self, shape: torch.Size) -> int:
        """Weights in a group."""

    def reduce(self, scores: Tensor, count: int) -> Tensor:
        """One score for each group; +inf for a group that must stay.

        `count` weights of the tensor are to go. Where all tensors are ranked together, it is the even share of this
        one, and what it loses in the end may be more or less.
        """

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """The mask of a tensor of this shape, from one boolean for each group (flat)."""


@runtime_checkable
class Joined(Protocol):
    """A pattern whose groups span tensors, such as a unit with all its weights."""

    def joined(self, names: Sequence[str]) -> Sequence[Mapping[str, int]]:
        """Which tensors are laid side by side, and along which dimension of each: 0 (outputs) or 1 (inputs).

        The dimensions must be of one size, n: the pattern sees a single tensor [n, all weights of each].
        """


class Slices(NamedTuple):
    """Slices of one tensor, as it is stored, of which each belongs to a group.

    Attributes:
        name: of the tensor.
        dim: the dimension that is sliced.
        at: positions along it, [groups][times].
    """

    name: str
    dim: int
    at: tuple[tuple[int, ...], ...]


@runtime_checkable
class Picked(Protocol):
    """A pattern whose groups are slices of several tensors, wherever these lie; all other weights stay."""

    def picked(self) -> Sequence[Sequence[Slices]]:
        """Slices that are laid side by side, equally many of each: the pattern sees a tensor [groups, all weights]."""


PATTERNS: Registry[Any] = Registry("pattern", "an object such as sc.n_m(2, 4)")
"""The patterns that have a name."""


def pattern(name: str, *, source: str = "") -> Callable[[_C], _C]:
    """Give a class of patterns a name, under which `prune(pattern=name)`, errors and the docs know it.

    The class is called without arguments. If it has an attribute `written`, a regular expression, a text of that form
    chooses it as well, and the numbers in it are its arguments: "2:4" is `n_m(2, 4)`.

    Args:
        name: of the pattern; where there is a `written`, an example of it.
        source: the paper and equation it comes from.

    Raises:
        InputError: another pattern has that name.
    """

    def register(made: _C) -> _C:
        PATTERNS.add(name, made, source=source)
        return made

    return register


PATTERNS.add("free", None, meaning="any weights: no pattern")


@pattern("2:4", source='Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"')
@dataclass(frozen=True)
class n_m:
    """At most `n` of every `m` weights along the input dimension stay: `n_m(2, 4)` is 2:4.

    On the way to the target a schedule prunes only weights that the pattern of that moment would prune.

    Args:
        n: weights kept of each group, 0 < n < m.
        m: weights in a group.
        tail: what to do with an input dimension that is no multiple of m: "error", or "keep" the rest dense.
    """

    written: ClassVar[str] = r"(\d+):(\d+)"
    rowwise: ClassVar[bool] = True

    n: int
    m: int
    tail: Tail = "error"

    def __post_init__(self) -> None:
        checks.whole("n", self.n)
        checks.whole("m", self.m)
        if not 0 < self.n < self.m:
            raise InputError(f"n_m({self.n}, {self.m}): n of m weights are kept, so 0 < n < m")
        _check_tail(self.tail)

    @property
    def sparsity(self) -> Fraction:
        """1 - n / m."""
        return Fraction(self.m - self.n, self.m)

    def legal(self, shape: Sequence[int]) -> int:
        """m - n of each whole group."""
        return math.prod(shape) // max(shape[1], 1) * (shape[1] // self.m) * (self.m - self.n)

    def check(self, name: str, shape: torch.Size) -> None:
        """See that the input dimension is a multiple of m, or that its tail may stay dense."""
        if len(shape) < 2:
            raise PatternError(f"{name} of shape {tuple(shape)} has no input dimension: leave it out of the scope")
        if shape[1] % self.m and self.tail == "error":
            raise PatternError(
                f"{name} of shape {tuple(shape)} has {shape[1]} inputs, no multiple of {self.m}: keep the last "
                f"{shape[1] % self.m} dense with n_m({self.n}, {self.m}, tail='keep'), or leave it out of the scope"
            )

    def group(self, shape: torch.Size) -> int:
        """Weights are pruned one by one."""
        return 1

    def cells(self, shape: Sequence[int]) -> tuple[int, ...]:
        """m inputs."""
        return (1, self.m, *(1 for _ in shape[2:]))

    def reduce(self, scores: Tensor, count: int) -> Tensor:
        """The scores, +inf for the n highest of each group (of equals, the later ones stay) and for the tail."""
        reduced = torch.full_like(scores, math.inf)
        whole = scores.shape[1] // self.m * self.m
        rows = scores.movedim(1, -1)[..., :whole]
        members = [part.contiguous() for part in rows.reshape(*rows.shape[:-1], whole // self.m, self.m).unbind(-1)]
        ranks = [torch.zeros_like(part, dtype=torch.int16) for part in members]
        for later in range(self.m):  # each against each: for groups so small many times faster than sorting them
            for earlier in range(later):
                first = members[earlier] <= members[later]
                ranks[later] += first
                ranks[earlier] += ~first
        kept = [part.masked_fill(rank >= self.m - self.n, math.inf) for part, rank in zip(members, ranks, strict=True)]
        reduced.movedim(1, -1)[..., :whole] = torch.stack(kept, -1).flatten(-2)
        return reduced

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """The mask itself."""
        return kept.view(shape)


@pattern("4x4", source='Narang et al. 2017, "Block-Sparse Recurrent Neural Networks"')
@dataclass(frozen=True)
class blocks:
    """Blocks of `height` outputs by `width` inputs go together; further dimensions (kernels) weight by weight.

    A block scores the mean of its weights. The sparsity is met to the nearest whole block.

    Args:
        height: of a block, in outputs.
        width: of a block, in inputs.
        tail: what to do with a dimension that is no multiple: "error", or "keep" the rest dense.
    """

    written: ClassVar[str] = r"(\d+)x(\d+)"

    height: int
    width: int
    tail: Tail = "error"

    def __post_init__(self) -> None:
        checks.whole("height", self.height)
        checks.whole("width", self.width)
        if self.height < 1 or self.width < 1:
            raise InputError(f"blocks({self.height}, {self.width}): both sides must be at least 1")
        _check_tail(self.tail)

    @property
    def sparsity(self) -> None:
        """Any."""
        return None

    def legal(self, shape: Sequence[int]) -> int:
        """All but the tails."""
        return math.prod((shape[0] // self.height * self.height, shape[1] // self.width * self.width, *shape[2:]))

    def check(self, name: str, shape: torch.Size) -> None:
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

    def cells(self, shape: Sequence[int]) -> tuple[int, ...]:
        """height outputs by width inputs."""
        return (self.height, self.width, *(1 for _ in shape[2:]))

    def reduce(self, scores: Tensor, count: int) -> Tensor:
        """The mean of each whole block, shape [rows of blocks, columns of blocks, ...]."""
        high, wide = scores.shape[0] // self.height, scores.shape[1] // self.width
        whole = scores[: high * self.height, : wide * self.width]
        grid = whole.reshape(high, self.height, wide, self.width, *scores.shape[2:])
        return _sum(_sum(grid, 1), 2) / (self.height * self.width)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
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

    A slice scores the mean of its weights. The sparsity is met to the nearest whole slice. The shapes stay. Rows of
    LSTM, GRU and RNN are those of a gate. The columns of a convolution with groups are the same input of each group.

    Args:
        along: the dimension that counts the slices, 0 (outputs) or 1 (inputs).
    """

    along: int

    @property
    def rowwise(self) -> bool:
        """Rows are."""
        return self.along == 0

    def __post_init__(self) -> None:
        checks.whole("along", self.along)
        if self.along not in (0, 1):
            raise InputError(f"lines({self.along!r}): choose 0 for rows (outputs) or 1 for columns (inputs)")

    @property
    def sparsity(self) -> None:
        """Any."""
        return None

    def legal(self, shape: Sequence[int]) -> int:
        """All."""
        return math.prod(shape)

    def check(self, name: str, shape: torch.Size) -> None:
        """See that the tensor has such slices."""
        if len(shape) < 2:
            raise PatternError(f"{name} of shape {tuple(shape)} has no rows and columns: leave it out of the scope")

    def group(self, shape: torch.Size) -> int:
        """Weights in a slice."""
        return max(shape.numel() // max(shape[self.along], 1), 1)

    def cells(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A whole slice."""
        return tuple(1 if d == self.along else max(n, 1) for d, n in enumerate(shape))

    def reduce(self, scores: Tensor, count: int) -> Tensor:
        """The mean of each slice, shape [slices]."""
        slices = scores.movedim(self.along, 0).flatten(1)
        if not bits.on_cpu(slices):
            return slices.mean(1)
        # numpy adds up each slice alike, whatever the threads and the number of slices
        return torch.from_numpy(slices.contiguous().numpy().mean(1))

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """Each slice repeated over its weights."""
        view = [-1 if d == self.along else 1 for d in range(len(shape))]
        return kept.view(view).expand(shape)


rows: lines = PATTERNS.add("rows", lines(0), meaning="Whole outputs go together")
columns: lines = PATTERNS.add("columns", lines(1), meaning="Whole inputs go together")


def resolve(given: str | Pattern | None) -> Pattern | None:
    """Turn what a user may pass as `pattern=` into a pattern; None is the free one."""
    found = _read(given, "", lambda _: True) if isinstance(given, str) else given
    if found is not None and not hasattr(found, "reduce"):
        raise InputTypeError(f"pattern is {checks.kind(found)}: give sc.n_m(2, 4), sc.blocks(4, 4) or a name")
    return found


def for_files(given: str | Pattern | None) -> Pattern | None:
    """Turn what a user may ask of files into a pattern: one that can be laid on some outputs at a time.

    Raises:
        InputError, InputTypeError: another one; the message lists the choices.
    """
    found = resolve(_read(given, " for files", _rowwise) if isinstance(given, str) else given)
    if not _rowwise(found):
        raise PATTERNS.unknown(str(given), " for files", _rowwise)
    return found


def names_for_files() -> list[str]:
    """The patterns that files take."""
    return PATTERNS.written(_rowwise)


def _rowwise(made: Any) -> bool:
    return made is None or bool(getattr(made, "rowwise", False))


def _read(text: str, where: str, fits: Callable[[Any], bool]) -> Pattern | None:
    for name, choice in PATTERNS.items():
        made: Any = choice.value
        written = re.fullmatch(getattr(made, "written", "(?!)"), text)
        if written is not None or name == text:
            numbers = written.groups() if written is not None else ()
            pattern: Pattern | None = made(*map(int, numbers)) if isinstance(made, type) else made
            return pattern
    raise PATTERNS.unknown(text, where, fits)


def _sum(values: Tensor, dimension: int) -> Tensor:
    """Add up along a dimension, one after another: the same bits whatever lies beside them."""
    first, *others = values.unbind(dimension)
    total = first.clone()
    for other in others:
        total += other
    return total


def _check_tail(tail: str) -> None:
    if tail not in ("error", "keep"):
        raise InputError(f"tail={tail!r}: choose 'error' or 'keep'")
