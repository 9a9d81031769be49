"""The matrices of a model with what they read, and drafts: new weights beside the model, until they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.allocation import apportion
from secateur.calibration.moments import Moments
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.statistics import Statistics
from secateur.errors import InputError, InputTypeError, NotFiniteError, listed, warn
from secateur.masks import Masks
from secateur.scope import Member, Scope, unwrap
from secateur.support import bits, checks


@dataclass(frozen=True, eq=False)
class Matrix:
    """One least-squares problem: tensors side by side, and what they read.

    Attributes:
        moments: what they read, emptied: in its place there is
        curvature: of these; one object for all matrices with the same input.
        members: the tensors, piece by piece.
    """

    moments: Moments
    curvature: Curvature
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """The tensors, for people."""
        return " + ".join(self.moments.names)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the tensors, outputs first."""
        return {member.name: _shape(member) for member in self.members}

    @property
    def size(self) -> int:
        """Weights in it."""
        return sum(self.weights_of(name) for name in self.moments.names)

    def weights_of(self, name: str) -> int:
        """Weights of one tensor that are in it."""
        piece = self.moments.pieces[self.moments.names.index(name)]
        return (piece.stop - piece.start) * self.shapes[name][1:].numel()

    def weights(self) -> Tensor:
        """As they are in the model, float32 [groups, rows, inputs]."""
        return self.moments.matrix({m.name: m.layout.outputs_first(m.parameter.detach()).float() for m in self.members})

    def loss(self, weights: Tensor) -> float:
        """What is lost with these weights: the mean square of the error over that of the outputs."""
        dense = self.weights()
        return self._energy(weights - dense) / max(self._energy(dense), 1e-30)

    def _energy(self, weights: Tensor) -> float:
        scaled = weights * self.curvature.scale
        return float((scaled @ self.curvature.matrix * scaled).sum())


def matrices(scope: Scope, moments: Sequence[Moments]) -> list[Matrix]:
    """The matrices of the tensors in scope of which every row has moments.

    Where only one of several tensors side by side is in scope, the others stay as they are, and its part is left.

    Raises:
        InputTypeError: complex weights. InputError: sharded ones. NotFiniteError: moments with NaN or inf.
    """
    require_whole(scope)
    whole = set(complete(scope, moments))
    curvatures: dict[tuple[int, tuple[int, ...]], Curvature] = {}
    found = []
    for one in moments:
        held = tuple(i for i, piece in enumerate(one.pieces) if piece.name in whole)
        if not held:
            continue
        members = tuple(scope.members[one.pieces[i].name] for i in held)
        for member in members:
            if member.parameter.is_complex():
                raise InputTypeError(f"{member.name} is complex, which no solver takes: leave it out of the scope")
        key = id(one.gram), held if len(held) < len(one.pieces) else ()
        part = one if not key[1] else _part(one, held, members)
        if key not in curvatures:
            try:
                curvatures[key] = Curvature(part.gram)
            except NotFiniteError as error:
                raise NotFiniteError(f"{', '.join(part.names)}: {error}") from error
        found.append(Matrix(part.emptied(), curvatures[key], members))
    return found


def complete(scope: Scope, moments: Iterable[Moments]) -> list[str]:
    """The tensors in scope of which every row has moments."""
    rows = dict.fromkeys(scope, 0)
    for name, start, stop in (piece for one in moments for piece in one.pieces if piece.name in rows):
        rows[name] += stop - start
    return [name for name, count in rows.items() if count == _shape(scope.members[name])[0]]


def shared(parts: Sequence[Matrix], counts: Mapping[str, int]) -> dict[Matrix, int]:
    """How many weights of each matrix go, from those of each tensor: in proportion where it has part in several."""
    zeros = dict.fromkeys(parts, 0)
    for name, count in counts.items():
        sizes = {str(i): part.weights_of(name) for i, part in enumerate(parts) if name in part.moments.names}
        for i, n in apportion(sizes, sizes, count).items() if sizes else ():
            zeros[parts[int(i)]] += n
    return zeros


