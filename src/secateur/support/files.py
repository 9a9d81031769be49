"""Files and folders that are whole or not there at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import InputError, WriteError

StrPath = str | os.PathLike[str]

_SEEKING = threading.Lock()

_LOCK, _NEW, _OLD = "secateur.lock", "new", "old"
"""What is in a work folder: the lock of the process that works there, what it makes, what gives way to that."""

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux
_HERE = -100  # AT_FDCWD: a path is as it stands


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


def require_file(path: StrPath) -> None:
    """See that there is an ordinary file to read: to open a pipe would wait for ever.

    Raises:
        InputError: there is nothing, a folder, a pipe or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{os.fspath(path)} cannot be read ({reason}): give a file that is there") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{os.fspath(path)} is a folder: give a file in it")
    if not stat.S_ISREG(mode):
        raise InputError(f"{os.fspath(path)} is a pipe or a device: copy what it gives to a file first")


@contextmanager
def replacing(path: StrPath, like: StrPath | None = None) -> Iterator[Path]:
    """Yield a path to write a file to; it becomes `path` at the end, in one step, or is removed after an error.

    An old file stays as it is until the new one is whole and on the disk. The new one has its mode, owner and group,
    or, where there is none, no more permissions than `like`. A symbolic link is written through.
    What a killed process left beside `path` is removed.

    Raises:
        WriteError: `path` is a folder, a pipe or a device, or the system refuses to write.
    """
    with refusals(path), _work_folder(path) as (target, work):
        if target.is_dir():
            raise WriteError(f"{path} is a folder: give the name of a file in it")
        if target.exists() and not target.is_file():
            raise WriteError(f"{path} is a pipe or a device: give the name of a file")
        yield work / _NEW
        if target.exists():
            _take_mode(work / _NEW, target.stat())
        elif like is not None:
            narrow(work / _NEW, like)
        _flush(work / _NEW)
        os.replace(work / _NEW, target)
        _flush(target.parent)


@contextmanager
def replacing_folder(path: StrPath) -> Iterator[Path]:
    """Yield a new folder to write into; it becomes `path` at the end, or is removed after an error.

    An old folder is replaced only if the new one has all its files, so that no file is lost. The two are exchanged in
    one step where the system can do that (Linux); elsewhere a process that is killed between two renames leaves the old
    folder aside, and the next write to `path` puts it back. Files and folders that were there keep their modes. A
    symbolic link is written through. What a killed process left beside `path` is removed.

    Raises:
        WriteError: `path` is a file, or holds what the new folder does not, or the system refuses to write.
    """
    with refusals(path), _work_folder(path) as (target, work):
        if target.exists() and not target.is_dir():
            raise WriteError(f"{path} is a file: give the name of a folder")
        new = work / _NEW
        new.mkdir()
        yield new
        made = [new, *new.rglob("*")]
        if target.exists():
            require_covered(target, [place.relative_to(new) for place in made[1:]])
            for place in made:
                with suppress(FileNotFoundError):
                    _take_mode(place, (target / place.relative_to(new)).stat())
        for place in reversed(made):
            _flush(place)
        if not target.exists():
            os.replace(new, target)
        elif not exchange(new, target):
            os.replace(target, work / _OLD)
            try:
                os.replace(new, target)
            except OSError:
                os.replace(work / _OLD, target)
                raise
        _flush(target.parent)


