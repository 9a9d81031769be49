"""Checkpoints: what a file or a folder holds, tensor by tensor. No pickled code is ever run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import FileError, InputError, InputTypeError, listed, nearest
from secateur.storage.container import read_header, torch_form
from secateur.storage.contents import Contents, info, notes
from secateur.storage.reading import SUFFIX, is_packed, read_packed
from secateur.storage.stored import Alias, InFile, Stored, stored_of
from secateur.storage.torch_files import SUFFIXES, read_states
from secateur.support import checks
from secateur.support.files import StrPath, require_file

INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its tensors in their order, and the metadata that its writer gave it.

    Attributes:
        sha256: of the state, if it is packed.
    """

    file: Path
    tensors: tuple[Stored, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    sha256: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A file, or an index and the files that it names.

    Attributes:
        path: as it was given: a file, an index or a folder.
        tensors: all of them by name, in the order of the file (of its bytes) or of the index.
        notes: what else one should know: what was taken of it, and what was left.
    """

    path: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, Stored]
    index: Path | None = None
    notes: tuple[str, ...] = ()


def inspect(path: StrPath | Checkpoint) -> Contents:
    """Count the zeros of every tensor of a checkpoint; of one that is packed, say how and how small.

    Args:
        path: what `opened` reads.

    Raises:
        InputError: as `opened`.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": torch.eye(4)}, f"{folder}/m.safetensors")
    ...     found = inspect(f"{folder}/m.safetensors")
    >>> found.total.weights, found.total.zeros, found.total.sparsity
    (16, 12, 0.75)
    """
    checkpoint = opened(path)
    for tensor in checkpoint.tensors.values():
        tensor.check()
    tensors = tuple(info(tensor, tensor.zeros()) for tensor in checkpoint.tensors.values())
    file_bytes = sum(shard.file.stat().st_size for shard in checkpoint.shards)
    return Contents(str(checkpoint.path), tensors, file_bytes, checkpoint.notes)


def iter_tensors(path: StrPath | Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and tensor (on the CPU) of everything a checkpoint holds, one in memory at a time.

    Args:
        path: what `opened` reads.

    Raises:
        InputError: as `opened`.
    """
    checkpoint = opened(path)
    return ((tensor.name, tensor.tensor()) for shard in checkpoint.shards for tensor in shard.tensors)


def opened(path: StrPath | Checkpoint, key: str | None = None) -> Checkpoint:
    """Find the tensors of a checkpoint; no weights are read. One that is open already is returned.

    Args:
        path: a `.safetensors` file, packed or not; a sharded checkpoint (`*.safetensors.index.json`), or a folder that
            holds one or a single `.safetensors` file; or a file of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`), read
            with `weights_only=True`. Of nested dictionaries the one under `state_dict`, `model_state_dict`, `model`,
            `module` or `params` is entered; if there is none, all but the optimizer's, their names joined by dots.
        key: of a file of `torch.save` that holds several states, the one to take: "ema", or "states.ema" for one
            within another.

    Raises:
        InputError: the file is missing, damaged, of another kind, needs pickled code, or holds no tensor; or there is
            no such state. UnknownNameError: there is no such key.
    """
    if isinstance(path, Checkpoint):
        return path
    given = path = checks.path("the path of a checkpoint", path)
    if key is not None and not isinstance(key, str):
        raise checks.wrong("key", key, "the name of a state in the file, such as 'ema'")
    if not path.exists():
        there = [p.name for p in path.parent.glob("*")]
        raise InputError(f"{path}: no such file; in that folder {nearest(path.name, there)}")
    if path.is_dir():
        path = _main_file(path)
    require_file(path)
    if key is not None and path.suffix not in SUFFIXES:
        raise InputError(f"{path} holds one state, not several to choose from: leave out the key {key!r}")
    if path.name.endswith(INDEX):
        shards, order, said = _sharded(path)
    elif path.suffix == ".safetensors":
        shards, said = (_shard(path),), ()
        order = [tensor.name for tensor in shards[0].tensors]
    elif path.suffix in SUFFIXES:
        state, said = read_states(path, key)
        shards, order = (Shard(path, _stored(path, state), {"format": "pt"}),), list(state)
    else:
        raise InputError(f"{path}: unknown suffix {path.suffix!r}: give .safetensors, *{INDEX}, {', '.join(SUFFIXES)}")
    if not order:
        raise InputError(f"{path} holds no tensor: give a file that holds a state_dict")
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    index = path if path.name.endswith(INDEX) else None
    return Checkpoint(given, shards, {name: tensors[name] for name in order}, index, (*notes(order), *said))


def _stored(file: Path, state: Mapping[str, Tensor]) -> tuple[Stored, ...]:
    try:
        return tuple(stored_of(state))
    except (InputError, InputTypeError) as error:
        raise type(error)(f"{file}: {error}") from error


def _main_file(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{INDEX}"))
    if len(found) > 1:
        raise InputError(f"{folder} holds {len(found)} indexes ({', '.join(p.name for p in found)}): give one of them")
    alone = sorted(folder.glob("*.safetensors"))
    if found or len(alone) == 1:
        return (found or alone)[0]
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", *SUFFIXES))
    raise InputError(f"{folder} is a folder without an index (*{INDEX}): give a file; {nearest('', files)}")


def _sharded(index: Path) -> tuple[tuple[Shard, ...], list[str], tuple[str, ...]]:
    """Every shard is there, and has the tensors that the index gives it; the names in the order of the index."""
    try:
        read = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_once)
        pairs = [(str(name), Path(shard)) for name, shard in read["weight_map"].items()]
    except _TwiceError as error:
        raise InputError(f"{index} names {error} twice: leave one of them out") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f'{index} is no index of shards: its JSON must hold {{"weight_map": {{name: file}}}}'
        ) from error
    names: dict[Path, list[str]] = {}
    for name, place in pairs:
        if place.is_absolute() or ".." in place.parts or not (index.parent / place).is_file():
            raise InputError(f"{index} names {place} (for {name}), which is not beside it: copy it there")
        names.setdefault(index.parent / place, []).append(name)
    shards, unnamed = [], list[str]()
    for file, wanted in names.items():
        shard = _shard(file)
        there = {tensor.name for tensor in shard.tensors}
        if lost := set(wanted) - there:
            raise InputError(f"{file} lacks {min(lost)}, which {index.name} promises: copy both from one save")
        shards.append(_part(shard, wanted))
        unnamed += sorted(there - set(wanted))
    said = (f"left {listed(unnamed)}, which the index does not name",)
    return tuple(shards), [name for name, _ in pairs], said if unnamed else ()