def _shape(member: Member) -> torch.Size:
    return member.layout.shape(member.parameter.shape)


def _part(moments: Moments, held: tuple[int, ...], members: Sequence[Member]) -> Moments:
    """The moments of the first pieces, or of the last ones, alone."""
    columns = sum(_shape(member)[1:].numel() for member in members)
    keep = slice(0, columns) if held[0] == 0 else slice(moments.inputs - columns, moments.inputs)
    return Moments(tuple(moments.pieces[i] for i in held), moments.gram[:, keep, keep], moments.count)


@dataclass
class Draft:
    """New weights, and which of them stay; by name, outputs first.

    Attributes:
        weights: float32, or as they are stored where they are not fitted.
        kept: bools of the same shapes.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def put(self, matrix: Matrix, weights: Tensor, kept: Tensor) -> None:
        """Take in a matrix: its weights [groups, rows, inputs], and which stay."""
        shapes = matrix.shapes
        for values, tensors in ((weights, self.weights), (kept, self.kept)):
            for (name, start, stop), part in matrix.moments.parts(values, shapes):
                whole = tensors.setdefault(name, torch.zeros(shapes[name], dtype=part.dtype, device=part.device))
                whole[start:stop] = part

    def stored(self, scope: Scope) -> dict[str, tuple[Tensor, Tensor]]:
        """Both of each tensor as the model stores it, in the order of the scope."""
        found = {}
        for name, member in scope.members.items():
            if name in self.weights:
                parameter = member.parameter
                both = self.weights[name], self.kept[name]
                weights, kept = (member.layout.as_stored(one, parameter.shape) for one in both)
                found[name] = weights.to(parameter.dtype), kept
        return found

    def write(self, scope: Scope) -> None:
        """Write the weights into the model."""
        with torch.no_grad():
            for name, (weights, _) in self.stored(scope).items():
                scope[name].copy_(weights)

    def masks(self, scope: Scope) -> Masks:
        """Which weights stay, in the order of the scope."""
        return Masks({name: kept for name, (_, kept) in self.stored(scope).items()})


@contextmanager
def restored(scope: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the tensors be written to for a while; afterwards they hold what they held, also after an error."""
    before = {name: tensor.detach().clone() for name, tensor in scope.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in scope.items():
                tensor.copy_(before[name])


def require_whole(scope: Scope) -> None:
    """Raise an InputError if tensors are sharded."""
    sharded = [name for name in scope if bits.is_sharded(scope[name])]
    if sharded:
        raise InputError(f"{listed(sharded)} is sharded: prune the whole model on one process, before sharding it")


def opened(model: nn.Module, stats: Statistics) -> nn.Module:
    """The plain model, of which the statistics are.

    Raises:
        InputTypeError: no statistics. InputError: those of another model.
    """
    inner = unwrap(model)
    if not isinstance(stats, Statistics):
        raise checks.wrong("stats", stats, "what sc.calibrate(model, batches) returned")
    stats.require(inner)
    return inner


def masked(scope: Scope, masks: Masks, parts: Sequence[Matrix]) -> Draft:
    """The tensors without statistics, masked as they are.

    Warns:
        SecateurWarning: there are some.
    """
    reached = {name for part in parts for name in part.moments.names}
    found = Draft()
    for name in masks:
        if name not in reached:
            layout, weight = scope.members[name].layout, scope[name].detach()
            found.kept[name] = layout.outputs_first(masks[name])
            found.weights[name] = layout.outputs_first(weight).masked_fill(~found.kept[name], 0.0)
    if found.kept:
        warn(
            f"{listed(list(found.kept))} has no statistics, since no batch of the calibration reached it, so that its "
            "zeros are not repaired: give batches that reach it, or leave it out of the scope"
        )
    return found
