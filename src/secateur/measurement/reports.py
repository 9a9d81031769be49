"""What was asked and what was got, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur import anatomy, sharding
from secateur.computed_weights import effective, weights_as_used
from secateur.masks import as_masks
from secateur.measurement.costs import file_bytes
from secateur.scope import unwrap
from secateur.sparsity import half_up
from secateur.support import bits
from secateur.support.process_groups import during
from secateur.support.tables import Printed, Table, number, percent, size
from secateur.tying import distinct


@dataclass(frozen=True)
class Line:
    """One tensor: weights, those its mask prunes (asked), those that are zero (got), and its dead outputs."""

    name: str
    weights: int
    asked: int | None
    """None where there is no mask."""
    got: int
    outputs: int
    dead_outputs: int
    """Rows of the tensor (gate units of an RNN, output units of the rest) of which every weight is zero."""


@dataclass(frozen=True)
class Report(Printed):
    """The state of a pruned model; prints as a table.

    Attributes:
        lines: one for each masked tensor; without masks, one for each weight that is pruned by default.
        parameters: numbers in all parameters of the model, tied ones once.
        effective_parameters: those that are not zero.
        file_bytes: of the state_dict as a dense .safetensors file; zeros take as much room as other numbers.
    """

    lines: tuple[Line, ...]
    parameters: int
    effective_parameters: int
    file_bytes: int | None

    @property
    def asked(self) -> float | None:
        """Sparsity that the masks ask for, over all masked tensors, as it was written: 0.9, not 0.900000053."""
        counts = [line.asked for line in self.lines if line.asked is not None]
        if len(counts) < len(self.lines):
            return None
        return _as_asked(sum(counts), sum(line.weights for line in self.lines))

    @property
    def got(self) -> float:
        """Fraction of zeros that is there, over all tensors of the report."""
        return sum(line.got for line in self.lines) / max(sum(line.weights for line in self.lines), 1)

    @property
    def of_model(self) -> float:
        """Fraction of zeros over all parameters of the model, those that the report does not list included."""
        return (self.parameters - self.effective_parameters) / max(self.parameters, 1)

    @property
    def hardest_hit(self) -> Line | None:
        """The tensor with the largest share of dead outputs; of equals, the one that keeps the smallest share.

        None where nothing is zero, or no tensor has outputs.
        """
        hit = [line for line in self.lines if line.got and line.outputs]
        return max(hit, key=lambda line: (line.dead_outputs / line.outputs, line.got / line.weights), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        worst = self.hardest_hit
        shares = {"asked": self.asked, "got": self.got, "of_model": self.of_model}
        return {**asdict(self), **shares, "hardest_hit": None if worst is None else worst.name}

    def table(self) -> Table:
        """One row a tensor, then the total."""
        asked = self.asked is not None
        sums = [sum(getattr(line, field) or 0 for line in self.lines) for field in ("weights", "asked", "got")]
        dead = sum(line.dead_outputs for line in self.lines)
        rows = [_row(line.name, line.weights, line.asked, line.got, line.dead_outputs) for line in self.lines]
        rows.append(_row("total", sums[0], sums[1] if asked else None, sums[2], dead))
        header = ["tensor", "weights", *(("zeros asked", "asked") if asked else ()), "zeros got", "got", "dead outputs"]
        packed = "" if self.file_bytes is None else f"; {size(self.file_bytes)} as a dense file"
        notes = [
            f"{self.effective_parameters:,} of {self.parameters:,} parameters of the model are not zero{packed}",
            f"{percent(self.of_model)} of the whole model is zero",
        ]
        if (worst := self.hardest_hit) is not None and len(self.lines) > 1:
            notes.append(
                f"hardest hit: {worst.name}, with {worst.dead_outputs:,} of {worst.outputs:,} outputs dead and "
                f"{percent(1 - worst.got / worst.weights)} of its weights kept"
            )
        return Table(header, rows, notes=notes)


def report(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Report:
    """Compare what masks ask for with the zeros that a model has; without masks, count the zeros.

    More zeros than asked for were there before pruning. Fewer mean that zeros came back: `sc.check` says where,
    `sc.remask` repairs it. Weights under masks of `torch.nn.utils.prune` and quantized weights count as the model
    computes with them. A report of sharded weights is one of the whole model; all processes of the mesh call it.

    Args:
        model: only read.
        masks: by default none: the report is of the weights that would be pruned by default.

    Raises:
        UnknownNameError, MaskError: the masks are for another model. InputTypeError: no Masks. InputError: processes
            that do not call it alike. GroupError: one of them was lost.

    >>> model = nn.Linear(8, 2)
    >>> import secateur as sc
    >>> result = report(model, sc.prune(model, 0.5))
    >>> result.asked, result.got, result.parameters, result.effective_parameters
    (0.5, 0.5, 18, 10)
    >>> report(model).got
    0.5
    """
    plain = unwrap(model)

    def make() -> tuple[dict[str, int], dict[str, Tensor], dict[str, Tensor]]:
        held = None if masks is None else as_masks(masks)
        listed = weights_as_used(plain) if held is None else held.read(plain)
        return {} if held is None else held.counts(), listed, distinct(effective(plain))

    def tell(made: tuple[dict[str, int], dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Any]:
        return {"masks": made[0], "tensors": [*made[1]]}

    with during("the model was reported"):
        asked, tensors, everything = sharding.alike(plain, make, tell)
        modules = dict(plain.named_modules(remove_duplicate=False))
        layouts = {}
        for name, tensor in tensors.items():
            place, _, attribute = name.rpartition(".")
            layouts[name] = anatomy.layout(modules[place], attribute, tensor)
        nonzero = _nonzero(tensors, {name: layouts[name].output_dims(tensor.ndim) for name, tensor in tensors.items()})
        alive = sum(int(found.sum()) for found in _nonzero(everything, dict.fromkeys(everything, ())).values())
    lines = [_line(name, t, asked.get(name), layouts[name].outputs_first(nonzero[name])) for name, t in tensors.items()]
    return Report(tuple(lines), sum(t.numel() for t in everything.values()), alive, file_bytes(model))


def _as_asked(count: int, size: int) -> float:
    """The share of `count` in `size`: 0.9 and not 0.900000053 where 0.9 of so many weights is just this count."""
    share = count / max(size, 1)
    for digits in range(1, 5) if size > 50_000 else ():  # of fewer weights several decimals are the same count
        short = round(share, digits)
        if half_up(Fraction(str(short)) * size) == count:
            return short
    return share


def _line(name: str, tensor: Tensor, asked: int | None, by_output: Tensor) -> Line:
    outputs = len(by_output) if tensor.ndim > 1 else 0
    dead = outputs - int(by_output.flatten(1).any(1).sum()) if outputs else 0
    return Line(name, tensor.numel(), asked, tensor.numel() - int(by_output.sum()), outputs, dead)


def _nonzero(tensors: Mapping[str, Tensor], dims: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Of each tensor how many numbers are not zero along some dimensions; the others have size 1.

    Those of DTensors are counted where they are, and added up.
    """
    spread = sharding.spread(tensors)
    found = {name: _along(bits.local(tensor), dims[name]) for name, tensor in tensors.items()}
    if spread is None:
        return found
    whole = {}
    for name, part in found.items():
        place = spread.places[name]
        whole[name] = np.zeros([n if d in dims[name] else 1 for d, n in enumerate(place.shape)], np.int64)
        if place.counts:
            at = [index if d in dims[name] else [0] for d, index in enumerate(place.index)]
            whole[name][np.ix_(*at)] = part.cpu().numpy()
    sums = spread.grid.total(np.concatenate([one.ravel() for one in whole.values()]))
    ends = np.cumsum([one.size for one in whole.values()])[:-1]
    return {
        name: torch.from_numpy(sum_.reshape(whole[name].shape))
        for name, sum_ in zip(whole, np.split(sums, ends), strict=True)
    }


def _along(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not dims:
        alive = sum(int(torch.count_nonzero(piece)) for _, piece in bits.chunks(tensor))
        return torch.full([1] * tensor.ndim, alive)
    others = [d for d in range(tensor.ndim) if d not in dims]
    step = max(bits.CHUNK // max(tensor[:1].numel(), 1), 1)
    pieces = [tensor[first : first + step] != 0 for first in range(0, max(len(tensor), 1), step)]
    rows = [piece.sum(others, keepdim=True) if others else piece.long() for piece in pieces]
    return torch.cat(rows) if 0 in dims else torch.stack(rows).sum(0)


def _row(name: str, weights: int, asked: int | None, got: int, dead: int) -> list[str]:
    whole = max(weights, 1)
    told = [] if asked is None else [number(asked), percent(asked / whole)]
    return [name, number(weights), *told, number(got), percent(got / whole), number(dead)]
