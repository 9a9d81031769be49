"""Where the shard of a tensor that a process holds lies in the whole tensor."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import InputError

Indices = npt.NDArray[np.int64]

_TENSORS = "torch.distributed.tensor"  # which takes long to import: a DTensor exists only where somebody has


@dataclass(frozen=True)
class Place:
    """Of each dimension of a tensor, the indices that are here, ascending.

    So the row-major order of a shard is that of the whole, and no index has to be sorted.

    Attributes:
        shape: of the whole tensor.
        index: for each dimension the indices that are here.
        counts: whether this process counts the shard; of copies only one does.
    """

    shape: tuple[int, ...]
    index: tuple[Indices, ...]
    counts: bool = True

    @property
    def numel(self) -> int:
        """Numbers in the whole tensor."""
        return math.prod(self.shape)

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

    def _strides(self) -> list[int]:
        return [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    return _TENSORS in sys.modules and isinstance(tensor, sys.modules[_TENSORS].DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here, detached, in the memory of the tensor; of one that is no DTensor all of it."""
    found: Any = tensor.detach()
    part: Tensor = found.to_local() if is_sharded(found) else found
    return part


def place_of(name: str, tensor: Any, widest: Any = None) -> Place | None:
    """Where the part of a tensor that is here lies, and whether this process counts it; None if it is no DTensor.

    Args:
        name: of the tensor, for messages.
        tensor: a DTensor, or another.
        widest: the largest DeviceMesh of the tensors that are counted together. Where a mesh lacks a dimension of it,
            as a tensor on no mesh lacks them all, there are copies along that dimension.

    Raises:
        InputError: sums that are not complete (Partial), a local part that is no plain tensor.
    """
    if widest is None and not is_sharded(tensor):
        return None
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Place(shape, tuple(np.arange(n) for n in shape), all(at == 0 for at in widest.get_coordinate()))
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise InputError(f"{name} holds sums that are not complete ({placements}): redistribute it, or leave it out")
    if type(tensor.to_local()) is not Tensor:
        raise InputError(
            f"{name} holds {type(tensor.to_local()).__name__}, no plain numbers: leave it out of the scope"
        )
    index = tuple(_here(size, mesh, [_along(p, d) for p in placements]) for d, size in enumerate(shape))
    copies = zip(mesh.get_coordinate() or (), placements, strict=True)
    counts = all(at == 0 for at, placement in copies if placement.is_replicate())
    return Place(shape, index, counts and _first_of_copies(mesh, widest))


def _along(placement: Any, dimension: int) -> Any:
    """How a vector of the indices of one dimension is placed."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if getattr(placement, "dim", None) != dimension:
        return Replicate()
    strided = isinstance(placement, _StridedShard)
    return _StridedShard(0, split_factor=placement.split_factor) if strided else Shard(0)


def _here(size: int, mesh: Any, placements: list[Any]) -> Indices:
    """The indices of a dimension that are here; torch itself says which, without communication."""
    from torch.distributed.tensor import distribute_tensor

    if all(placement.is_replicate() for placement in placements):
        return np.arange(size)
    every = torch.arange(size, device=mesh.device_type)
    found: Indices = distribute_tensor(every, mesh, placements, src_data_rank=None).to_local().cpu().numpy()
    return found


def _first_of_copies(mesh: Any, widest: Any) -> bool:
    """Whether this process is the first along the dimensions of the widest mesh that a mesh lacks."""
    if widest is None or mesh == widest:
        return True
    ranks = set(mesh.mesh.flatten().tolist())
    where = torch.stack([(widest.mesh == rank).nonzero()[0] for rank in ranks])
    lacking = [bool((column == column[0]).all()) for column in where.T]
    return all(at == 0 for at, lacks in zip(widest.get_coordinate(), lacking, strict=True) if lacks)
