"""Checkpoints from one form to another: `pack`, `unpack`, and the rewriting of files and folders behind them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import InputError
from secateur.storage.archive import packed_name, refuse_names
from secateur.storage.checkpoints import INDEX, Checkpoint, Shard, opened
from secateur.storage.coding import effort_of, level_of
from secateur.storage.container import Slot, Writer, file_form, room_for
from secateur.storage.contents import Contents, TensorInfo, info
from secateur.storage.dtypes import name_of, words_of
from secateur.storage.sharing import mine, shared_folder
from secateur.storage.state_hash import StateHash
from secateur.storage.stored import Stored
from secateur.storage.torch_files import SUFFIXES
from secateur.storage.writing import Progress, write_packed
from secateur.support import bits, checks
from secateur.support.files import StrPath, narrow, replacing, require_covered, require_place
from secateur.support.process_groups import ALONE, Processes, shared
from secateur.support.progress import progress_bar

_ENDING, _PACKED_ENDING = ".safetensors", ".packed.safetensors"

Write = Callable[[Path, Shard], Sequence[TensorInfo]]
"""Writes one shard to a path, and says what it wrote."""


def pack(
    src: StrPath | Checkpoint,
    dst: StrPath,
    *,
    level: str = "lossless",
    step: float | None = None,
    effort: str = "normal",
    progress: Progress | bool | None = None,
) -> Contents:
    """Pack a checkpoint, tensor by tensor, whatever its size.

    In a folder each `NAME.safetensors` becomes `NAME.packed.safetensors`, its index likewise, so that a program that
    looks for the plain file does not find it; other files are copied.

    Args:
        src: a file, or a folder of shards with their index, as `secateur inspect` reads.
        dst: a `.safetensors` file, or a folder if `src` is one.
        level, step, effort: as for `save`.
        progress: True draws a bar on stderr; a function is called with the bytes of tensors done since the last call.

    Raises:
        InputError: an unknown level or effort, or a source that cannot be read.
        WriteError: the system refuses to write.
    """
    chosen, coder = level_of(level, step), effort_of(effort)
    checkpoint = opened(src)

    with watching(progress, "packing", checkpoint) as watch:

        def write(path: Path, shard: Shard) -> Sequence[TensorInfo]:
            return write_packed(
                path, shard.tensors, level=chosen, effort=coder, metadata=shard.metadata, progress=watch
            )

        return rewrite(checkpoint, dst, packed_file_name, write)


def unpack(src: StrPath | Checkpoint, dst: StrPath, *, progress: Progress | bool | None = None) -> Contents:
    """Turn a packed checkpoint into plain `.safetensors` files, and see that they hold what was saved.

    Args:
        src: a packed file, or a folder of them; plain ones among them are copied.
        dst: a `.safetensors` file, or a folder if `src` is one. Tied tensors are written under each name.
        progress: True draws a bar on stderr; a function is called with the bytes of tensors done since the last call.

    Raises:
        FileError: the source is damaged, or does not decode to what was saved. WriteError: the system refuses to write.
    """
    checkpoint = opened(src)

    with watching(progress, "unpacking", checkpoint) as watch:

        def write(path: Path, shard: Shard) -> Sequence[TensorInfo]:
            write_plain(path, shard, watch)
            return [info(t, t.zeros(), coding="plain", stored_bytes=t.nbytes) for t in shard.tensors]

        return rewrite(checkpoint, dst, plain_file_name, write)


@contextmanager
def watching(progress: Progress | bool | None, what: str, checkpoint: Checkpoint) -> Iterator[Progress | None]:
    """Yield what is to be called with the bytes done: a bar's, if `progress` is True, or the function it is."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise checks.wrong("progress", progress, "True, or a function of the bytes done")
    if progress is True:
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        with progress_bar(what, total, shown=True, in_bytes=True) as advance:
            yield advance
    else:
        yield progress or None


def packed_file_name(name: str) -> str:
    """Return the name of the packed form of a file: "model.packed.safetensors"."""
    return plain_file_name(name).replace(_ENDING, _PACKED_ENDING, 1)


