"""What the layers of a model read on some batches of data: what one-shot pruning and refits compute with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import trees
from secateur.calibration.grams import Grams, Matrices, ordered
from secateur.calibration.moments import Moments, Piece, titles
from secateur.calibration.recurrent import Run
from secateur.errors import FileError, InputError, listed
from secateur.scope import unwrap
from secateur.support import checks
from secateur.support.files import StrPath
from secateur.support.inputs import arguments
from secateur.support.tables import Printed, Table, counted, number

_FORMAT = "secateur.statistics"


@dataclass(frozen=True)
class Statistics(Printed):
    """What the weights of a model read; prints as a table. Made by `calibrate`.

    Attributes:
        moments: of each weight, in the model's order; those with the same input share the very tensor.
        shapes: of the weights, by name, as they are stored.
        held: batches that are not in the sums, to check on.
        kept: the batches themselves where they are too few to hold one out.
        runs: the calls of LSTM, GRU and RNN modules, by the names of these: what their solver runs them on.
        gradients: sums of squared gradients of the loss, one of each batch, by name; usable as scores.
    """

    moments: tuple[Moments, ...]
    shapes: dict[str, torch.Size]
    held: list[Any] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    runs: dict[str, list[Run]] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    @property
    def checks(self) -> list[Any]:
        """The batches to check on: those held out, or where there are none those in the sums.

        None for a loss, which alone knows how the model takes them.
        """
        return [] if self.gradients else self.held or self.kept

    def of(self, name: str) -> list[Moments]:
        """The moments that a tensor has part in, in the order of its rows."""
        return [one for one in self.moments if name in one.names]

    def require(self, model: nn.Module) -> None:
        """See that the statistics are of a model with these weights.

        Raises:
            InputError: a weight is not there, or has another shape.
        """
        own = dict(unwrap(model).named_parameters(remove_duplicate=False))
        _require_same(self.shapes, {name: own[name].shape for name in self.shapes if name in own}, "this model")

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both: sums are added up, batches and runs listed one after another.

        So several workers, each with its share of the batches, see what one would have seen with all of them.

        Raises:
            InputTypeError: no statistics. InputError: of another model; or only one of both has gradients.
        """
        if not isinstance(other, Statistics):
            raise checks.wrong("other", other, "what sc.calibrate gave on other batches")
        _require_same(self.shapes, other.shapes, "the others")
        _require_same(other.shapes, self.shapes, "these")
        if self.gradients.keys() != other.gradients.keys():
            raise InputError("only one of the statistics has gradients of all: give both the same loss and weights")
        grams = Grams()
        for one in (self, other):
            grams.absorb(one.moments)
        return Statistics(
            tuple(ordered(grams.moments(_matrices([*self.moments, *other.moments])), self.shapes)),
            dict(self.shapes),
            [*self.held, *other.held],
            [*self.kept, *other.kept],
            {name: [*self.runs.get(name, []), *other.runs.get(name, [])] for name in {**self.runs, **other.runs}},
            {name: total + other.gradients[name] for name, total in self.gradients.items()},
        )

    def reduced(self, all_reduce: Callable[[Tensor], Tensor]) -> Statistics:
        """The sums of all processes, each of which calls this; batches held out stay those of this process.

        Since they differ, let one process prune, and give its masks and weights to the others.

        Args:
            all_reduce: adds up a tensor over the processes and returns the sum; of torch.distributed for example
                `lambda t: (dist.all_reduce(t), t)[1]`. It is given copies.

        Raises:
            InputTypeError: no function.
            InputError: processes that saw other weights, or saw them read in another way; recurrent modules, whose
                inputs are not summed: save the statistics of each process, and `merge` them.
        """
        checks.function("all_reduce", all_reduce, "a function that adds up a tensor over all processes")
        if self.runs:
            raise InputError(
                f"{listed(list(self.runs))} keeps its inputs whole, and these are not summed: let each process save "
                "its statistics, and merge them in one"
            )
        distinct = list({id(one.gram): one for one in self.moments}.values())
        places = {id(one.gram): i for i, one in enumerate(distinct)}
        shapes = [(name, total.shape) for name, total in self.gradients.items()]
        told = [(one.pieces, one.gram.shape, places[id(one.gram)]) for one in self.moments]
        if not _agreed(repr((told, shapes)), all_reduce, distinct[0].gram):
            raise InputError(
                "the processes saw other weights, or the same ones read in another way, so that their sums do not "
                "match: let each process save its statistics, and merge them in one"
            )
        sums = {id(one.gram): (all_reduce(one.gram.clone()), all_reduce(one.count.clone())) for one in distinct}
        gradients = {name: all_reduce(total.clone()) for name, total in self.gradients.items()}
        moments = tuple(Moments(one.pieces, *sums[id(one.gram)]) for one in self.moments)
        return replace(self, moments=moments, gradients=gradients)

    def save(self, path: StrPath) -> None:
        """Write a `.safetensors` file, with the batches that are held out; an old file stays until the new is whole.

        Raises:
            InputTypeError: no path. InputError: a batch of which a file holds no part: give calibrate batches of
                tensors, dicts, tuples, lists, numbers and texts. WriteError: the system refuses to write.
        """
        tensors: list[Tensor] = []
        flat = partial(trees.flat, tensors=tensors)
        contents = {
            "moments": flat([[list(map(list, one.pieces)), one.gram, one.count] for one in self.moments], where="them"),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "held": flat(self.held, where="a batch that is held out"),
            "kept": flat(self.kept, where="a batch that is kept"),
            "runs": flat({name: [vars(run) for run in runs] for name, runs in self.runs.items()}, where="a run"),
            "gradients": flat(self.gradients, where="the gradients"),
        }
        trees.write(checks.path("path", path), _FORMAT, contents, tensors)

    @classmethod
    def load(cls, path: StrPath, device: str | torch.device = "cpu") -> Statistics:
        """Read what `save` wrote.

        Args:
            path: of the file.
            device: of the tensors: that of the model.

        Raises:
            InputTypeError: no path, or no device. InputError: no such file. FileError: it holds no statistics, or is
                damaged.
        """
        if not isinstance(device, str | torch.device):
            raise checks.wrong("device", device, 'that of the model, such as "cpu"')
        contents, tensors = trees.read(checks.path("path", path), _FORMAT, device)
        try:
            moments = [
                Moments(tuple(Piece(*piece) for piece in pieces), gram, count)
                for pieces, gram, count in trees.tree(contents["moments"], tensors)
            ]
            runs = trees.tree(contents["runs"], tensors)
            found = cls(
                tuple(moments),
                {name: torch.Size(shape) for name, shape in contents["shapes"].items()},
                trees.tree(contents["held"], tensors),
                trees.tree(contents["kept"], tensors),
                {name: [Run(**run) for run in calls] for name, calls in runs.items()},
                trees.tree(contents["gradients"], tensors),
            )
            found._require_sound()
            return found
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise FileError(f"{path} is damaged ({error}): calibrate again") from error

    def _require_sound(self) -> None:
        """See that all is what `calibrate` makes.

        Raises:
            ValueError, TypeError, AttributeError: it is not.
        """
        for one in self.moments:
            size = (len(one.count), one.inputs, one.inputs)
            if one.gram.dtype != torch.float64 or one.gram.shape != size or one.count.dtype != torch.int64:
                raise ValueError(f"the sums of {one.names} have another form")
            if not one.pieces or not all(
                0 <= start < stop <= self.shapes[name].numel() for name, start, stop in one.pieces
            ):
                raise ValueError(f"the rows of {one.names} are not there")
            if sum(self.shapes[name].numel() for name in one.names) % one.inputs:
                raise ValueError(f"{one.names} have other inputs")
        for run in (run for runs in self.runs.values() for run in runs):
            if run.input.dtype != torch.float32 or run.input.ndim != 3 or run.lengths.shape != run.input.shape[1:2]:
                raise ValueError("the inputs of a recurrent module have another form")
            if not isinstance(run.state, tuple) or not all(one.ndim == 3 for one in run.state):
                raise ValueError("the states of a recurrent module have another form")
        if not isinstance(self.held, list) or not isinstance(self.kept, list):
            raise TypeError("the batches are no list")
        for batch in self.checks:
            arguments(batch)
        for name, total in self.gradients.items():
            if total.shape != self.shapes[name]:
                raise ValueError(f"the gradients of {name} have another form")

    def table(self) -> Table:
        """One row for what reads one input: its inputs, samples, and what else reads the same."""
        first: dict[int, str] = {}
        rows = []
        for one, name in zip(self.moments, titles([one.pieces for one in self.moments]), strict=True):
            groups = f"{one.groups} x " if one.groups > 1 else ""
            least, most = int(one.count.min()), int(one.count.max())
            samples = number(least) if least == most else f"{number(least)} to {number(most)}"
            shared = first.get(id(one.gram), "")
            first.setdefault(id(one.gram), name)
            rows.append([name, f"{groups}{number(one.inputs)}", samples, shared])
        note = f"{counted(len(first), 'matrix', 'matrices')}; {counted(len(self.held), 'batch', 'batches')} held out"
        return Table(("weights", "inputs", "samples", "same input as"), rows, notes=[note])

    def __repr__(self) -> str:
        return f"Statistics({counted(len(self.shapes), 'tensor')}, {counted(len(self.moments), 'matrix', 'matrices')})"


