"""Second moments of what a matrix of weights reads, and which tensors make up that matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Some outputs of one tensor: rows of its matrix [outputs, inputs x kernel], all of which read the same numbers.

    Attributes:
        name: of the tensor, in the model.
        start: the first of the rows.
        stop: the one after the last.
    """

    name: str
    start: int
    stop: int


def titles(several: Sequence[Sequence[Piece]]) -> list[str]:
    """Names of matrices by those of their tensors; with the rows where several are of the same ones, as in a GRU."""
    plain = [" + ".join(piece.name for piece in pieces) for pieces in several]
    return [
        name if plain.count(name) == 1 else " + ".join(f"{piece.name}[{piece.start}:{piece.stop}]" for piece in pieces)
        for name, pieces in zip(plain, several, strict=True)
    ]


@dataclass(frozen=True)
class Moments:
    """What the matrix of some tensors reads: sums over the samples.

    The error of weights W in place of T is tr((W - T) H (W - T)^T) with H the sum of x x^T over the inputs x.

    Attributes:
        pieces: the tensors, side by side: their columns together are the inputs. A Linear is one piece; the input and
            the hidden side of a recurrent layer are two.
        gram: H, float64 [groups, inputs, inputs]: one for each group of a convolution, or expert, and each is read by
            rows / groups of the outputs in turn. Layers that see the same input share the very tensor.
        count: samples that were summed, int64 [groups].
    """

    pieces: tuple[Piece, ...]
    gram: Tensor
    count: Tensor

    def emptied(self) -> Moments:
        """The same without the numbers of H, only its shape, for where these are needed no longer."""
        return replace(self, gram=self.gram.new_empty(()).expand(self.gram.shape))

    @property
    def groups(self) -> int:
        """Matrices that stand one below another, each with inputs of its own."""
        return self.gram.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return self.gram.shape[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors."""
        return tuple(piece.name for piece in self.pieces)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Lay the tensors side by side, [groups, rows, inputs]; a copy.

        Args:
            tensors: by name, each with its outputs first ([outputs, inputs, *kernel]).
        """
        parts = [tensors[name][start:stop].flatten(1) for name, start, stop in self.pieces]
        whole = torch.cat(parts, 1)
        return whole.view(self.groups, -1, whole.shape[1])

    def parts(self, matrix: Tensor, shapes: Mapping[str, Sequence[int]]) -> list[tuple[Piece, Tensor]]:
        """Take a matrix [groups, rows, inputs] apart again: for each piece its rows [rows, inputs, *kernel].

        Args:
            matrix: as `matrix` laid it out: of weights, of bools.
            shapes: of the whole tensors, outputs first.
        """
        found, at = [], 0
        flat = matrix.flatten(0, 1)
        for piece in self.pieces:
            shape = shapes[piece.name]
            columns = torch.Size(shape[1:]).numel()
            found.append((piece, flat[:, at : at + columns].reshape(-1, *shape[1:])))
            at += columns
        return found
