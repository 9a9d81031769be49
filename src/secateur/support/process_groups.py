"""Processes that work together. Nothing here looks for a process group: whoever has one hands it in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

from secateur.errors import GroupError, SecateurError

Array = npt.NDArray[Any]
Total = Callable[[Array], Array]
"""Adds up the arrays of one shape and dtype that several processes hold, in place, and returns the sum."""

_TEXT = 4096


@contextmanager
def collective() -> Iterator[None]:
    """Around a call of torch.distributed that waits for other processes: say what its error means.

    The timeout is that of the group; nothing is tried twice.

    Raises:
        GroupError: the call failed, most likely as another process has ended or did not come in time.
    """
    try:
        yield
    except SecateurError:
        raise
    except RuntimeError as error:
        raise _lost("the processes waited for each other", error) from error


@contextmanager
def during(what: str) -> Iterator[None]:
    """Say in a GroupError from inside what was going on: "masks were chosen at step 7"."""
    try:
        yield
    except GroupError as error:
        raise _lost(what, error.__cause__ or error) from error.__cause__


def _lost(what: str, error: BaseException) -> GroupError:
    return GroupError(
        f"a process was lost, or did not come, while {what}: masks and weights here are as they were; start all "
        f"processes again, a training from its last checkpoint ({str(error).partition(chr(10))[0]})"
    )


class Processes(Protocol):
    """Some processes, of which this is one; each waits for the others in `total` and `from_first`.

    If another is lost, or does not come within the timeout of the group, these raise a GroupError.
    """

    rank: int
    size: int

    def total(self, array: Array) -> Array:
        """Add up the arrays (of one shape and dtype) of all processes, in place."""

    def from_first(self, text: str) -> str:
        """Return the text (at most 4,096 bytes) that the process of rank 0 holds."""


class _Alone:
    """This process by itself, whatever process group exists."""

    rank = 0
    size = 1

    def total(self, array: Array) -> Array:
        return array

    def from_first(self, text: str) -> str:
        return text


class Group:
    """The processes of a `torch.distributed` process group, by default those of the default group."""

    def __init__(self, group: Any = None) -> None:
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        self._group = group

    def total(self, array: Array) -> Array:
        """Add up the arrays of all ranks, in place."""
        with collective():
            distributed.all_reduce(torch.from_numpy(array), group=self._group)
        return array

    def from_first(self, text: str) -> str:
        """Return the text that rank 0 holds."""
        box = np.zeros(_TEXT, np.uint8)
        if self.rank == 0:
            encoded = np.frombuffer(text.encode(), np.uint8)
            box[: encoded.size] = encoded
        return bytes(self.total(box)).rstrip(b"\0").decode()


class Grid:
    """The processes of a DeviceMesh, dimension by dimension, so that no group is made and no other process waits.

    Args:
        mesh: a `torch.distributed.device_mesh.DeviceMesh`.
    """

    def __init__(self, mesh: Any) -> None:
        ranks = mesh.mesh.flatten().tolist()
        self.rank, self.size = ranks.index(distributed.get_rank()), len(ranks)
        self._device = mesh.device_type
        self._groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim) if mesh.size(dimension) > 1]

    def total(self, array: Array) -> Array:
        """Add up the arrays of all processes of the mesh, in place."""
        for group in self._groups:
            sent = torch.from_numpy(array).to(self._device)  # a group of GPUs takes no tensor of the CPU
            with collective():
                distributed.all_reduce(sent, group=group)
                array[...] = sent.cpu().numpy()
        return array

    def differ(self, text: str) -> list[str]:
        """What each process says, by rank, if they do not say the same; else nothing."""
        digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint16).astype(np.int64)
        sums, squares = self.total(np.stack([digest, digest**2]))
        if (self.size * squares == sums**2).all():  # they vary nowhere
            return []
        encoded = np.frombuffer(text.encode(), np.uint8)
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = encoded.size
        lengths = self.total(lengths)
        box = np.zeros((self.size, lengths.max()), np.uint8)
        box[self.rank, : encoded.size] = encoded
        return [bytes(row[:n]).decode() for row, n in zip(self.total(box), lengths, strict=True)]


ALONE: Processes = _Alone()
