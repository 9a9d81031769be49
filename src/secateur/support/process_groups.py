"""Processes that work together. Nothing here looks for a process group: whoever has one hands it in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

from secateur import errors
from secateur.errors import GroupError, InputError, NotFiniteError, SecateurError, WriteError

_Made = TypeVar("_Made")
Array = npt.NDArray[Any]


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
        f"a process was lost, or did not make the same call, while {what}: masks and weights here are as they "
        f"were; start all processes again, a training from its last checkpoint ({str(error).partition(chr(10))[0]})"
    )


class Processes(Protocol):
    """Some processes, of which this is one; each waits for the others in `total`.

    If another is lost, or does not come within the timeout of the group, it raises a GroupError.
    """

    rank: int
    size: int

    def total(self, array: Array) -> Array:
        """Add up the arrays (of one shape and dtype) of all processes, in place."""


class _Alone:
    """This process by itself, whatever process group exists."""

    rank = 0
    size = 1

    def total(self, array: Array) -> Array:
        return array


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


class Grid:
    """The processes of a DeviceMesh, dimension by dimension, so that no group is made and no other process waits.

    Args:
        mesh: a `torch.distributed.device_mesh.DeviceMesh`.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        ranks = mesh.mesh.flatten().tolist()
        self.rank, self.size = ranks.index(distributed.get_rank()), len(ranks)
        self._device, self._shape = mesh.device_type, tuple(mesh.shape)
        self._groups = {along: mesh.get_group(along) for along, size in enumerate(self._shape) if size > 1}

    def total(self, array: Array) -> Array:
        """Add up the arrays of all processes of the mesh, in place."""
        for group in self._groups.values():
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
        return everyone(self, text)

    def swap(self, given: Sequence[Array]) -> list[Array]:
        """Give each process of the mesh some bytes, by rank, and return what each gave to this one.

        They go along one dimension of the mesh after the other, over its own groups.
        """
        data = np.empty(len(given), object)
        data[:] = list(given)
        data = data.reshape(self._shape)
        for along, group in self._groups.items():  # from here on this dimension says from whom, and no more to whom
            rows = np.moveaxis(data, along, 0).reshape(self._shape[along], -1)
            sizes = np.array([[part.size for part in row] for row in rows])
            theirs = self._exchange(group, sizes.ravel()).reshape(sizes.shape)
            sent = np.concatenate([part for row in rows for part in row])
            got = self._exchange(group, sent, theirs.sum(1).tolist(), sizes.sum(1).tolist())
            parts = np.empty(theirs.size, object)
            parts[:] = np.split(got, theirs.cumsum()[:-1])
            rest = [size for other, size in enumerate(self._shape) if other != along]
            data = np.moveaxis(parts.reshape(self._shape[along], *rest), 0, along)
        return list(data.ravel())

    def _exchange(self, group: Any, array: Array, theirs: Sequence[int] = (), mine: Sequence[int] = ()) -> Array:
        """Deal out an array among the processes of a group: equal parts, or parts of these lengths."""
        sent = torch.from_numpy(array).to(self._device)
        got = sent.new_empty(sum(theirs) if theirs else len(sent))
        with collective():
            distributed.all_to_all_single(got, sent, list(theirs) or None, list(mine) or None, group=group)
            found: Array = got.cpu().numpy()
        return found


def everyone(processes: Processes, text: str) -> list[str]:
    """What each process says, by rank."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = np.zeros(processes.size, np.int64)
    lengths[processes.rank] = encoded.size
    lengths = processes.total(lengths)
    box = np.zeros((processes.size, lengths.max()), np.uint8)
    box[processes.rank, : encoded.size] = encoded
    return [bytes(row[:n]).decode() for row, n in zip(processes.total(box), lengths, strict=True)]


def settle(processes: Processes, trouble: Exception | None) -> None:
    """Return when all processes have come here; what one of them brings as trouble, each one raises."""
    if processes.total(np.array([trouble is not None], np.int64)).any():
        stop(processes, trouble)


def stop(processes: Processes, trouble: Exception | None) -> NoReturn:
    """Raise the trouble of this process; if it has none, an error of the kind of that of another, which it names."""
    said = everyone(processes, "" if trouble is None else f"{type(trouble).__name__}: {trouble}")
    failed = [rank for rank, words in enumerate(said) if words]
    # a training goes on after a NotFiniteError: in all processes, or in none
    first = min(failed, key=lambda rank: said[rank].startswith(NotFiniteError.__name__))
    kind: type[Exception] = getattr(errors, said[first].partition(":")[0], InputError)
    if trouble is not None and isinstance(trouble, NotFiniteError) <= (kind is NotFiniteError):
        raise trouble
    words = f"process {first} of {processes.size} stopped with {said[first]}; so do the others, and nothing is changed"
    raise kind(words) from trouble


def together(processes: Processes, work: Callable[[], _Made]) -> _Made:
    """Do work that waits for no other process, and return when all have done theirs; what one raises, all raise."""
    trouble: Exception | None = None
    made: list[_Made] = []
    try:
        made.append(work())
    except Exception as error:  # told to the others first, which else would wait for this process
        trouble = error
    settle(processes, trouble)
    return made[0]


@contextmanager
def shared(place: AbstractContextManager[Path], processes: Processes, *, seen: bool = False) -> Iterator[Path]:
    """Enter `replacing(path)` or its like in the first process, for all: they leave it together.

    Args:
        place: gives a path that is to be written, and puts what is there into its place at the end.
        processes: that write; each gets the path. Errors in one of them, before or after, are raised in all.
        seen: whether all of them write there, and not the first one only.

    Raises:
        WriteError: another process does not see the path.
    """
    with ExitStack() as stack:
        first = processes.rank == 0
        text = together(processes, lambda: str(stack.enter_context(place)) if first else "")
        temporary = Path(everyone(processes, text)[0])
        lost: Exception | None = None
        if seen and not temporary.parent.is_dir():
            lost = WriteError(
                f"{temporary.parent}, which process 0 made, is not there for process {processes.rank}: give a path on "
                "a file system that all processes share"
            )
        settle(processes, lost)
        trouble: Exception | None = None
        try:
            yield temporary
        except GroupError:
            raise
        except Exception as error:
            trouble = error
        settle(processes, trouble)
        together(processes, stack.close)


ALONE: Processes = _Alone()
