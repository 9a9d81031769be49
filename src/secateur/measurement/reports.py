"""What was asked and what was got, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur import anatomy
from secateur.masks import Masks
from secateur.measurement.costs import file_bytes
from secateur.scope import unwrap
from secateur.support import bits
from secateur.support.tables import Printed, Table, number, percent, size


@dataclass(frozen=True)
class Line:
    """One tensor: weights, those its mask prunes (asked), those that are zero (got), and its dead outputs."""

    name: str
    weights: int
    asked: int
    got: int
    outputs: int
    dead_outputs: int
    """Rows of the tensor (gate units of an RNN, output units of the rest) of which every weight is zero."""


@dataclass(frozen=True)
class Report(Printed):
    """The state of a pruned model; prints as a table.

    Attributes:
        lines: one for each masked tensor.
        parameters: numbers in all parameters of the model, tied ones once.
        effective_parameters: those that are not zero.
        file_bytes: of the state_dict as a dense .safetensors file; zeros take as much room as other numbers.
    """

    lines: tuple[Line, ...]
    parameters: int
    effective_parameters: int
    file_bytes: int | None

    @property
    def asked(self) -> float:
        """Sparsity that the masks ask for, over all masked tensors."""
        return sum(line.asked for line in self.lines) / max(sum(line.weights for line in self.lines), 1)

    @property
    def got(self) -> float:
        """Fraction of zeros that is there, over all masked tensors."""
        return sum(line.got for line in self.lines) / max(sum(line.weights for line in self.lines), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "lines": [asdict(line) for line in self.lines], "asked": self.asked, "got": self.got}

    def table(self) -> Table:
        """One row a tensor, then the total."""
        rows = [_row(line.name, line.weights, line.asked, line.got, line.dead_outputs) for line in self.lines]
        sums = (
            sum(getattr(line, field) for line in self.lines) for field in ("weights", "asked", "got", "dead_outputs")
        )
        rows.append(_row("total", *sums))
        note = f"{self.effective_parameters:,} of {self.parameters:,} parameters of the model are not zero"
        note += "" if self.file_bytes is None else f"; {size(self.file_bytes)} as a dense file"
        return Table(
            ("tensor", "weights", "zeros asked", "asked", "zeros got", "got", "dead outputs"), rows, notes=[note]
        )


def report(model: nn.Module, masks: Masks) -> Report:
    """Compare what masks ask for with the zeros that a model has.

    More zeros than asked were there before; fewer came back: `sc.check` says where, `sc.remask` repairs it.

    Raises:
        UnknownNameError, MaskError: the masks are for another model.

    >>> model = nn.Linear(8, 2)
    >>> import secateur as sc
    >>> result = report(model, sc.prune(model, 0.5))
    >>> result.asked, result.got, result.parameters, result.effective_parameters
    (0.5, 0.5, 18, 10)
    """
    asked = masks.counts()
    plain = unwrap(model)
    modules = dict(plain.named_modules(remove_duplicate=False))
    lines = []
    for name, tensor in masks.match(plain).items():
        place, _, attribute = name.rpartition(".")
        layout = anatomy.layout(modules[place], attribute, tensor)
        lines.append(_line(name, tensor.detach(), asked[name], layout.outputs_first(tensor.detach())))
    parameters = dict(plain.named_parameters())
    return Report(tuple(lines), sum(p.numel() for p in parameters.values()), _alive(parameters), file_bytes(model))


def _line(name: str, tensor: Tensor, asked: int, by_output: Tensor) -> Line:
    outputs = len(by_output) if tensor.ndim > 1 else 0
    used = sum(int((by_output[i : i + 1024] != 0).flatten(1).any(1).sum()) for i in range(0, outputs, 1024))
    return Line(name, tensor.numel(), asked, tensor.numel() - _alive({name: tensor}), outputs, outputs - used)


def _alive(tensors: Mapping[str, Tensor]) -> int:
    return sum(
        int(torch.count_nonzero(piece)) for tensor in tensors.values() for _, piece in bits.chunks(tensor.detach())
    )


def _row(name: str, weights: int, asked: int, got: int, dead: int) -> list[str]:
    whole = max(weights, 1)
    return [
        name,
        number(weights),
        number(asked),
        percent(asked / whole),
        number(got),
        percent(got / whole),
        number(dead),
    ]