@contextmanager
def scratch_folder(path: StrPath) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is removed in the end; so is what a killed process left.

    Raises:
        WriteError: the system refuses to make it.
    """
    with _work_folder(path) as (_, work):
        (work / _NEW).mkdir()
        yield work / _NEW


def require_place(path: Path) -> None:
    """See that there is a folder to write `path` into, and that it may be written.

    Raises:
        WriteError: there is none, or it may not.
    """
    with refusals(path):
        folder = Path(os.path.realpath(path)).parent
        os.stat(folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def require_covered(old: Path, new: Collection[Path]) -> None:
    """See that all that a folder holds would be written again.

    Args:
        old: the folder, if there is one.
        new: paths of the files that will be written, relative to it.

    Raises:
        WriteError: it holds something else, or a symbolic link.
    """
    covered = {part for path in new for part in (path, *path.parents)}
    lost = sorted(p.relative_to(old) for p in old.rglob("*") if p.is_symlink() or p.relative_to(old) not in covered)
    if lost:
        raise WriteError(f"{old} holds {lost[0]}, which would be lost: give a new folder, or move it away")


def narrow(path: StrPath, like: StrPath) -> None:
    """Take from group and others the permissions on `path` that they do not have on `like`."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    os.chmod(path, mode & (os.stat(like).st_mode | stat.S_IRWXU))


def exchange(one: StrPath, other: StrPath) -> bool:
    """Let two paths change names in one step, so that neither is ever missing; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0)


@contextmanager
def _work_folder(path: StrPath) -> Iterator[tuple[Path, Path]]:
    """Yield the place that a path stands for, and a folder beside it, private and locked, which goes in the end.

    Raises:
        WriteError: the system refuses to make it.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise WriteError(f"{path} is a symbolic link that leads back to itself: give another name")
    try:
        _sweep(target)
        work, lock = _locked_folder(target)
    except OSError as error:
        raise _refused(path, error) from error
    try:
        yield target, work
    finally:
        _remove(work)
        os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int]:
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:  # another process swept it before it was locked
            continue
        _lock(lock)
        if os.path.exists(work / _LOCK):
            return work, lock
        os.close(lock)


def _sweep(target: Path) -> None:
    """Remove the work folders beside `target` that no process holds any more.

    A folder that one of them had put aside and not replaced goes back to its place.
    """
    ours = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.tmp")
    try:
        beside = [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    except PermissionError:  # a folder that may be written and not read
        beside = []
    for left in beside:
        try:
            lock = os.open(left / _LOCK, os.O_RDWR)
        except OSError:
            with suppress(OSError):  # one that is being made is made anew; what is not ours is not empty
                left.rmdir()
            continue
        if _lock(lock):
            if (left / _OLD).exists() and not target.exists():
                os.replace(left / _OLD, target)
            _remove(left)
        os.close(lock)


def _remove(work: Path) -> None:
    """Remove a work folder, its lock last: what a process that is killed meanwhile leaves, the next one can sweep."""
    for place in (work / _NEW, work / _OLD):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            with suppress(OSError):
                place.unlink()
    shutil.rmtree(work, ignore_errors=True)


def _lock(descriptor: int) -> bool:
    """Take the lock of an open file, for as long as it is open, in whatever process; False if that fails."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # no such locks here, or another process has it
        return False
    return True


def _take_mode(path: Path, old: os.stat_result) -> None:
    """Give a file or folder owner, group and permissions of another; without its group, nothing for a group."""
    mode = stat.S_IMODE(old.st_mode)
    if os.name == "posix":
        for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
            with suppress(OSError):
                os.chown(path, owner, group)
        if path.stat().st_gid != old.st_gid:
            mode &= ~stat.S_IRWXG
    os.chmod(path, mode)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix" and path.is_dir():  # elsewhere folders cannot be opened
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    except PermissionError:  # a folder that may be written and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot
            raise
    finally:
        os.close(descriptor)


@contextmanager
def refusals(path: StrPath) -> Iterator[None]:
    """Say in an error of the system from inside that this path was not written, and what to do.

    Raises:
        WriteError: in its place.
    """
    try:
        yield
    except OSError as error:
        raise _refused(path, error) from error


def _refused(target: StrPath, error: OSError) -> OSError:
    if isinstance(error, WriteError):
        return error
    reason = error.strerror or str(error)
    remedy = "make its folder first" if isinstance(error, FileNotFoundError) else "see to room and permissions"
    return WriteError(f"{target} was not written ({reason}), and what was there is intact: {remedy}")