def plain_file_name(name: str) -> str:
    """Return the name of the plain form of a file: "model.safetensors"."""
    return name.replace(_PACKED_ENDING, _ENDING, 1)


def write_plain(path: Path, shard: Shard, progress: Progress | None = None) -> None:
    """Write a plain `.safetensors` file of the tensors of a shard, piece by piece.

    Raises:
        InputError: a dtype that such a file cannot hold. FileError: a packed shard that does not decode to what was
            saved: what was written is to be thrown away.
    """
    # as safetensors itself does: so each tensor starts at a multiple of its element's size
    tensors = sorted(shard.tensors, key=lambda tensor: -tensor.dtype.itemsize)
    slots, end = [], 0
    for tensor in tensors:
        slots.append(_slot(tensor, end))
        end = slots[-1].stop
    with open(path, "wb") as file:
        writer = Writer(file, room_for(slots, shard.metadata))
        state = None if shard.sha256 is None else StateHash()
        for tensor, slot in zip(tensors, slots, strict=True):
            start = writer.position
            for piece in tensor.pieces(bits.CHUNK) if state is None else state.passing(tensor, bits.CHUNK):
                file.write(words_of(piece).data)
                if progress:
                    progress(piece.nbytes)
            writer.close(slot.name, slot.code, slot.shape, start)
        if state is not None:
            state.require(shard.sha256, shard.file)
        writer.finish(shard.metadata)


def _slot(tensor: Stored, start: int) -> Slot:
    code, shape = file_form(tensor.dtype, tensor.shape)
    if code is None:
        raise InputError(
            f"{tensor.name} is {name_of(tensor.dtype)}, which a plain .safetensors file cannot hold: read it with "
            "secateur.load"
        )
    return Slot(tensor.name, code, shape, start, start + tensor.nbytes)


@dataclass(frozen=True)
class _Target:
    """Where a checkpoint goes.

    Attributes:
        path: of the file, or of the folder.
        folder: the source's, if a folder is written.
        beside: files in it that go with the weights, relative to it.
        left_out: what does not, in words.
    """

    path: Path
    folder: Path | None = None
    beside: Sequence[Path] = ()
    left_out: Sequence[str] = ()


def target_of(checkpoint: Checkpoint, dst: StrPath, rename: Callable[[str], str]) -> _Target:
    """See that `rewrite` can write to `dst`; nothing is written yet.

    Raises:
        InputTypeError: `dst` is no path.
        InputError: `dst` is the source, or lies in it, or is a file where a folder is needed; a name that no file can
            hold; weights that lie outside the folder. WriteError: there is no folder to write into, or files would have
            to be removed of which there is no new version.
    """
    source, target, first = checkpoint.path, checks.path("dst", dst), checkpoint.shards[0]
    try:
        refuse_names(checkpoint.tensors)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    folder = first.file.parent if checkpoint.index is None else checkpoint.index.parent
    if checkpoint.index is not None or source.is_dir():
        for shard in checkpoint.shards:
            if not _inside(shard.file, folder):
                raise InputError(f"{shard.file} leads out of its folder: copy the file there in place of the link")
    if checkpoint.index is None and not (source.is_dir() and target.suffix != _ENDING):
        target = packed_name(target)
        refuse_same(first.file, target)
        require_place(target)
        return _Target(target)
    if target.suffix == _ENDING and not target.is_file():  # what is one is refused below
        raise InputError(f"{target}: the source is a folder of several files, so give the name of a folder")
    refuse_same(folder, target)
    beside, left_out = _beside(folder, checkpoint)
    sources = [*(shard.file for shard in checkpoint.shards), *filter(None, [checkpoint.index])]
    made: dict[Path, Path] = {}
    for path in (file.relative_to(folder) for file in sources):
        other = made.setdefault(path.with_name(rename(path.name)), path)
        if other != path:
            raise InputError(f"{folder}: {other} and {path} would both become {rename(path.name)}: rename one of them")
    require_place(target)
    require_covered(target, [*beside, *made])
    return _Target(target, folder, beside, left_out)


