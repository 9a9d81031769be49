"""Which rows of which weight an operand of a function of torch holds: recognised by its memory, also in views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from secateur.calibration.grams import Matrices
from secateur.scope import Member


@dataclass(frozen=True)
class Held:
    """Rows of a weight's matrix [outputs, inputs], as `anatomy.Layout.outputs_first` lays it out.

    Attributes:
        name: of the weight.
        start: the first row.
        stop: the one after the last.
        groups: matrices among them, one below another.
        inputs: the dimensions of the operand that are inputs, in the order of the columns.
    """

    name: str
    start: int
    stop: int
    groups: int
    inputs: tuple[int, ...]


class Weights:
    """The weights of a scope, by the memory in which they lie.

    Args:
        members: the tensors, by name.
    """

    def __init__(self, members: Mapping[str, Member]) -> None:
        self._places: dict[int, list[_Weight]] = {}
        self.matrices: dict[str, Matrices] = {}
        """What each tensor holds."""
        for name, member in members.items():
            weight = _Weight(name, member)
            self._places.setdefault(_memory(member.parameter), []).append(weight)
            self.matrices[name] = weight.matrices

    def held(self, operand: object, letters: str) -> Held | None:
        """What an operand holds; None if it is no weight, or not one that is read in the way its layout says.

        Args:
            operand: of a product.
            letters: what the product makes of each of its dimensions: "o" outputs, "i" inputs that are summed over,
                "g" matrices side by side.
        """
        if not isinstance(operand, Tensor):
            return None
        found = (weight.held(operand, letters) for weight in self._of(operand))
        return next((one for one in found if one is not None), None)

    def has(self, operand: object) -> bool:
        """Whether an operand lies in the memory of a weight."""
        return isinstance(operand, Tensor) and bool(self._of(operand))

    def kernel(self, operand: object) -> Held | None:
        """The whole kernel of a convolution that an operand is; None if it is none."""
        if not isinstance(operand, Tensor):
            return None
        return next((weight.kernel() for weight in self._of(operand) if weight.is_whole(operand)), None)

    def _of(self, operand: Tensor) -> list[_Weight]:
        return self._places.get(_memory(operand), [])


class _Weight:
    def __init__(self, name: str, member: Member) -> None:
        parameter, layout = member.parameter.detach(), member.layout
        self.name = name
        self._whole = parameter
        self.view = parameter.view(layout.groups, -1, *parameter.shape[1:]) if layout.groups else parameter
        self.letters = layout.dims.ljust(self.view.ndim, "k")
        grouped = getattr(member.module, "groups", 1) if self.letters.startswith("oik") else 1
        groups = grouped * prod(self.view.shape[d] for d in self._dims("g"))
        self.matrices = Matrices(groups, prod(self.view.shape[d] for d in self._dims("go")) // groups)

    def is_whole(self, operand: Tensor) -> bool:
        return operand.is_set_to(self._whole)

    def kernel(self) -> Held:
        count, rows = self.matrices
        return Held(self.name, 0, count * rows, count, ())

    def held(self, operand: Tensor, letters: str) -> Held | None:
        starts = self._starts(operand)
        places = self._matched(operand, letters) if starts is not None else None
        if starts is None or places is None:
            return None
        sizes = [operand.shape[places[d]] if d in places else 1 for d in range(self.view.ndim)]
        if any(starts[d] + sizes[d] > self.view.shape[d] for d in range(self.view.ndim)):
            return None
        if any(sizes[d] != self.view.shape[d] for d in self._dims("ik")):
            return None
        rows = _range([(starts[d], sizes[d], self.view.shape[d]) for d in [*self._dims("g"), *self._dims("o")]])
        if rows is None:
            return None
        groups = prod(sizes[d] for d in self._dims("g"))
        return Held(self.name, *rows, groups, tuple(places[d] for d in self._dims("i") if d in places))

    def _dims(self, letters: str) -> list[int]:
        return [d for d, letter in enumerate(self.letters) if letter in letters]

    def _starts(self, operand: Tensor) -> list[int] | None:
        """The index of the operand's first number in each dimension."""
        rest = int(operand.storage_offset()) - int(self.view.storage_offset())
        starts = [0] * self.view.ndim
        for d in sorted(range(self.view.ndim), key=self.view.stride, reverse=True):
            if self.view.shape[d] > 1:
                starts[d], rest = divmod(rest, self.view.stride(d))
        return starts if rest == 0 and min(starts, default=0) >= 0 else None

    def _matched(self, operand: Tensor, letters: str) -> dict[int, int] | None:
        """Which dimension of the operand each stored one has become; those without are single indices."""
        found: dict[int, int] = {}
        for at in sorted(range(operand.ndim), key=lambda d: -operand.shape[d]):
            if operand.shape[at] == 1 or (operand.stride(at) == 0 and letters[at] == "g"):  # it is repeated
                continue
            for d in self._dims("og" if letters[at] == "o" else letters[at]):  # matrices that read one input, too
                same = self.view.stride(d) == operand.stride(at) and self.view.shape[d] >= operand.shape[at]
                if same and d not in found:
                    found[d] = at
                    break
            else:
                return None
        return found


def _range(dims: Iterable[tuple[int, int, int]]) -> tuple[int, int] | None:
    """The rows that (start, size, of how many) in each dimension are, if they follow one another."""
    start, count = 0, 1
    for at, size, whole in dims:
        if count > 1 and size != whole:
            return None
        start, count = start * whole + at, count * size
    return start, start + count


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # it has none: sparse, or within vmap
        return -1
