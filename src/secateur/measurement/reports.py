"""What was asked and what was got, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from secateur import anatomy
from secateur.computed_weights import effective, weights_as_used
from secateur.errors import InputError
from secateur.masks import as_masks
from secateur.measurement.costs import file_bytes
from secateur.scope import unwrap
from secateur.sparsity import half_up
from secateur.support import bits
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
    computes with them.

    Args:
        model: only read.
        masks: by default none: the report is of the weights that would be pruned by default.

    Raises:
        UnknownNameError, MaskError: the masks are for another model. InputTypeError: no Masks. InputError: sharded
            weights.

    >>> model = nn.Linear(8, 2)
    >>> import secateur as sc
    >>> result = report(model, sc.prune(model, 0.5))
    >>> result.asked, result.got, result.parameters, result.effective_parameters
    (0.5, 0.5, 18, 10)
    >>> report(model).got
    0.5
    """
    masks = None if masks is None else as_masks(masks)
    plain = unwrap(model)
    if any(map(bits.is_sharded, plain.parameters())):
        raise InputError(
            "the weights are sharded, and a report reads whole ones: masks.counts() has what is pruned in all "
            "processes, and sc.check(model, masks), called by all, whether it is zero"
        )
    modules = dict(plain.named_modules(remove_duplicate=False))
    asked = {} if masks is None else masks.counts()
    lines = []
    for name, tensor in (weights_as_used(plain) if masks is None else masks.read(plain)).items():
        place, _, attribute = name.rpartition(".")
        layout = anatomy.layout(modules[place], attribute, tensor)
        lines.append(_line(name, tensor.detach(), asked.get(name), layout.outputs_first(tensor.detach())))
    everything = distinct(effective(plain))
    return Report(tuple(lines), sum(t.numel() for t in everything.values()), _alive(everything), file_bytes(model))


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
    used = sum(int((by_output[i : i + 1024] != 0).flatten(1).any(1).sum()) for i in range(0, outputs, 1024))
    return Line(name, tensor.numel(), asked, tensor.numel() - _alive({name: tensor}), outputs, outputs - used)


def _alive(tensors: Mapping[str, Tensor]) -> int:
    return sum(
        int(torch.count_nonzero(piece)) for tensor in tensors.values() for _, piece in bits.chunks(tensor.detach())
    )


def _row(name: str, weights: int, asked: int | None, got: int, dead: int) -> list[str]:
    whole = max(weights, 1)
    told = [] if asked is None else [number(asked), percent(asked / whole)]
    return [name, number(weights), *told, number(got), percent(got / whole), number(dead)]
