"""What LSTM, GRU, RNN and their cells read: each layer its input and its own state of a step before, side by side.

The state of a step before is the layer's own output, shifted by a step. So one fused call of a layer tells all that it
reads, and nothing is unrolled. A layer of a bidirectional module is two, each with weights of its own; the one that
reads backwards is given each sequence turned round.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from secateur.calibration.grams import Grams, Matrices, Reader
from secateur.calibration.moments import Moments, Piece
from secateur.errors import InputTypeError
from secateur.support import checks

_CALLS = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}
_ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # the order in which torch takes them


@dataclass(frozen=True)
class Run:
    """One call of a recurrent module.

    Attributes:
        input: [steps, sequences, inputs], padded behind the end of each sequence.
        lengths: steps of each sequence, int64 [sequences].
        state: what the call began with: h, and c of an LSTM, each [layers x directions, sequences, units]; none is 0.
    """

    input: Tensor
    lengths: Tensor
    state: tuple[Tensor, ...] = ()


def run(module: nn.RNNBase, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Run:
    """Read the arguments of a call of an LSTM, GRU or RNN.

    Args:
        module: what is called.
        args, kwargs: with what: a tensor, batched or not, or a PackedSequence; and perhaps a state.

    Raises:
        InputTypeError: the input is neither.
    """
    given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
    x, hx = given.get("input"), given.get("hx")
    state = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        return _detached(padded, lengths.to(padded.device), state)
    if not isinstance(x, Tensor):
        raise InputTypeError(f"the input of {type(module).__name__} is {checks.kind(x)}: give a tensor")
    if x.ndim == 2:
        x, state = x.unsqueeze(1), tuple(one.unsqueeze(1) for one in state)
    elif module.batch_first:
        x = x.transpose(0, 1)
    return _detached(x, torch.full((x.shape[1],), x.shape[0], device=x.device), state)


def _detached(x: Tensor, lengths: Tensor, state: tuple[Tensor, ...]) -> Run:
    return Run(x.detach().float().contiguous(), lengths, tuple(one.detach().float() for one in state))


@dataclass(frozen=True)
class Direction:
    """One layer in one direction, or a cell.

    Attributes:
        kind: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        names: of its parameters in the model, by what torch calls them in a cell ("weight_ih"), and "weight_hr".
        tensors: the parameters themselves, by the same keys; float32.
        index: which one of the states of its module is its own.
        reverse: whether it reads from the end.
    """

    kind: str
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    index: int = 0
    reverse: bool = False

    @property
    def projected(self) -> bool:
        """Whether the state is a projection of the units."""
        return "weight_hr" in self.tensors

    @property
    def parts(self) -> tuple[tuple[Piece, ...], ...]:
        """The matrices, each of tensors side by side: all gates, or the gates r and z and the gate n of a GRU.

        The weights that project come last.
        """
        rows = len(self.tensors["weight_hh"])
        bounds = [0, rows // 3 * 2, rows] if self.kind == "GRU" else [0, rows]
        sides = ("weight_ih", "weight_hh")
        found = [tuple(Piece(self.names[side], *rows) for side in sides) for rows in pairwise(bounds)]
        if self.projected:
            found.append((Piece(self.names["weight_hr"], 0, len(self.tensors["weight_hr"])),))
        return tuple(found)

    def matrix(self, pieces: Sequence[Piece]) -> Tensor:
        """One of the matrices in `parts`, [rows, inputs]; a copy."""
        named = {name: self.tensors[role] for role, name in self.names.items()}
        return torch.cat([named[name][start:stop] for name, start, stop in pieces], 1)

    def replaced(self, pieces: Sequence[Piece], matrix: Tensor) -> Direction:
        """The same with another matrix in the place of one of `parts`."""
        roles = {name: role for role, name in self.names.items()}
        tensors = dict(self.tensors)
        widths = [tensors[roles[piece.name]].shape[1] for piece in pieces]
        for (name, start, stop), columns in zip(pieces, torch.split(matrix, widths, 1), strict=True):
            old = tensors[roles[name]]
            tensors[roles[name]] = torch.cat([old[:start], columns, old[stop:]])
        return replace(self, tensors=tensors)

    def read(self, x: Tensor, h: Tensor) -> list[Tensor]:
        """What the matrices of the gates read, in the order of `parts`: each [samples, inputs + units].

        The reset gate of a GRU multiplies what its n gate makes of the state, for each unit by another number. For one
        matrix that all rows share, the state is weighted by the root of the mean square of these numbers.

        Args:
            x: inputs [samples, inputs].
            h: states of a step before [samples, units].
        """
        found = [torch.cat([x, h], 1)]
        if self.kind == "GRU":
            reset = len(self.tensors["weight_hh"]) // 3
            gate = x @ self.tensors["weight_ih"][:reset].T + h @ self.tensors["weight_hh"][:reset].T
            gate += sum(self.tensors[key][:reset] for key in ("bias_ih", "bias_hh") if key in self.tensors)
            found.append(torch.cat([x, h * gate.sigmoid_().square_().mean(1, keepdim=True).sqrt_()], 1))
        return found

    def add(self, grams: Grams, inputs: Sequence[Tensor]) -> None:
        """Add what each of the matrices reads, in the order of `parts`, to sums."""
        for pieces, x in zip(self.parts, inputs, strict=True):
            reader = Reader(tuple(piece.name for piece in pieces), pieces[0].start, pieces[0].stop)
            grams.add(reader, x, "recurrent", [x.unsqueeze(0)].copy)

    def outputs(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """Run it: [steps, sequences, inputs] to [steps, sequences, units].

        Args:
            x: in the order in which it is read.
            state: to begin with, each [sequences, units].
        """
        weights = [self.tensors[key] for key in _ROLES if key in self.tensors]
        states = [one.unsqueeze(0) for one in state]
        given = states if self.kind == "LSTM" else states[0]
        call: Any = _CALLS[self.kind]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*projections is not supported with oneDNN")  # only slower
            found: Tensor = call(x, given, weights, "bias_ih" in self.tensors, 1, 0.0, False, False, False)[0]
        return found

    def unprojected(self) -> Direction:
        """The same without the projection, which goes into the weights that read the state."""
        kept = {key: tensor for key, tensor in self.tensors.items() if key != "weight_hr"}
        kept["weight_hh"] = self.tensors["weight_hh"] @ self.tensors["weight_hr"]
        return replace(self, tensors=kept)


def cell(module: nn.RNNCellBase, prefix: str) -> Direction:
    """Read an LSTMCell, GRUCell or RNNCell.

    Args:
        module: the cell.
        prefix: its name in the model.
    """
    kind = "LSTM" if isinstance(module, nn.LSTMCell) else "GRU" if isinstance(module, nn.GRUCell) else ""
    kind = kind or f"RNN_{str(getattr(module, 'nonlinearity', 'tanh')).upper()}"
    return _direction(module, prefix, kind, "", 0)


def directions(module: nn.RNNBase, prefix: str) -> list[list[Direction]]:
    """Read an LSTM, GRU or RNN: its layers, each of one direction or two.

    Args:
        module: read only.
        prefix: its name in the model.
    """
    ways = ("", "_reverse")[: 1 + module.bidirectional]
    found = []
    for layer in range(module.num_layers):
        each = enumerate(ways, len(ways) * layer)
        found.append([_direction(module, prefix, module.mode, f"_l{layer}{way}", index) for index, way in each])
    return found


def _direction(module: nn.Module, prefix: str, kind: str, suffix: str, index: int) -> Direction:
    has = {role: tensor for role in _ROLES if (tensor := getattr(module, role + suffix, None)) is not None}
    names = {role: f"{prefix}.{role}{suffix}".removeprefix(".") for role in has}
    tensors = {role: tensor.detach().float() for role, tensor in has.items()}
    return Direction(kind, names, tensors, index, suffix.endswith("_reverse"))


@dataclass(frozen=True)
class Pass:
    """One direction over one run; all [steps, sequences, ...] in the order in which it reads.

    Attributes:
        x: its inputs.
        before: its states a step before.
        after: its states, which are its outputs.
        units: what it projects to its states; None without a projection.
        lengths: steps of each sequence.
        reverse: whether this order is from the end.
    """

    x: Tensor
    before: Tensor
    after: Tensor
    units: Tensor | None
    lengths: Tensor
    reverse: bool

    @property
    def output(self) -> Tensor:
        """Its outputs in the order of time."""
        return turned(self.after, self.lengths) if self.reverse else self.after

    def samples(self, values: Tensor) -> Tensor:
        """The steps within the sequences, [samples, ...]."""
        steps = len(values)
        if int(self.lengths.min()) == steps:
            return values.flatten(0, 1)
        return values[torch.arange(steps, device=values.device)[:, None] < self.lengths]

    def read(self, direction: Direction) -> list[Tensor]:
        """What each of the matrices reads, in the order of `parts`, each [samples, inputs of the matrix]."""
        found = direction.read(self.samples(self.x), self.samples(self.before))
        return found if self.units is None else [*found, self.samples(self.units)]


def passed(direction: Direction, x: Tensor, run: Run) -> Pass:
    """Run one direction.

    Args:
        direction: with the weights that it is to have.
        x: [steps, sequences, inputs], in the order of time.
        run: the lengths and the state are this one's.
    """
    x = ordered(direction, x, run)
    state = tuple(one[direction.index] for one in run.state) or _zeros(direction, x)
    units = None
    after = direction.outputs(x, state)
    if direction.projected:
        down = direction.tensors["weight_hr"]
        first = torch.linalg.lstsq(down, state[0].T).solution.T  # units that it would have projected to this state
        units = direction.unprojected().outputs(x, (first, state[1]))
    before = torch.cat([state[0].unsqueeze(0), after[:-1]])
    return Pass(x, before, after, units, run.lengths, direction.reverse)


def ordered(direction: Direction, x: Tensor, run: Run) -> Tensor:
    """Put [steps, sequences, ...] from the order of time into that in which a direction reads, or back."""
    return turned(x, run.lengths) if direction.reverse else x


def _zeros(direction: Direction, x: Tensor) -> tuple[Tensor, ...]:
    hidden = x.new_zeros(x.shape[1], direction.tensors["weight_hh"].shape[1])
    cells = x.new_zeros(x.shape[1], len(direction.tensors["weight_hh"]) // 4)
    return (hidden, cells) if direction.kind == "LSTM" else (hidden,)


def turned(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn each sequence round; the padding stays behind it."""
    steps = torch.arange(len(x), device=x.device)[:, None]
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, source.unsqueeze(-1).expand_as(x))


@torch.no_grad()
def moments(module: nn.RNNBase, prefix: str, runs: Iterable[Run]) -> list[Moments]:
    """The moments of what each layer and direction reads: of [x, h(t-1)], jointly.

    Padding is left out, and so is dropout between layers. The gate n of a GRU has moments of its own, in which the
    state is weighted by the reset gate, see `Direction.read`; weights that project have those of the units.

    Args:
        module: an LSTM, GRU or RNN; read only.
        prefix: its name in the model.
        runs: the calls.

    Raises:
        NotFiniteError: NaN or inf in what a layer reads.
    """
    layers, grams = directions(module, prefix), Grams()
    for one in runs:
        for direction, made in _through(layers, one):
            direction.add(grams, made.read(direction))
    return grams.moments(
        {
            direction.names[role]: Matrices(1, len(tensor))
            for layer in layers
            for direction in layer
            for role, tensor in direction.tensors.items()
        }
    )


def _through(layers: list[list[Direction]], run: Run) -> Iterator[tuple[Direction, Pass]]:
    x = run.input
    for layer in layers:
        made = [passed(direction, x, run) for direction in layer]
        yield from zip(layer, made, strict=True)
        x = torch.cat([one.output for one in made], -1)
