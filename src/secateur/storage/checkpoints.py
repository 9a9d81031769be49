"""Checkpoints: what a file or a folder holds, tensor by tensor. No pickled code is ever run."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import FileError, InputError, nearest
from secateur.storage.container import damaged, read_header, torch_form
from secateur.storage.contents import Contents, info, notes
from secateur.storage.reading import SUFFIX, is_packed, read_packed
from secateur.storage.stored import Alias, InFile, Stored, stored_of
from secateur.support.files import StrPath

INDEX = ".safetensors.index.json"
TORCH = ".pt", ".pth", ".bin"
_ENVELOPES = "state_dict", "model_state_dict", "model", "module", "params"
_DEEPEST = 8  # dictionaries within dictionaries; more is no checkpoint


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
        tensors: all of them by name, in the order of the file (of its bytes) or of the index.
    """

    shards: tuple[Shard, ...]
    tensors: dict[str, Stored]
    index: Path | None = None


def inspect(path: StrPath) -> Contents:
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
    return Contents(str(path), tensors, file_bytes, notes(list(checkpoint.tensors)))


def iter_tensors(path: StrPath) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and tensor (on the CPU) of everything a checkpoint holds, one in memory at a time.

    Args:
        path: what `opened` reads.

    Raises:
        InputError: as `opened`.
    """
    checkpoint = opened(path)
    return ((tensor.name, tensor.tensor()) for shard in checkpoint.shards for tensor in shard.tensors)


def opened(path: StrPath) -> Checkpoint:
    """Find the tensors of a checkpoint; no weights are read.

    Args:
        path: a `.safetensors` file, packed or not; a sharded checkpoint (`*.safetensors.index.json`), or a folder that
            holds one or a single `.safetensors` file; or a file of `torch.save` (`.pt`, `.pth`, `.bin`), read with
            `weights_only=True`. Of nested dictionaries the one under `state_dict`, `model_state_dict`, `model`,
            `module` or `params` is entered; if there is none, all but the optimizer's, their names joined by dots.

    Raises:
        InputError: the file is missing, damaged, of another kind, needs pickled code, or holds no tensor.
    """
    path = Path(path)
    if not path.exists():
        there = [p.name for p in path.parent.glob("*")]
        raise InputError(f"{path}: no such file; in that folder {nearest(path.name, there)}")
    if path.is_dir():
        path = _main_file(path)
    if path.name.endswith(INDEX):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return _of_one(_shard(path))
    if path.suffix in TORCH:
        return _of_one(Shard(path, tuple(stored_of(_read_torch(path))), {"format": "pt"}))
    raise InputError(f"{path}: unknown suffix {path.suffix!r}: give .safetensors, *{INDEX}, .pt, .pth or .bin")


def _main_file(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{INDEX}"))
    if len(found) > 1:
        raise InputError(f"{folder} holds {len(found)} indexes ({', '.join(p.name for p in found)}): give one of them")
    alone = sorted(folder.glob("*.safetensors"))
    if found or len(alone) == 1:
        return (found or alone)[0]
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", *TORCH))
    raise InputError(f"{folder} is a folder without an index (*{INDEX}): give a file; {nearest('', files)}")


def _sharded(index: Path) -> Checkpoint:
    """Every shard is there, and has the tensors that the index gives it, in the order of the index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), Path(shard)) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{index} is no index of shards: its JSON must hold {{"weight_map": {{name: file}}}}'
        ) from error
    names: dict[Path, list[str]] = {}
    for name, place in pairs:
        if place.is_absolute() or ".." in place.parts or not (index.parent / place).is_file():
            raise InputError(f"{index} names {place} (for {name}), which is not beside it: copy it there")
        names.setdefault(index.parent / place, []).append(name)
    shards = []
    for file, wanted in names.items():
        shard = _shard(file)
        there = {tensor.name for tensor in shard.tensors}
        if lost := set(wanted) - there:
            raise InputError(f"{file} lacks {min(lost)}, which {index.name} promises: copy both from one save")
        shards.append(_part(shard, wanted))
    if not shards:
        raise InputError(_empty(index))
    every = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    return Checkpoint(tuple(shards), {name: every[name] for name, _ in pairs}, index)


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


def _of_one(shard: Shard) -> Checkpoint:
    if not shard.tensors:
        raise InputError(_empty(shard.file))
    return Checkpoint((shard,), {tensor.name: tensor for tensor in shard.tensors})


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a TorchScript archive is refused below, in our own words
            # files of torch < 1.6 are no zip archives, and cannot be mapped
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # the unpickler of damaged bytes raises whatever it stumbles over
        code = re.search(r"GLOBAL ([\w.]+)|TorchScript", str(error))
        if not code:
            raise FileError(damaged(file, str(error) or type(error).__name__)) from error
        raise InputError(
            f"{file} needs pickled code ({code[1] or code[0]}), and secateur runs none: if you trust it, "
            "load it in its own program and torch.save(model.state_dict(), ...)"
        ) from error
    tensors = _tensors_in(saved)
    if not tensors:
        raise InputError(_empty(file))
    return tensors


def _tensors_in(saved: Any, depth: int = 0) -> dict[str, Tensor]:
    if isinstance(saved, Tensor):
        return {"tensor": saved}
    if not isinstance(saved, Mapping) or depth > _DEEPEST:
        return {}
    for envelope in _ENVELOPES:
        if isinstance(saved.get(envelope), Mapping) and (inside := _tensors_in(saved[envelope], depth + 1)):
            return inside
    found: dict[str, Tensor] = {}
    for key, value in saved.items():
        if isinstance(value, Tensor):
            found[str(key)] = value
        elif isinstance(value, Mapping) and "optim" not in str(key):
            found.update((f"{key}.{name}", tensor) for name, tensor in _tensors_in(value, depth + 1).items())
    return found


def _empty(file: Path) -> str:
    return f"{file} holds no tensor: give a file that holds a state_dict"
