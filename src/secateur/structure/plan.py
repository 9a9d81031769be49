"""What is to go, as plain data: positions that stay, attributes that follow, and why the rest is held."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import InputError, MaskError, StructureError, listed
from secateur.structure.blocks import Block, Renaming, check_names, put_back, take_out
from secateur.structure.cut import Kept, cut, named_tensors, shifted, sliced, undo
from secateur.structure.groups import Groups
from secateur.structure.scales import Scaled
from secateur.structure.scales import apply as scale
from secateur.structure.units import Flags, tally
from secateur.support.tables import Table

_UNPROVEN = "not proven: shrink(model, example_inputs, plan=plan) compares with the masked original"
_REMAKE = "Make a plan of this model, with these inputs"
NOT_ASKED = "none was to go"
"""Why units stay that could go."""


@dataclass(frozen=True)
class Group:
    """Units that may stand for one another, or that are held for the same reason.

    Attributes:
        units: how many there are; each is one position, or several that stay or go together.
        removed: how many of them go.
        axes: where they lie: "conv.weight[0]" is dimension 0 of conv.weight.
        held: why they stay; empty if they may go.
    """

    units: int
    removed: int
    axes: tuple[str, ...]
    held: str = ""


@dataclass(frozen=True)
class Attribute:
    """An attribute that repeats a size.

    Attributes:
        module: path of the module that has it.
        keys: from there to the value: ("config", "hidden_size") is module.config.hidden_size.
        value: the new one.
    """

    module: str
    keys: tuple[str | int, ...]
    value: Any


@dataclass(frozen=True)
class Plan:
    """What goes from a model: plain data, which another copy of the model or its state_dict can be cut by.

    Attributes:
        kept: positions that stay, by tensor and dimension; tied tensors under each of their names.
        shapes: of these tensors before, by name.
        unsaved: those of them that a state_dict does not hold.
        attributes: that follow the sizes.
        groups: all units of the model.
        shifts: what is added to biases, before they are cut, for units that go and always had the same number.
        scaled: what is multiplied after the cut, because a size that changes is a scale of attention.
        tied: names of one and the same tensor, of which a saved state may have one only.
        proven: whether the cut model was compared with the masked original; not so with `verify=False`.
        blocks: the modules of lists from which some go, before all else: the other names are those of the model then.
        folded: with shifts, a checksum of what goes of each tensor: other numbers there would give other shifts.
        fitted: weights that `shrink` fits anew where it has statistics; what cuts by the plan alone does not.
    """

    kept: Kept
    shapes: dict[str, tuple[int, ...]]
    unsaved: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    groups: tuple[Group, ...]
    shifts: dict[str, list[float]] = field(default_factory=dict)
    scaled: tuple[Scaled, ...] = ()
    proven: bool = False
    tied: tuple[tuple[str, ...], ...] = ()
    blocks: tuple[Block, ...] = ()
    folded: dict[str, int] = field(default_factory=dict)
    fitted: tuple[str, ...] = ()

    @property
    def removed(self) -> int:
        """How many units go."""
        return sum(group.removed for group in self.groups)

    def weights_gone(self, model: nn.Module) -> int:
        """How many weights go from a model that is not cut yet; tied ones count once."""
        total = 0
        for name, p in model.named_parameters():
            stays = p.numel()
            for d, at in self.kept.get(name, {}).items():
                stays = stays // p.shape[d] * len(at)
            total += p.numel() - stays
        return total

    def with_shifts(self, model: nn.Module, shifts: dict[str, list[float]]) -> Plan:
        """The same plan with shifts of tensors of the model it was made for."""
        named = named_tensors(model)
        shapes = self.shapes | {name: tuple(named[name].shape) for name in shifts}
        folded = {name: _checksum(named[name], dims) for name, dims in self.kept.items()} if shifts else {}
        return replace(self, shifts=shifts, shapes=shapes, folded=folded)

    def explain(self, axes: int = 3) -> Table:
        """A table of the blocks and of the groups: how many units, how many of them go, where, what holds the others.

        Args:
            axes: how many places to name in each row.
        """
        rows = []
        for block in self.blocks:
            influence = "" if block.influence is None else f", influence {block.influence:.3g}"
            rows.append((block.name + influence, "1 block", str(int(not block.becomes)), block.held))
        for group in self.groups:
            more = len(group.axes) - axes
            where = ", ".join(group.axes[:axes]) + (f" and {more} more" if more > 0 else "")
            rows.append((where, str(group.units), str(group.removed), group.held))
        notes = [] if self.proven else [_UNPROVEN]
        if self.fitted:
            notes.append(f"fitted anew, by the statistics: {listed(self.fitted, 6)}")
        return Table(("where", "units", "go", "held by"), rows, notes=notes)

    def choice(self, model: nn.Module, groups: Groups) -> tuple[Flags, list[int]]:
        """What goes, among the units of a captured model that is not cut.

        Returns the mask of kept labels, and how many go of each of `groups.cells`.

        Raises:
            MaskError: it is another model.
            StructureError: what the plan removes is held there, or goes together with something else.
        """
        self._check(named_tensors(model))
        gone = np.zeros(len(groups.root), bool)
        for axis in groups.axes:
            away = np.ones(len(axis.labels), bool)
            away[self.kept.get(axis.name, {}).get(axis.dim, slice(None))] = False
            own = np.setdiff1d(groups.root[axis.labels[away]], groups.root[axis.labels[~away]])
            held = [groups.held[group] for group in own.tolist() if group in groups.held]
            if held:
                raise StructureError(f"the plan removes units of {axis}, which stay here: {held[0]}. {_REMAKE}")
            gone[own] = True
        kept: Flags = ~gone[groups.root]
        counts = [int(gone[cell].sum()) for cell in groups.cells]
        here = as_plan(model, groups, kept, counts, ()).kept
        apart = [name for name in {**self.kept, **here} if self.kept.get(name) != here.get(name)]
        if apart:
            raise StructureError(f"the plan removes other units of {apart[0]} than can go together here. {_REMAKE}")
        return kept, counts

    def to_json(self) -> str:
        """The plan as text, for `Plan.from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            InputError: the text is no plan.
        """
        try:
            data = json.loads(text)
            return cls(
                {name: {int(d): [*map(int, at)] for d, at in dims.items()} for name, dims in data["kept"].items()},
                {name: tuple(shape) for name, shape in data["shapes"].items()},
                tuple(data["unsaved"]),
                tuple(Attribute(a["module"], tuple(a["keys"]), _tuples(a["value"])) for a in data["attributes"]),
                tuple(Group(g["units"], g["removed"], tuple(g["axes"]), g["held"]) for g in data["groups"]),
                {name: [*map(float, shift)] for name, shift in data.get("shifts", {}).items()},
                tuple(Scaled(s["name"], s["dim"], tuple(s["positions"]), s["factor"]) for s in data.get("scaled", ())),
                data.get("proven") is True,
                tuple(map(tuple, data.get("tied", ()))),
                tuple(Block(b["name"], b["becomes"], b["influence"], b["held"]) for b in data.get("blocks", ())),
                {name: int(checksum) for name, checksum in data.get("folded", {}).items()},
                tuple(map(str, data.get("fitted", ()))),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"this is no plan ({error!r}): give what to_json() of a plan wrote") from error

    def apply_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a state_dict, cut: new tensors where something goes, the same ones elsewhere.

        Raises:
            MaskError: a tensor or block is missing or has another shape.
            InputError: constants of dead units are folded, and what goes has other numbers.
        """
        self.check({name: t for name, t in state.items() if isinstance(t, Tensor)})
        return {now: self.cut(now, t) for name, t in state.items() if (now := self.renamed(name)) is not None}

    def renamed(self, name: str) -> str | None:
        """The name that a tensor has after blocks went; None if it goes with its block."""
        return self._renaming(name)

    @functools.cached_property
    def _renaming(self) -> Renaming:
        return Renaming(self.blocks)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """One tensor of a state_dict, by its new name, cut; the same one where nothing of it goes.

        Raises:
            InputError: constants of dead units are folded, and what goes has other numbers.
        """
        self._check_folded(name, tensor)
        tensor = shifted(tensor, self.shifts[name]) if name in self.shifts else tensor
        tensor = sliced(tensor, self.kept[name]) if name in self.kept else tensor
        for one in self.scaled:
            tensor = one.apply(tensor) if one.name == name else tensor
        return tensor

    def apply(self, model: nn.Module) -> None:
        """Cut another copy of the model, in place.

        Raises:
            MaskError: it is another model: a tensor, attribute or block is missing or has another shape. Nothing is
                changed.
            InputError: constants of dead units are folded, and what goes has other numbers. Nothing is changed.
        """
        taken = take_out(model, self.blocks)
        done: list[tuple[Tensor, Tensor]] = []
        before: list[tuple[Any, str | int, Any]] = []
        try:
            named = named_tensors(model)
            self._check(named)
            for name in self.folded:
                self._check_folded(name, named[name])
            owners = [(self._owner(model, one), one.keys[-1], one.value) for one in self.attributes]
            before += [(owner, key, owner[key]) for owner, key, _ in owners]
            done += cut(model, self.kept, self.shifts)
            done += scale(model, self.scaled)
            for owner, key, value in owners:
                owner[key] = list(value) if isinstance(owner[key], list) else value
        except BaseException:
            undo(done)
            for owner, key, old in before:
                owner[key] = old
            put_back(taken)
            raise

    def _check_folded(self, name: str, tensor: Tensor) -> None:
        if name in self.folded and not tensor.is_meta and _checksum(tensor, self.kept[name]) != self.folded[name]:
            raise InputError(
                f"this plan folds constants of dead units, and those of {name} have other weights than it was made "
                "with: use sc.shrink(model, inputs), or make a plan of this model"
            )

    def _owner(self, model: nn.Module, one: Attribute) -> Any:
        try:
            owner: Any = vars(model.get_submodule(one.module))
            for key in one.keys[:-1]:
                inner = owner[key]
                owner = inner if isinstance(inner, list | dict) else vars(inner)
            owner[one.keys[-1]]
        except (AttributeError, LookupError, TypeError) as error:
            path = ".".join(map(str, (one.module, *one.keys)))
            raise MaskError(
                f"the model has no {path}: apply the plan to a copy of the model it was made for"
            ) from error
        return owner

    def check(self, state: Mapping[str, Any]) -> None:
        """See that a state is of the model that the plan was made for.

        Args:
            state: by name tensors, or what else has their shape.

        Raises:
            MaskError: a tensor or block is missing or has another shape.
        """
        check_names(state, self.blocks)
        state = {now: t for name, t in state.items() if (now := self.renamed(name)) is not None}
        partners = {name for names in self.tied if any(n in state for n in names) for name in names}
        self._check(state, {*self.unsaved, *partners})

    def _check(self, named: Mapping[str, Tensor], but: Collection[str] = ()) -> None:
        for name, shape in self.shapes.items():
            if name not in named:
                if name in but:
                    continue
                raise MaskError(f"there is no {name}: apply the plan to a copy of the model it was made for")
            if tuple(named[name].shape) != shape:
                raise MaskError(
                    f"{name} has the shape {tuple(named[name].shape)}, and the plan was made for {shape}: "
                    "apply it to a copy of the model, before anything is cut from it"
                )


def as_plan(
    model: nn.Module, groups: Groups, kept: Flags, counts: list[int], attributes: tuple[Attribute, ...]
) -> Plan:
    """Write a choice of units as plain data.

    Args:
        model: as it was captured, not cut.
        groups: of the model.
        kept: mask of the labels that stay.
        counts: how many go of each of `groups.cells`.
        attributes: that follow.
    """
    positions: dict[int, dict[int, list[int]]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for axis in groups.axes:
        stays = kept[axis.labels]
        if not stays.all():
            positions.setdefault(id(axis.tensor), {})[axis.dim] = np.flatnonzero(stays).tolist()
            shapes[id(axis.tensor)] = tuple(axis.tensor.shape)
    named = {name: id(t) for name, t in named_tensors(model).items() if id(t) in positions}
    saved = set(model.state_dict())
    alike: dict[int, list[str]] = {}
    for name, i in named.items():
        alike.setdefault(i, []).append(name)
    return Plan(
        {name: positions[i] for name, i in named.items()},
        {name: shapes[i] for name, i in named.items()},
        tuple(name for name in named if name not in saved),
        attributes,
        tuple(_rows(groups, counts)),
        tied=tuple(tuple(names) for names in alike.values() if len(names) > 1),
    )


def _checksum(tensor: Tensor, kept: Mapping[int, Sequence[int]]) -> int:
    """Of what goes of a tensor, whatever its precision and device."""
    goes = torch.zeros(tensor.shape, dtype=torch.bool)
    for dim, at in kept.items():
        away = torch.ones(tensor.shape[dim], dtype=torch.bool)
        away[at] = False
        goes.movedim(dim, -1)[..., away] = True
    return zlib.crc32((tensor.detach().cpu()[goes].to(torch.complex128) + 0).numpy().tobytes())  # + 0: no -0


def _rows(groups: Groups, counts: list[int]) -> list[Group]:
    kind = groups.cell_of.copy()  # of each group: its cell, or behind those its reason
    reasons = list(dict.fromkeys(why for group, why in groups.held.items() if group))
    place = {why: len(counts) + i for i, why in enumerate(reasons)}
    for group, why in groups.held.items():
        if group:
            kind[group] = place[why]
    axes: dict[int, list[str]] = {}
    members: dict[int, set[int]] = {}
    for axis in groups.axes:
        own, _ = tally(groups.root[axis.labels])
        for k in tally(kind[own])[0].tolist():
            axes.setdefault(k, []).append(str(axis))
            members.setdefault(k, set()).update(own[kind[own] == k].tolist())
    rows = []
    for k in sorted(axes):
        if k < 0:
            held = "no weights of their own"
        elif k >= len(counts):
            held = reasons[k - len(counts)]
        elif counts[k]:
            held = ""
        else:
            held = f"coupled by {groups.stuck[k]}" if k in groups.stuck else NOT_ASKED
            held = "only one of its kind" if len(members[k]) == 1 else held
        rows.append(Group(len(members[k]), counts[k] if 0 <= k < len(counts) else 0, tuple(axes[k]), held))
    return rows


def _tuples(value: Any) -> Any:
    """JSON has lists only; torch's own sizes are tuples or ints."""
    return tuple(value) if isinstance(value, list) else value
