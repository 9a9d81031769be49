"""What a pattern sees of the tensors in scope: each as [outputs, inputs, *kernel], or several laid side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur import scope as scopes
from secateur.errors import PatternError, listed
from secateur.masks import Masks
from secateur.patterns import Joined, Pattern, Picked, Slices
from secateur.scope import Member, Scope
from secateur.sharding import Place
from secateur.support import bits


@dataclass(frozen=True)
class Sheet:
    """What a pattern sees as one tensor [outputs, inputs, *kernel]: a single one, or several laid side by side.

    Attributes:
        along: for several, the dimension of each that counts the groups.
    """

    members: tuple[Member, ...]
    along: tuple[int, ...]

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    @property
    def shape(self) -> torch.Size:
        return self.lay({m.name: torch.empty(m.parameter.shape, device="meta") for m in self.members}).shape

    def lay(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Rearrange tensors that have the shapes of the members."""
        laid = [member.layout.outputs_first(tensors[member.name]) for member in self.members]
        if len(laid) == 1:
            return laid[0]
        return torch.cat([one.movedim(d, 0).flatten(1) for one, d in zip(laid, self.along, strict=True)], 1)

    @property
    def here(self) -> torch.Size:
        """The shape of the part that is here."""
        return self.lay({m.name: torch.empty(bits.local(m.parameter).shape, device="meta") for m in self.members}).shape

    def place(self, pattern: Pattern, places: Mapping[str, Place]) -> Place:
        """Where the groups that are here lie among all those of the pattern.

        Raises:
            PatternError: it looks at whole tensors, or a shard cuts its groups.
        """
        (member, *more), cells = self.members, getattr(pattern, "cells", None)
        if more or cells is None or isinstance(self, Picks):
            raise PatternError(
                f"the pattern {pattern} looks at whole tensors, and {self.name} is sharded: prune before sharding"
            )
        place, sizes = places[member.name], cells(self.shape)
        index = member.layout.indices(place.index, place.shape)
        laid = None if index is None else replace(place, shape=tuple(self.shape), index=tuple(index))
        groups = None if laid is None else laid.cells(sizes)
        if laid is None or groups is None:
            along = sorted({one.dim for one in place.placements if hasattr(one, "dim")})
            raise PatternError(
                f"the shards of {member.name} along dim {listed(list(map(str, along)))} cut groups of the pattern "
                f"{pattern}: shard it along another dimension, or by multiples of the groups, or prune before sharding"
            )
        return laid if self.group(pattern) == 1 else groups

    def unlay(self, laid: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Undo `lay`: each tensor by its name, as it is stored."""
        if len(self.members) == 1:
            (member,) = self.members
            yield member.name, member.layout.as_stored(laid, bits.local(member.parameter).shape)
            return
        shapes = [member.layout.shape(member.parameter.shape) for member in self.members]
        widths = [shape.numel() // max(shape[d], 1) for shape, d in zip(shapes, self.along, strict=True)]
        for member, shape, d, part in zip(self.members, shapes, self.along, torch.split(laid, widths, 1), strict=True):
            back = part.reshape(shape[d], *shape[:d], *shape[d + 1 :]).movedim(0, d)
            yield member.name, member.layout.as_stored(back, member.parameter.shape)

    def legal(self, pattern: Pattern | None) -> int:
        """The most weights that may go."""
        if pattern is None:
            return sum(member.free for member in self.members)
        rows, *rest = self.shape
        padding = len(self.members) == 1 and self.members[0].padding_row is not None
        return pattern.legal((rows - padding, *rest))

    def group(self, pattern: Pattern | None) -> int:
        """Weights in a group."""
        return 1 if pattern is None else pattern.group(self.shape)

    def weights(self) -> Tensor:
        """The weights that count: all but a padding row."""
        if len(self.members) > 1:
            return self.lay({member.name: member.parameter.detach() for member in self.members})
        (member,) = self.members
        weight, row = member.parameter.detach(), member.padding_row
        if bits.is_sharded(weight):  # of which an allocation sees the shape alone
            weight = torch.empty(weight.shape, device="meta")
        return weight if row is None else torch.cat([weight[:row], weight[row + 1 :]])


@dataclass(frozen=True)
class Picks(Sheet):
    """Slices of several tensors laid side by side: [groups, all weights of each]."""

    slices: tuple[Slices, ...]

    @property
    def name(self) -> str:
        return " + ".join(f"{one.name}[{one.dim}: {one.at[0][0]}...]" for one in self.slices)

    def lay(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Rearrange tensors that have the shapes of the members."""
        laid = [tensors[one.name].movedim(one.dim, 0)[torch.tensor(one.at)].flatten(1) for one in self.slices]
        return torch.cat(laid, 1)

    def unlay(self, laid: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The mask of each tensor, from the mask of what was laid; all else stays."""
        for one, member in zip(self.slices, self.members, strict=True):
            mask = torch.ones(member.parameter.shape, dtype=torch.bool, device=laid.device)
            rows = mask.movedim(one.dim, 0)
            shape = len(one.at), len(one.at[0]), *rows.shape[1:]
            part, laid = laid[:, : math.prod(shape[1:])], laid[:, math.prod(shape[1:]) :]
            rows[torch.tensor(one.at)] = part.reshape(shape)
            yield one.name, mask

    def weights(self) -> Tensor:
        """The weights of the groups."""
        return self.lay({member.name: member.parameter.detach() for member in self.members})

    def gone(self, held: Masks) -> int:
        """How many of the weights are pruned already."""
        return int((~self.lay({member.name: held[member.name] for member in self.members})).sum())


def sheets_of(scope: Scope, names: Sequence[str], pattern: Pattern | None) -> dict[str, Sheet]:
    """What the pattern sees of some tensors, by name; those that it does not join stand alone.

    Raises:
        PatternError: it joins tensors that are not among these, or that do not fit each other.
    """
    if isinstance(pattern, Picked):
        picks = [tuple(group) for group in pattern.picked()]
        missing = [one.name for group in picks for one in group if one.name not in names]
        if missing:
            raise PatternError(f"units span tensors, {missing[0]} among them: give one sparsity for all of them")
        sheets = [Picks(tuple(scope.members[one.name] for one in group), (), group) for group in picks]
        return {sheet.name: sheet for sheet in sheets}
    joined: Sequence[Mapping[str, int]] = pattern.joined(names) if isinstance(pattern, Joined) else ()
    found: dict[str, Sheet] = {}
    left = list(names)
    for together in joined:
        sizes = set()
        for name, along in together.items():
            if name not in left:
                raise PatternError(
                    f"the pattern {pattern} joins {name!r}, which is not in this budget or was joined already: "
                    "take it into the scope, and give all joined tensors one sparsity"
                )
            left.remove(name)
            sizes.add(scope.members[name].layout.shape(scope[name].shape)[along])
        sheet = Sheet(tuple(scope.members[name] for name in together), tuple(together.values()))
        if len(sizes) > 1:
            raise PatternError(f"the pattern {pattern} joins {sheet.name}, of {sorted(sizes)} slices: join equal ones")
        found[sheet.name] = sheet
    found |= {name: Sheet((scope.members[name],), (0,)) for name in left}
    return found


def picked_scope(model: nn.Module, scope: Mapping[str, nn.Parameter] | None, pattern: Picked) -> Scope:
    """The tensors that a pattern names itself.

    Raises:
        PatternError: there is a scope beside it. UnknownNameError: a name that the model does not have.
    """
    names = list(dict.fromkeys(one.name for group in pattern.picked() for one in group))
    if scope is not None:
        raise PatternError("the pattern names its tensors itself: leave the scope out")
    return scopes.weights(model, only=names)


def picked_sizes(scope: Scope, pattern: Picked) -> dict[str, int]:
    """How many weights of each tensor lie in groups.

    Raises:
        PatternError: a group that reaches beyond a tensor.
    """
    sizes = dict.fromkeys(scope, 0)
    for one in (one for group in pattern.picked() for one in group):
        shape = scope[one.name].shape
        if one.dim >= len(shape) or max(max(at) for at in one.at) >= shape[one.dim]:
            raise PatternError(f"the pattern was made for another model, whose {one.name} is larger: make it anew")
        sizes[one.name] += len(one.at) * len(one.at[0]) * (shape.numel() // shape[one.dim])
    return sizes
