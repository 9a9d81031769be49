"""Files and folders that are whole or not there at all."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Yield a name beside `path` to write to; rename it to `path` at the end, or remove it after an error.

    An old file stays as it is until the new one is whole. What a killed process left behind under such names goes.

    Raises:
        WriteError: `path` is a folder, or the system refuses to write.
    """
    target = Path(path)
    if target.is_dir():
        raise WriteError(f"{target} is a folder: give the name of a file in it")
    temporary = _temporary(target)
    try:
        _sweep(target)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: StrPath) -> Iterator[Path]:
    """Yield a new folder beside `path` to write into; rename it to `path` at the end, or remove it after an error.

    An old folder gives way only if the new one has all its files: nothing is lost that was not written again.

    Raises:
        WriteError: `path` is a file, or holds what the new folder does not, or the system refuses to write.
    """
    target = Path(path)
    if target.is_file():
        raise WriteError(f"{target} is a file: give the name of a folder")
    temporary = _temporary(target)
    try:
        _sweep(target)
        temporary.mkdir()
        yield temporary
        if target.exists():
            _give_way(target, temporary)
        else:
            os.replace(temporary, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _give_way(old: Path, new: Path) -> None:
    lost = sorted({p.relative_to(old) for p in old.rglob("*")} - {p.relative_to(new) for p in new.rglob("*")})
    if lost:
        raise WriteError(f"{old} holds {lost[0]}, which would be lost: give a new folder, or move it away")
    aside = new.with_suffix(".old")
    os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def _sweep(target: Path) -> None:
    """Remove what processes of this machine that are no more have left beside `target`."""
    start = f".{target.name}.{socket.gethostname()}-"
    for left in target.parent.glob(f"{start.replace('[', '[[]')}*.tmp"):
        pid = left.name.removeprefix(start).removesuffix(".tmp")
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


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


def _refused(target: Path, error: OSError) -> OSError:
    if isinstance(error, WriteError):
        return error
    reason = error.strerror or str(error)
    remedy = "make its folder first" if isinstance(error, FileNotFoundError) else "see to room and permissions"
    return WriteError(f"{target} was not written ({reason}), and what was there is intact: {remedy}")
