"""Files of `torch.save`: which of the states in them is taken, and what is left. No pickled code is ever run."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import FileError, InputError, UnknownNameError, nearest
from secateur.storage.container import damaged
from secateur.support.tables import counted

SUFFIXES = ".pt", ".pth", ".bin", ".ckpt"
ENVELOPES = "state_dict", "model_state_dict", "model", "module", "params"
"""Names under which a training checkpoint has the state of its model, the first that is there."""

_DEEPEST = 8  # dictionaries within dictionaries; more is no checkpoint
_SHOWN = 8  # of what was left
_ROOM = 1 << 20

Place = tuple[Any, ...]
"""The keys that lead to something, from the outermost dictionary on."""


def read_states(file: Path, key: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read the tensors of a file, or of the state in it that `key` names.

    Of nested dictionaries the one under a name of `ENVELOPES` is entered; if there is none, all but the optimizer's,
    their names joined by dots.

    Returns:
        The tensors by name, and a note that says what was taken and what was left, if anything was.

    Raises:
        InputError: the file is damaged, needs pickled code, holds no tensor, or gives two tensors one name.
        UnknownNameError: it has no such key.
    """
    saved, place = _unpickled(file), Place()
    states = _States(file)
    if key is not None:
        saved, place = _entered(file, saved, key)
    found = states.tensors(saved, place)
    if not found:
        within = "" if key is None else f" under {key}"
        raise InputError(f"{file} holds no tensor{within}: give a file that holds a state_dict")
    return {name: tensor for name, (tensor, _) in found.items()}, states.said(len(found))


class _States:
    """A walk through nested dictionaries.

    Attributes:
        taken: where the tensors that were taken lie, if that is not everywhere.
        left: what was not taken, with where it lies.
    """

    def __init__(self, file: Path) -> None:
        self.taken = Place()
        self.left: list[tuple[Place, Any]] = []
        self._file = file
        # names that a small file repeats by referring to one dictionary again and again are not in it
        self._room = file.stat().st_size + _ROOM

    def tensors(self, saved: Any, place: Place) -> dict[str, tuple[Tensor, Place]]:
        """Return the tensors of a dictionary, and of those in it, by their joined names, each with its place."""
        if isinstance(saved, Tensor):
            return {"tensor": (saved, place)}
        if not isinstance(saved, Mapping) or len(place) > _DEEPEST:
            return {}
        for envelope in ENVELOPES:
            before = len(self.left)
            if isinstance(saved.get(envelope), Mapping):
                inside = self.tensors(saved[envelope], (*place, envelope))
                if inside:
                    self.left += [((*place, key), value) for key, value in saved.items() if key != envelope]
                    self.taken = self.taken or (*place, envelope)
                    return inside
                del self.left[before:]
        found: dict[str, tuple[Tensor, Place]] = {}
        for key, value in saved.items():
            name, here = _name(key), (*place, key)
            inside = {}
            if isinstance(value, Tensor):
                inside = {name: (value, here)}
            elif isinstance(value, Mapping) and "optim" not in name:
                inside = {f"{name}.{rest}": there for rest, there in self.tensors(value, here).items()}
            if not inside:
                self.left.append((here, value))
            self._add(found, inside)
        return found

    def _add(self, found: dict[str, tuple[Tensor, Place]], more: Mapping[str, tuple[Tensor, Place]]) -> None:
        self._room -= 1 + sum(map(len, more))
        if self._room < 0:
            raise FileError(f"{self._file} names more tensors than its bytes can hold: copy or download it again")
        for name, (tensor, place) in more.items():
            if name in found:
                raise InputError(
                    f"{self._file}: two tensors get the name {name}, that of {_keys(found[name][1])} and that of "
                    f"{_keys(place)}: rename one of them, or take one state with --key (key= in Python)"
                )
            found[name] = tensor, place

    def said(self, count: int) -> tuple[str, ...]:
        """Say what was taken and what was left, if anything was."""
        if not self.left:
            return ()
        counts = [(".".join(map(_name, place)), len(_tensors(value))) for place, value in self.left]
        others = [".".join(map(_name, place)) for place, value in self.left if _may_be_state(place, value, count)]
        shown = [
            f"{name} ({counted(tensors, 'tensor')})" if tensors else name for name, tensors in sorted(counts, key=_rank)
        ]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        choose = f"; to take another state: --key {others[0]} (key= in Python)" if others else ""
        what = (
            f"{'.'.join(map(_name, self.taken))} ({counted(count, 'tensor')})"
            if self.taken
            else counted(count, "tensor")
        )
        return (f"took {what}; left {', '.join(shown[:_SHOWN])}{more}{choose}",)