class _TwiceError(Exception):
    """A key that JSON has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return dict(pairs)


def _part(shard: Shard, wanted: Sequence[str]) -> Shard:
    """Those tensors of a shard that an index names; one that is tied to a tensor left out takes its place."""
    there = {tensor.name: tensor for tensor in shard.tensors}
    firsts: dict[str, Stored] = {}
    tensors: list[Stored] = []
    for name in wanted:
        tensor = there[name]
        if isinstance(tensor, Alias) and tensor.of.name not in wanted:
            first = firsts.get(tensor.of.name)
            if first is None:
                first = firsts[tensor.of.name] = copy(tensor.of)
                first.name = name
            tensor = first if first.name == name else Alias(name, first)
        tensors.append(tensor)
    whole = all(name in wanted for name, tensor in there.items() if not isinstance(tensor, Alias))
    return replace(shard, tensors=tuple(tensors), sha256=shard.sha256 if whole else None)


def _shard(file: Path) -> Shard:
    header = read_header(file)
    if is_packed(header):
        packed, metadata, sha256 = read_packed(header)
        return Shard(file, tuple(packed), metadata, sha256)
    tensors = []
    for slot in header.slots.values():
        form = torch_form(slot)
        if slot.name.endswith(SUFFIX):
            raise FileError(
                f"{file}: {slot.name} is packed already: read it with secateur.load, then save what that gives "
                "(if this is the packed file, its manifest is damaged: copy or download it again)"
            )
        if form is None:
            what = f"{slot.code} {list(slot.shape)}"
            raise InputError(f"{file}: {slot.name} is {what}, which torch cannot hold: leave it out of the file")
        tensors.append(InFile(slot.name, form[0], torch.Size(form[1]), file, slot.start))
    return Shard(file, tuple(tensors), header.metadata)