def _require_same(shapes: Mapping[str, torch.Size], others: Mapping[str, torch.Size], whose: str) -> None:
    for name, shape in shapes.items():
        if others.get(name) != shape:
            found = "is not there" if name not in others else f"has shape {tuple(others[name])}"
            raise InputError(
                f"the statistics are of another model: {name} has shape {tuple(shape)} in them and {found} in {whose}; "
                "call sc.calibrate(model, batches)"
            )


def _matrices(found: Iterable[Moments]) -> dict[str, Matrices]:
    """What each tensor holds, as some moments tell."""
    groups: dict[str, int] = {}
    rows: dict[str, int] = {}
    for one in found:
        for name, _, stop in one.pieces:
            groups[name] = max(groups.get(name, 1), one.groups)
            rows[name] = max(rows.get(name, 0), stop)
    return {name: Matrices(count, rows[name] // count) for name, count in groups.items()}


def _agreed(told: str, all_reduce: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether all processes say the same: sums of the bytes of its digest, and of their squares, tell."""
    digest = torch.tensor(list(hashlib.sha256(told.encode()).digest()), dtype=torch.float64, device=like.device)
    total = all_reduce(torch.cat([digest, digest.square(), torch.ones_like(digest)]))
    sums, squares, processes = total.chunk(3)
    return bool((processes * squares == sums.square()).all())