def _rank(of: tuple[str, int]) -> bool:
    return not of[1]  # what holds tensors first


def _may_be_state(place: Place, value: Any, count: int) -> bool:
    """Whether this may be another state of a model of so many tensors: not what callbacks and optimizers remember."""
    if not isinstance(value, Mapping) or any("optim" in _name(key) for key in place):
        return False
    return 2 * sum(tensor.ndim > 0 for tensor in _tensors(value)) >= count


def _tensors(value: Any) -> list[Tensor]:
    """Find the tensors in nested containers, those that are there twice once."""
    left, seen, tensors = [value], set[int](), list[Tensor]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            tensors.append(one)
        elif isinstance(one, Mapping):
            left.extend(one.values())
        elif isinstance(one, (list, tuple)):
            left.extend(one)
    return tensors


def _entered(file: Path, saved: Any, key: str, place: Place = ()) -> tuple[Any, Place]:
    """Find what a key names: "ema", or "states.ema" for one within another."""
    names = {_name(inner): inner for inner in saved} if isinstance(saved, Mapping) else {}
    if key in names:
        return saved[names[key]], (*place, names[key])
    for name, inner in names.items():
        if key.startswith(f"{name}.") and isinstance(saved[inner], Mapping):
            return _entered(file, saved[inner], key.removeprefix(f"{name}."), (*place, inner))
    within = f" in {'.'.join(map(_name, place))}" if place else ""
    raise UnknownNameError(f"{file} has no {key}{within}; {nearest(key, names)}")


def _name(key: object) -> str:
    try:
        return str(key)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return type(key).__name__


def _keys(place: Sequence[object]) -> str:
    return "".join(f"[{key!r}]" for key in place)


def _unpickled(file: Path) -> Any:
    with open(file, "rb") as opened:  # what the system says of a file that may not be read is clear
        if not opened.read(1):
            raise FileError(damaged(file, "it is empty"))
    zipped = _is_zip(file)  # files of torch < 1.6 are no zip archives, and cannot be mapped
    if zipped:
        _refuse_compressed(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a TorchScript archive is refused below, in our own words
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the unpickler of damaged bytes raises whatever it stumbles over
        code = re.search(r"GLOBAL ([\w.]+)|TorchScript", str(error))
        if not code:
            advice = "weights_only" in str(error)  # torch's advice is to run the code in the file
            reason = type(error).__name__ if advice or not str(error) else str(error)
            raise FileError(damaged(file, reason)) from error
        raise InputError(
            f"{file} needs pickled code ({code[1] or code[0]}), and secateur runs none: if you trust it, "
            "load it in its own program and torch.save(model.state_dict(), ...)"
        ) from error


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile as error:
        raise FileError(damaged(file, str(error))) from error


def _refuse_compressed(file: Path) -> None:
    """See that an archive is not compressed: mapped, it would give other numbers; unpacked, it may take terabytes.

    Raises:
        FileError: it is, or its table is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            read = (entry for entry in archive.infolist() if "/code/" not in entry.filename)  # TorchScript's source
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in read)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FileError(damaged(file, str(error))) from error
    if not stored:
        raise FileError(
            f"{file} is a compressed archive, which torch.save never writes: if you trust it, load it with torch.load, "
            "and write it again with torch.save"
        )
