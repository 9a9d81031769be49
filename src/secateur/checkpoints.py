"""Weights in files: read them one by one, and count what is zero. No pickled code is ever run."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur import bits
from secateur.errors import InputError, nearest
from secateur.tables import Table, number, percent, size

StrPath = str | os.PathLike[str]

_INDEX = ".safetensors.index.json"
_TORCH = ".pt", ".pth", ".bin"
_ENVELOPES = "state_dict", "model_state_dict", "model", "module", "params"
_DEEPEST = 8  # dictionaries within dictionaries; more is no checkpoint


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `weights` elements of which `zeros` are zero, `bytes` in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 0.0 for an empty tensor."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; prints as a table."""

    path: str
    tensors: tuple[TensorInfo, ...]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> TensorInfo:
        """All tensors together; one that is stored under two names counts twice."""
        sums = [sum(getattr(t, key) for t in self.tensors) for key in ("weights", "zeros", "bytes")]
        return TensorInfo(f"total ({len(self.tensors)} tensors)", "", (), *sums)

    def table(self) -> Table:
        """One row a tensor, then the total."""
        header = ("tensor", "dtype", "shape", "weights", "zeros", "sparsity", "size")
        return Table(header, [_row(info) for info in (*self.tensors, self.total)], self.path, self.notes)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON: path, tensors, total, notes."""
        tensors = [{**asdict(t), "shape": list(t.shape), "sparsity": t.sparsity} for t in self.tensors]
        total = {key: getattr(self.total, key) for key in ("weights", "zeros", "sparsity", "bytes")}
        return {"path": self.path, "tensors": tensors, "total": total, "notes": list(self.notes)}

    def markdown(self) -> str:
        """The table as Markdown."""
        return self.table().markdown()

    def __str__(self) -> str:
        return self.table().text()


def inspect(path: StrPath) -> Inspection:
    """Count the zeros of every tensor of a checkpoint, one tensor in memory at a time.

    Args:
        path: what `iter_tensors` reads.

    Raises:
        InputError: as `iter_tensors`.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": torch.eye(4)}, f"{folder}/m.safetensors")
    ...     found = inspect(f"{folder}/m.safetensors")
    >>> found.total.weights, found.total.zeros, found.total.sparsity
    (16, 12, 0.75)
    """
    infos = tuple(_info(name, tensor) for name, tensor in iter_tensors(path))
    return Inspection(os.fspath(path), infos, _notes({info.name for info in infos}))


def iter_tensors(path: StrPath) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and tensor (on the CPU) of everything a checkpoint holds.

    Args:
        path: a `.safetensors` file; a sharded checkpoint (`*.safetensors.index.json`, or its folder); or a
            file of `torch.save` (`.pt`, `.pth`, `.bin`), read with `weights_only=True`. Of nested
            dictionaries the one under `state_dict`, `model_state_dict`, `model`, `module` or `params` is
            entered; if there is none, all but the optimizer's, their names joined by dots.

    Raises:
        InputError: the file is missing, damaged, of another kind, needs pickled code, or holds no tensor.
    """
    path = Path(path)
    if not path.exists():
        there = [p.name for p in path.parent.glob("*")]
        raise InputError(f"{path}: no such file; in that folder {nearest(path.name, there)}")
    if path.is_dir():
        path = _index_in(path)
    if path.name.endswith(_INDEX):
        return _read_safetensors(_shards(path))
    if path.suffix == ".safetensors":
        return _read_safetensors({path: _names(path)})
    if path.suffix in _TORCH:
        return iter(_read_torch(path).items())
    raise InputError(f"{path}: unknown suffix {path.suffix!r}: give .safetensors, *{_INDEX}, .pt, .pth or .bin")


def _index_in(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{_INDEX}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{folder} holds {len(found)} indexes ({', '.join(p.name for p in found)}): give one of them")
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", *_TORCH))
    raise InputError(f"{folder} is a folder without an index (*{_INDEX}): give a file; {nearest('', files)}")


def _shards(index: Path) -> dict[Path, list[str]]:
    """The names to read from each shard, in the order of the index; every shard is there."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), Path(shard)) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{index} is no index of shards: its JSON must hold {{"weight_map": {{name: file}}}}'
        ) from error
    shards: dict[Path, list[str]] = {}
    for name, shard in pairs:
        if shard.is_absolute() or ".." in shard.parts or not (index.parent / shard).is_file():
            raise InputError(f"{index} names {shard} (for {name}), which is not beside it: copy it there")
        shards.setdefault(index.parent / shard, []).append(name)
    for file, wanted in shards.items():
        if lost := set(wanted) - set(_names(file)):
            raise InputError(f"{file} lacks {min(lost)}, which {index.name} promises: copy both from one save")
    if not shards:
        raise InputError(_empty(index))
    return shards


def _names(file: Path) -> list[str]:
    with _opened(file) as opened:
        names = list(opened.keys())
    if not names:
        raise InputError(_empty(file))
    return names


def _read_safetensors(files: Mapping[Path, list[str]]) -> Iterator[tuple[str, Tensor]]:
    for file, names in files.items():
        with _opened(file) as opened:
            for name in names:
                yield name, opened.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise InputError(_damaged(file, error)) from error


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
            raise InputError(_damaged(file, error)) from error
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


def _info(name: str, tensor: Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    weights = tensor.numel() * (2 if tensor.dtype is torch.float4_e2m1fn_x2 else 1)
    return TensorInfo(
        name,
        dtype,
        tuple(tensor.shape),
        weights,
        _zeros(tensor.detach()),
        tensor.numel() * tensor.element_size(),
    )


def _zeros(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:  # what a sparse tensor does not store is zero
        stored = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
        return tensor.numel() - stored.numel() + _zeros(stored)
    if tensor.dtype is torch.float8_e8m0fnu:  # powers of two only
        return 0
    if tensor.dtype is torch.float4_e2m1fn_x2:  # two a byte, a sign and three bits each
        pairs = tensor.view(torch.uint8)
        return _zeros(pairs & 0x07) + _zeros(pairs & 0x70)
    return sum(int(torch.count_nonzero(piece == 0)) for _, piece in bits.chunks(tensor))


def _notes(names: set[str]) -> tuple[str, ...]:
    pruned = [n for n in names if n.endswith("_orig") and n.removesuffix("_orig") + "_mask" in names]
    note = (
        f"{len(pruned)} tensors (_orig, _mask) are pruned with torch.nn.utils.prune: to make them plain, use "
        "secateur.from_torch_prune(model) or secateur.legacy.plain_state_dict(state_dict)"
    )
    return (note,) if pruned else ()


def _row(info: TensorInfo) -> tuple[str, ...]:
    shape = " x ".join(map(str, info.shape))
    counts = number(info.weights), number(info.zeros), percent(info.sparsity), size(info.bytes)
    return (info.name, info.dtype, shape, *counts)


def _empty(file: Path) -> str:
    return f"{file} holds no tensor: give a file that holds a state_dict"


def _damaged(file: Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return f"{file} is damaged or cut short, or is not of its suffix ({reason}): copy or download it again"
