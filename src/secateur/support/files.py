"""Files and folders that are whole or not there at all."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from secateur.errors import WriteError

StrPath = str | os.PathLike[str]

_SEEKING = threading.Lock()


class Reader:
    """A file that is read from any place, on any thread, and closed when nobody has it any more."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, size: int) -> bytes:
        """Return the bytes at a place; fewer where the file ends before."""
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, size, start)
        with _SEEKING:
            os.lseek(self._descriptor, start, os.SEEK_SET)
            return os.read(self._descriptor, size)

    def read_into(self, start: int, room: memoryview) -> int:
        """Fill memory with the bytes at a place; returns how many there were before the file ended."""
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [room], start)
        read = self.read(start, len(room))
        room[: len(read)] = read
        return len(read)


@contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Yield a name beside `path` to write to; rename it to `path` at the end, or remove it after an error.

    An old file stays as it is until the new one is whole. What a killed process left behind under such names goes.

    Raises:
        WriteError: `path` is a folder, or the system refuses to write.
    """
    target = Path(os.path.abspath(path))
    temporary = _temporary(target)
    try:
        if target.is_dir():
            raise WriteError(f"{path} is a folder: give the name of a file in it")
        _sweep(target)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing_folder(path: StrPath) -> Iterator[Path]:
    """Yield a new folder beside `path` to write into; rename it to `path` at the end, or remove it after an error.

    An old folder gives way only if the new one has all its files: nothing is lost that was not written again.

    Raises:
        WriteError: `path` is a file, or holds what the new folder does not, or the system refuses to write.
    """
    target = Path(os.path.abspath(path))
    temporary = _temporary(target)
    try:
        if target.is_file():
            raise WriteError(f"{path} is a file: give the name of a folder")
        _sweep(target)
        temporary.mkdir()
        yield temporary
        if target.exists():
            _give_way(target, temporary)
        else:
            os.replace(temporary, target)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_folder(path: StrPath) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is removed in the end; so is what a killed process left.

    Raises:
        WriteError: the system refuses to make it.
    """
    target = Path(os.path.abspath(path))
    target = target.with_name(f"{target.name}.plain")
    temporary = _temporary(target)
    try:
        _sweep(target)
        temporary.mkdir()
    except OSError as error:
        raise _refused(path, error) from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_covered(old: Path, new: Collection[Path]) -> None:
    """See that all that a folder holds would be written again.

    Args:
        old: the folder, if there is one.
        new: paths of the files that will be written, relative to it.

    Raises:
        WriteError: it holds something else.
    """
    covered = {part for path in new for part in (path, *path.parents)}
    lost = sorted(place for path in old.rglob("*") if (place := path.relative_to(old)) not in covered)
    if lost:
        raise WriteError(f"{old} holds {lost[0]}, which would be lost: give a new folder, or move it away")


def _give_way(old: Path, new: Path) -> None:
    require_covered(old, [path.relative_to(new) for path in new.rglob("*")])
    aside = new.with_suffix(".old")
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except OSError:
        os.replace(aside, old)
        raise
    _remove(aside)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.tmp")


def _sweep(target: Path) -> None:
    """Remove what processes of this machine that are no more have left beside `target`.

    A folder that one of them had put aside and not replaced goes back to its place.
    """
    start = f".{target.name}.{socket.gethostname()}-"
    for left in target.parent.glob(f"{escape(start)}*"):
        owner, _, ending = left.name.removeprefix(start).partition(".")
        pid, _, _ = owner.partition("-")
        if ending not in ("tmp", "old") or not pid.isdecimal() or _alive(int(pid)):
            continue
        if ending == "old" and not target.exists():
            os.replace(left, target)
        else:
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere the call below would do more than ask
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _refused(target: StrPath, error: OSError) -> OSError:
    if isinstance(error, WriteError):
        return error
    reason = error.strerror or str(error)
    remedy = "make its folder first" if isinstance(error, FileNotFoundError) else "see to room and permissions"
    return WriteError(f"{target} was not written ({reason}), and what was there is intact: {remedy}")
