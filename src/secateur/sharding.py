"""How tensors are spread over processes (DTensor): where the part that is here lies in the whole, and sums over all."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.errors import GroupError, InputError, listed
from secateur.scope import Member
from secateur.support import bits
from secateur.support.bits import Indices
from secateur.support.process_groups import Grid, collective, during

_N = TypeVar("_N", int, float)
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Place:
    """Of each dimension of a tensor, the indices that are here, ascending.

    So the row-major order of a shard is that of the whole, and no index has to be sorted.

    Attributes:
        shape: of the whole tensor.
        index: for each dimension the indices that are here.
        counts: whether this process counts the shard; of copies only one does.
        mesh, placements: of the DTensor; of another tensor None.
    """

    shape: tuple[int, ...]
    index: tuple[Indices, ...]
    counts: bool = True
    mesh: Any = None
    placements: Any = None

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Place:
        """Of a tensor that is here as a whole."""
        return cls(tuple(shape), tuple(np.arange(n) for n in shape))

    @property
    def numel(self) -> int:
        """Numbers in the whole tensor."""
        return math.prod(self.shape)

    def row(self, row: int | None) -> range:
        """Where the row of the whole tensor lies in the shard, row-major; an empty range if it is not here."""
        at = np.flatnonzero(self.index[0] == row)
        size = math.prod(map(len, self.index[1:]))
        return range(int(at[0]) * size, (int(at[0]) + 1) * size) if at.size else range(0)

    @property
    def parts(self) -> int:
        """Of how many the tensor is made up."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.size(d) for d, placed in enumerate(self.placements) if not placed.is_replicate())

    @property
    def number(self) -> int:
        """Of this process among those of the mesh, from 1."""
        found = 0
        for size, at in zip(self.mesh.shape, self.mesh.get_coordinate(), strict=True) if self.mesh is not None else ():
            found = found * size + at
        return found + 1

    @property
    def layout(self) -> tuple[Any, Any] | None:
        """How the tensor is spread, as `layout` says it."""
        return None if self.mesh is None else (self.mesh, self.placements)

    def cells(self, sizes: Sequence[int]) -> Place | None:
        """Where whole cells of a tensor that is cut into such lie in the tensor of all of them; None if some are cut.

        Args:
            sizes: of a cell along each dimension; what is left over at an end belongs to none.
        """
        found = []
        for index, size, length in zip(self.index, sizes, self.shape, strict=True):
            inside = index[: np.searchsorted(index, length // size * size)]
            first = inside[::size] // size
            if not np.array_equal(inside, (first[:, None] * size + np.arange(size)).reshape(-1)):
                return None
            found.append(first)
        shape = tuple(length // size for length, size in zip(self.shape, sizes, strict=True))
        return replace(self, shape=shape, index=tuple(found))

    def to_whole(self, flat: Indices) -> Indices:
        """Row-major indices in the whole tensor of some in the shard; both ascend."""
        found = np.zeros_like(flat)
        for index, stride in zip(reversed(self.index), reversed(self._strides()), strict=True):
            flat, at = np.divmod(flat, max(len(index), 1))
            found += index[at] * stride
        return found

    def locate(self, whole: Indices) -> tuple[npt.NDArray[np.bool_], Indices]:
        """Tell which row-major indices of the whole tensor are here, and where these are in the shard."""
        here, local = np.ones(len(whole), bool), np.zeros_like(whole)
        for index, stride, size in zip(self.index, self._strides(), self.shape, strict=True):
            wanted = whole // stride % size
            at = np.searchsorted(index, wanted)
            found = at < len(index)
            found[found] = index[at[found]] == wanted[found]
            here &= found
            local = local * len(index) + at
        return here, local[here]

    def before(self, whole: int) -> int:
        """How many numbers of the shard come before a row-major index of the whole tensor."""
        found, sizes = 0, [len(index) for index in self.index]
        if whole >= self.numel:
            return math.prod(sizes)
        for d, (index, stride, size) in enumerate(zip(self.index, self._strides(), self.shape, strict=True)):
            wanted = whole // stride % size
            at = int(np.searchsorted(index, wanted))
            found += at * math.prod(sizes[d + 1 :])
            if at == len(index) or index[at] != wanted:
                break
        return found

    def part(self, whole: Tensor) -> Tensor:
        """What is here of a whole tensor, which lies on every process."""
        for dimension, index in enumerate(self.index):
            if len(index) < whole.shape[dimension]:
                whole = whole.index_select(dimension, torch.from_numpy(index).to(whole.device))
        return whole

    def spread(self, part: Tensor) -> Tensor:
        """A tensor spread as this one is, from the part that is here."""
        if self.mesh is None:
            return part
        from torch.distributed.tensor import DTensor

        shape, stride = torch.Size(self.shape), tuple(self._strides())
        return DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def packed(self, mask: Tensor) -> Tensor:
        """The bits of a mask that is spread as this tensor is, row by row; its rows stay where they are."""
        if self.mesh is None:
            return bits.pack_rows(mask)
        whole: Any = mask
        with collective():
            rows = bits.pack_rows(bits.local(whole.redistribute(placements=self._by_rows())))
        return replace(self, shape=(self.shape[0], rows.shape[1]), placements=self._by_rows()).spread(rows)

    def unpacked(self, rows: Tensor) -> Tensor:
        """The part that is here of the mask that was `packed`, by this process or others, or is whole here."""
        found: Any = rows
        if bits.is_sharded(rows):
            if self.mesh is not None and (found.device_mesh, found.placements) == (self.mesh, self._by_rows()):
                return self.part(bits.unpack_rows(bits.local(rows), (len(self.index[0]), *self.shape[1:])))
            rows = _gathered(found)
        return self.part(bits.unpack_rows(rows, self.shape))

    def _by_rows(self) -> tuple[Any, ...]:
        """Placements by which rows lie where they do, and are whole."""
        from torch.distributed.tensor import Replicate

        return tuple(one if getattr(one, "dim", 0) == 0 else Replicate() for one in self.placements)

    def _strides(self) -> list[int]:
        return [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]


@dataclass(frozen=True)
class Spread:
    """How some tensors are spread over processes that work together.

    Attributes:
        places: of each tensor, by its name, where the part that is here lies.
        grid: the processes.
    """

    places: Mapping[str, Place]
    grid: Grid

    def total(self, found: Mapping[str, _N]) -> dict[str, _N]:
        """Add up what each process found in its parts of some tensors, each part once; all processes call it."""
        own = [number * self.places[name].counts for name, number in found.items()]
        return dict(zip(found, self.grid.total(np.array(own)).tolist(), strict=True))

    def beside(self, other: Spread) -> Spread:
        """Of the tensors of both; where both have a name, it is that of this one.

        Raises:
            InputError: neither's processes are among those of the other.
        """
        widest = _widest({one.grid.mesh: next(iter(one.places), "") for one in (other, self)})
        places = {**other.places, **self.places}
        counted = {name: replace(place, counts=_counts(name, place, widest)) for name, place in places.items()}
        return Spread(counted, Grid(widest))

    def with_whole(self, shapes: Mapping[str, Sequence[int]]) -> Spread:
        """The same, and tensors of these shapes that are whole in each process, unless their names are there."""
        whole = {name: replace(Place.whole(shape), counts=self.grid.rank == 0) for name, shape in shapes.items()}
        return replace(self, places={**whole, **self.places})

    def counted(self, found: Mapping[str, int], marks: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """As `total`; and see that the copies of each part are alike.

        Args:
            found: in the part of each tensor.
            marks: the checksum of what the found was found in.

        Returns:
            The sums; and of each tensor a checksum over all processes.

        Raises:
            InputError: copies differ.
        """
        copies = {name: self.grid.size // self.places[name].parts for name in found}
        several = [name for name in found if copies[name] > 1]
        own = [number * self.places[name].counts for name, number in found.items()]
        own += [marks[name] * self.places[name].number * self.places[name].counts for name in found]
        own += [marks[name] * (copies[name] * self.places[name].counts - 1) for name in several]
        sums = self.grid.total(np.array(own, np.int64)).tolist()
        differ = [name for name, rest in zip(several, sums[2 * len(found) :], strict=True) if rest]
        if differ:
            raise InputError(
                f"the copies of {listed(differ)} in several processes differ, and so would their masks: make them the "
                "same again, from a checkpoint that all processes load"
            )
        return dict(zip(found, sums, strict=False)), dict(zip(found, sums[len(found) :], strict=False))


def alike(
    model: nn.Module | Mapping[str, Any],
    make: Callable[[], _Made],
    tell: Callable[[_Made], Mapping[str, Any]],
    *,
    remedy: str = "Nothing was changed: call it alike in all processes of the mesh",
) -> _Made:
    """What a function makes for a model; if that is spread over processes, all of them must make the same.

    Args:
        model: of which all processes have a part; or its tensors by name.
        make: called once; it must not wait for other processes.
        tell: what must be the same in all processes, of what was made, as plain data.
        remedy: the end of the message.

    Raises:
        InputError: another process made something else, or raised; the message says which and what.
    """
    return agree(grid_of(dict(model.named_parameters()) if isinstance(model, nn.Module) else model), make, tell, remedy)


def agree(
    where: Grid | None,
    make: Callable[[], _Made],
    tell: Callable[[_Made], Mapping[str, Any]],
    remedy: str = "Nothing was changed: call it alike in all processes of the mesh",
) -> _Made:
    """As `alike`, of these processes; None is this one alone."""
    if where is None:
        return make()
    made: list[_Made] = []
    trouble: Exception | None = None
    try:
        made.append(make())
        said = dict(tell(made[0]))
    except GroupError:
        raise
    except Exception as error:  # told to the others first, which else would wait for this process
        trouble, said = error, {"error": f"{type(error).__name__}: {error}"}
    with during("what each of them is to do was compared"):
        every = [json.loads(text) for text in where.differ(json.dumps(said, sort_keys=True, default=str))]
    if trouble is not None:
        raise trouble
    if every:
        raise InputError(f"{_difference(every)}. {remedy}")
    return made[0]


def _difference(said: Sequence[Mapping[str, Any]]) -> str:
    """Name a process that differs from the first one, and in what."""
    failed = next((k for k, one in enumerate(said) if "error" in one), None)
    if failed is not None:
        return f"process {failed} stopped with {said[failed]['error']}"
    other = next(k for k, one in enumerate(said) if one != said[0])
    key = next(key for key in {**said[other], **said[0]} if said[other].get(key) != said[0].get(key))
    mine, theirs = said[0].get(key, "none"), said[other].get(key, "none")
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        inner = next(name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name))
        named = f"{key} of {inner}" if key in ("sparsity", "masks") else f"{inner} of {key}"
        key, mine, theirs = named, mine.get(inner, "none"), theirs.get(inner, "none")
    return f"process {other} has {key} {theirs}, process 0 has {mine}"


def layout(tensor: Any) -> tuple[Any, Any] | None:
    """The mesh and the placements of a DTensor; None of another tensor."""
    return (tensor.device_mesh, tensor.placements) if bits.is_sharded(tensor) else None


def spread_like(part: Tensor, weight: Tensor) -> Tensor:
    """A tensor of the shape of a weight, spread as that is, from the part that is here."""
    place = place_of("", weight)
    return part if place is None else place.spread(part)


def part_like(tensor: Any, weight: Any) -> Tensor:
    """The part that is here of a tensor, spread or not, of the shape of a weight."""
    place = place_of("", weight)
    if bits.is_sharded(tensor):
        if layout(tensor) == layout(weight):
            return bits.local(tensor)
        tensor = _gathered(tensor)
    return tensor if place is None else place.part(tensor)


def placed_as(tensor: Any, like: Any) -> Any:
    """A tensor spread as another is: of a DTensor whose sums are not complete, as a gradient may be, they are added up.

    All processes call it.
    """
    if not (bits.is_sharded(tensor) and bits.is_sharded(like)) or tensor.placements == like.placements:
        return tensor
    with collective():
        return tensor.redistribute(like.device_mesh, like.placements)


def _gathered(tensor: Any) -> Tensor:
    """All of a DTensor, which has bits or, in a checkpoint of another layout, sums of gradients."""
    with collective():
        whole: Tensor = tensor.full_tensor()
    return whole


def grid_of(tensors: Mapping[str, Any]) -> Grid | None:
    """The processes over which some tensors are spread; None if none of them is.

    Raises:
        InputError: meshes that do not lie in one of them; this process is on none.
    """
    widest = _widest(_meshes(tensors))
    return None if widest is None else Grid(widest)


def _meshes(tensors: Mapping[str, Any]) -> dict[Any, str]:
    """Each mesh on which some tensors lie, and the name of one of them."""
    return {tensor.device_mesh: name for name, tensor in tensors.items() if bits.is_sharded(tensor)}


def _widest(meshes: Mapping[Any, str]) -> Any:
    """The largest mesh of some, in which the others lie; None if there is none."""
    if not meshes:
        return None
    widest = max(meshes, key=lambda mesh: mesh.size())
    for mesh, name in meshes.items():
        _lacking(name, mesh, widest)
    if widest.get_coordinate() is None:
        raise InputError(
            f"this process is not on {widest}, where {meshes[widest]} lies: call this on its processes only"
        )
    return widest


def by_shape(call: Callable[[Tensor], Any], name: str, weight: Tensor) -> Any:
    """The part that is here of what a function gives for a weight, of which it looks at the shape alone.

    Raises:
        InputError: a DTensor that is not spread as the weight is.
    """
    part = bits.local(weight)
    found = call(torch.empty((), dtype=part.dtype, device=part.device).expand(weight.shape))
    if bits.is_sharded(found) and layout(found) != layout(weight):
        raise InputError(f"the numbers given for {name} are sharded in another way than it is: redistribute them")
    return part_like(found, weight) if isinstance(found, Tensor) and found.shape == weight.shape else found


def spread(tensors: Mapping[str, Any]) -> Spread | None:
    """How some tensors are spread over processes; None if none of them is.

    Raises:
        InputError: as `place_of` and `grid_of`.
    """
    widest = _widest(_meshes(tensors))
    if widest is None:
        return None
    here = functools.cache(_here)  # most tensors have sides that others have too
    places = {name: place_of(name, tensor, widest, here) for name, tensor in tensors.items()}
    return Spread({name: place for name, place in places.items() if place is not None}, Grid(widest))


def protected(member: Member, place: Place | None) -> range:
    """Row-major indices, among the weights of a tensor that are here, that are never pruned."""
    return member.protected if place is None else place.row(member.padding_row)


def total(tensors: Mapping[str, Any], found: Mapping[str, _N]) -> dict[str, _N]:
    """What was found in tensors, or, where they are spread over processes, in all parts of them."""
    where = spread(tensors)
    return dict(found) if where is None else where.total(found)


def place_of(
    name: str, tensor: Any, widest: Any = None, here: Callable[[int, Any, tuple[Any, ...]], Indices] | None = None
) -> Place | None:
    """Where the part of a tensor that is here lies, and whether this process counts it; None if it is no DTensor.

    Args:
        name: of the tensor, for messages.
        tensor: a DTensor, or another.
        widest: the largest DeviceMesh of the tensors that are counted together. Where a mesh lacks a dimension of it,
            as a tensor on no mesh lacks them all, there are copies along that dimension.
        here: remembers which indices of a side are here, for tensors with the same sides.

    Raises:
        InputError: sums that are not complete (Partial), a local part that is no plain tensor.
    """
    if widest is None and not bits.is_sharded(tensor):
        return None
    shape = tuple(tensor.shape)
    if not bits.is_sharded(tensor):
        place = Place.whole(shape)
        return replace(place, counts=_counts(name, place, widest))
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise InputError(f"{name} holds sums that are not complete ({placements}): redistribute it, or leave it out")
    if type(tensor.to_local()) is not Tensor:
        raise InputError(
            f"{name} holds {type(tensor.to_local()).__name__}, no plain numbers: leave it out of the scope"
        )
    if mesh.get_coordinate() is None:
        raise InputError(f"{name} lies on {mesh}, of which this process is no part: leave it out of the scope here")
    here = here or _here
    index = tuple(here(size, mesh, tuple(_along(p, d) for p in placements)) for d, size in enumerate(shape))
    place = Place(shape, index, True, mesh, placements)
    return replace(place, counts=_counts(name, place, widest))


def _along(placement: Any, dimension: int) -> Any:
    """How a vector of the indices of one dimension is placed."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if getattr(placement, "dim", None) != dimension:
        return Replicate()
    strided = isinstance(placement, _StridedShard)
    return _StridedShard(0, split_factor=placement.split_factor) if strided else Shard(0)


def _here(size: int, mesh: Any, placements: tuple[Any, ...]) -> Indices:
    """The indices of a dimension that are here; torch itself says which, without communication."""
    from torch.distributed.tensor import distribute_tensor

    if all(placement.is_replicate() for placement in placements):
        return np.arange(size)
    every = torch.arange(size, device=mesh.device_type)
    found: Indices = distribute_tensor(every, mesh, placements, src_data_rank=None).to_local().cpu().numpy()
    return found


def _counts(name: str, place: Place, widest: Any) -> bool:
    """Whether this process is the first of those that have the same part, on the widest mesh."""
    if place.mesh is None:
        return all(at == 0 for at in widest.get_coordinate())
    copies = zip(place.mesh.get_coordinate(), place.placements, strict=True)
    first = all(at == 0 for at, placement in copies if placement.is_replicate())
    if widest is None:
        return first
    at = widest.get_coordinate()
    return first and all(at[dimension] == 0 for dimension in _lacking(name, place.mesh, widest))


def _lacking(name: str, mesh: Any, widest: Any) -> list[int]:
    """The dimensions of the widest mesh that a mesh lacks.

    Raises:
        InputError: it is no part of the widest one.
    """
    if mesh == widest:
        return []
    where = [(widest.mesh == rank).nonzero() for rank in mesh.mesh.flatten().tolist()]
    lacking = [dimension for dimension, at in enumerate(torch.cat(where).T.tolist()) if len(set(at)) == 1]
    wide = math.prod(size for dimension, size in enumerate(widest.shape) if dimension not in lacking)
    if not all(map(len, where)) or wide != mesh.size():
        raise InputError(
            f"{name} lies on {mesh}, which is no part of {widest}, on which others lie: prune them one by one, each "
            "with a scope of its own, or before sharding"
        )
    return lacking