def rewrite(
    checkpoint: Checkpoint,
    dst: StrPath,
    rename: Callable[[str], str],
    write: Write,
    processes: Processes = ALONE,
) -> Contents:
    """Write each shard of a checkpoint anew: a file to a file, a folder to a folder with all that lies beside.

    Of several processes each writes its own shards, as `mine` says, and the first one the rest. What is written appears
    under its name when it is whole. Files that a folder only links to, outside of it, are not copied.

    Raises:
        InputError, InputTypeError, WriteError: as `target_of`; the system refuses to write.
    """
    found = target_of(checkpoint, dst, rename)
    target, folder = found.path, found.folder
    if folder is None:
        written: Sequence[TensorInfo] = ()
        with shared(replacing(target, like=checkpoint.shards[0].file), processes) as temporary:
            if processes.rank == 0:
                written = write(temporary, checkpoint.shards[0])
        return _contents(checkpoint, dst, written, target.stat().st_size)
    infos: dict[str, TensorInfo] = {}
    with shared_folder(target, processes) as temporary:
        for shard in mine(checkpoint, processes):
            place = shard.file.relative_to(folder)
            path = temporary / place.with_name(rename(place.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            infos |= {done.name: done for done in write(path, shard)}
            narrow(path, shard.file)
        if processes.rank == 0:
            for path in found.beside:
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(folder / path, temporary / path)
            if checkpoint.index is not None:
                _write_index(checkpoint.index, temporary, rename)
            narrow(temporary, folder)
    size = sum(p.stat().st_size for p in target.rglob("*.safetensors"))
    tensors = [infos[name] for name in checkpoint.tensors if name in infos]
    return _contents(checkpoint, dst, tensors, size, found.left_out)


def _contents(
    checkpoint: Checkpoint, dst: StrPath, tensors: Sequence[TensorInfo], size: int, left_out: Sequence[str] = ()
) -> Contents:
    said = (*checkpoint.notes, *left_out)
    return Contents(str(dst), tuple(tensors), size, said, sum(t.nbytes for t in checkpoint.tensors.values()))


def refuse_same(source: Path, target: Path) -> None:
    """See that a target is not a source, by whatever name, and does not lie in it.

    Raises:
        InputError: it is, or does.
    """
    source, resolved = Path(os.path.realpath(source)), Path(os.path.realpath(target))  # resolve() stumbles over loops
    if resolved == source or (source.is_dir() and source in resolved.parents):
        raise InputError(f"{target} is the source, or lies in it, and the source is never touched: give another place")


def _beside(folder: Path, checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """What lies beside the weights and is copied (configuration, tokenizer), and what is not, in words."""
    done = {shard.file for shard in checkpoint.shards} | {checkpoint.index}
    copied: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path in done or any(part.startswith(".") for part in place.parts):
            continue
        if path.is_dir() and not path.is_symlink():
            continue
        if path.suffix in (*SUFFIXES, _ENDING) or path.name.endswith(INDEX):
            left_out.setdefault("other weights", []).append(str(place))
        elif not path.is_file():
            left_out.setdefault("not ordinary files", []).append(str(place))
        elif not _inside(path, folder):
            left_out.setdefault("links that lead out of the folder", []).append(str(place))
        else:
            copied.append(place)
    return copied, [f"left out: {', '.join(names)} ({why})" for why, names in left_out.items()]


def _inside(path: Path, folder: Path) -> bool:
    """Tell whether a file lies in a folder; those that a snapshot of the Hugging Face cache links to count as in it."""
    real, folder = path.resolve(), folder.resolve()
    cached = folder.parent.name == "snapshots" and folder.parent.parent / "blobs" in real.parents
    return cached or folder in real.parents


def _write_index(index: Path, temporary: Path, rename: Callable[[str], str]) -> None:
    written: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    weight_map: Mapping[str, str] = written["weight_map"]
    written["weight_map"] = {
        name: str(Path(file).with_name(rename(Path(file).name))) for name, file in weight_map.items()
    }
    path = temporary / rename(index.name)
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    narrow(path, index)
