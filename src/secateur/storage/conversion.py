"""Checkpoints from one form to another: `pack`, `unpack`, and the rewriting of files and folders behind them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import InputError
from secateur.storage.archive import packed_name, refuse_names
from secateur.storage.checkpoints import INDEX, TORCH, Checkpoint, Shard, opened
from secateur.storage.coding import effort_of, level_of
from secateur.storage.container import Slot, Writer, file_form, room_for
from secateur.storage.contents import Contents, TensorInfo, info, notes
from secateur.storage.dtypes import name_of, words_of
from secateur.storage.state_hash import StateHash
from secateur.storage.stored import Stored
from secateur.storage.writing import Progress, write_packed
from secateur.support import bits
from secateur.support.files import StrPath, replacing, replacing_folder, require_covered
from secateur.support.process_groups import ALONE, Processes

_ENDING, _PACKED_ENDING = ".safetensors", ".packed.safetensors"

Write = Callable[[Path, Shard], Sequence[TensorInfo]]
"""Writes one shard to a path, and says what it wrote."""


def pack(
    src: StrPath,
    dst: StrPath,
    *,
    level: str = "lossless",
    step: float | None = None,
    effort: str = "normal",
    progress: Progress | None = None,
) -> Contents:
    """Pack a checkpoint, tensor by tensor, whatever its size.

    In a folder each `NAME.safetensors` becomes `NAME.packed.safetensors`, its index likewise, so that who looks for the
    plain file does not find it; other files are copied.

    Args:
        src: a file, or a folder of shards with their index, as `secateur inspect` reads.
        dst: a `.safetensors` file, or a folder if `src` is one.
        level, step, effort: as for `save`.
        progress: called with the bytes of tensors done since the last call.

    Raises:
        InputError: an unknown level or effort, or a source that cannot be read.
        WriteError: the system refuses to write.
    """
    chosen, coder = level_of(level, step), effort_of(effort)
    checkpoint = opened(src)
    refuse_names(checkpoint.tensors)

    def write(path: Path, shard: Shard) -> Sequence[TensorInfo]:
        return write_packed(path, shard.tensors, level=chosen, effort=coder, metadata=shard.metadata, progress=progress)

    return rewrite(checkpoint, src, dst, packed_file_name, write)


def unpack(src: StrPath, dst: StrPath, *, progress: Progress | None = None) -> Contents:
    """Turn a packed checkpoint into plain `.safetensors` files, and see that they hold what was saved.

    Args:
        src: a packed file, or a folder of them; plain ones among them are copied.
        dst: a `.safetensors` file, or a folder if `src` is one. Tied tensors are written under each name.
        progress: called with the bytes of tensors done since the last call.

    Raises:
        FileError: the source is damaged, or does not decode to what was saved. WriteError: the system refuses to write.
    """
    checkpoint = opened(src)

    def write(path: Path, shard: Shard) -> Sequence[TensorInfo]:
        write_plain(path, shard, progress)
        return [info(tensor, tensor.zeros(), coding="plain", stored_bytes=tensor.nbytes) for tensor in shard.tensors]

    return rewrite(checkpoint, src, dst, plain_file_name, write)


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
            saved. Nothing was written.
    """
    # as safetensors itself does: so each tensor starts at a multiple of its element's size
    tensors = sorted(shard.tensors, key=lambda tensor: -tensor.dtype.itemsize)
    slots, end = [], 0
    for tensor in tensors:
        slots.append(_slot(tensor, end))
        end = slots[-1].stop
    with replacing(path) as temporary, open(temporary, "wb") as file:
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


def rewrite(
    checkpoint: Checkpoint,
    src: StrPath,
    dst: StrPath,
    rename: Callable[[str], str],
    write: Write,
    processes: Processes = ALONE,
) -> Contents:
    """Write each shard of a checkpoint anew: a file to a file, a folder to a folder with all that lies beside.

    Of several processes each writes its own shards, as `mine` says, and the first one the rest. The folder appears
    under its name when it is whole.

    Raises:
        InputError: `dst` is the source, or lies in it, or is a file where a folder is due. WriteError: the system
            refuses to write, or would have to remove files of which there is no new version.
    """
    source, target = Path(src), Path(dst)
    said = notes(list(checkpoint.tensors))
    if checkpoint.index is None and not (source.is_dir() and target.suffix != _ENDING):
        target = packed_name(target)
        _refuse_same(checkpoint.shards[0].file, target)
        written = list(write(target, checkpoint.shards[0])) if processes.rank == 0 else []
        _wait(processes)
        return Contents(str(dst), tuple(written), target.stat().st_size, said)
    if target.suffix == _ENDING and not target.is_file():  # what is one is refused below
        raise InputError(f"{target}: the source is a folder of several files, so give the name of a folder")
    folder = checkpoint.shards[0].file.parent if checkpoint.index is None else checkpoint.index.parent
    _refuse_same(folder, target)
    beside, left_out = _beside(folder, checkpoint)
    said += (f"left out: {', '.join(map(str, left_out))} (other weights)",) if left_out else ()
    made = [shard.file for shard in checkpoint.shards] + [checkpoint.index or checkpoint.shards[0].file]
    made = [path.relative_to(folder).with_name(rename(path.name)) for path in made]
    require_covered(target, [*beside, *made])
    infos: dict[str, TensorInfo] = {}
    with _shared_folder(target, processes) as temporary:
        for shard in mine(checkpoint, processes):
            place = shard.file.relative_to(folder)
            path = temporary / place.with_name(rename(place.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            infos |= {done.name: done for done in write(path, shard)}
        if processes.rank == 0:
            for path in beside:
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(folder / path, temporary / path)
            if checkpoint.index is not None:
                _write_index(checkpoint.index, temporary, rename)
    size = sum(p.stat().st_size for p in target.rglob("*.safetensors"))
    return Contents(str(dst), tuple(infos[name] for name in checkpoint.tensors if name in infos), size, said)


def mine(checkpoint: Checkpoint, processes: Processes) -> list[Shard]:
    """Return the shards that this process reads and writes: the largest first, each to whom has least so far."""
    load = [0] * processes.size
    own = []
    for shard in sorted(checkpoint.shards, key=lambda shard: -sum(t.nbytes for t in shard.tensors)):
        least = load.index(min(load))
        load[least] += sum(tensor.nbytes for tensor in shard.tensors)
        if least == processes.rank:
            own.append(shard)
    return own


def _wait(processes: Processes) -> None:
    processes.total(np.zeros(1))


@contextmanager
def _shared_folder(target: Path, processes: Processes) -> Iterator[Path]:
    """As `replacing_folder`, for all processes together: the first one makes the folder, and gives it its name."""
    if processes.rank == 0:
        with replacing_folder(target) as temporary:
            processes.from_first(str(temporary))
            yield temporary
            _wait(processes)
    else:
        yield Path(processes.from_first(""))
        _wait(processes)
    _wait(processes)


def _refuse_same(source: Path, target: Path) -> None:
    source, resolved = source.resolve(), target.resolve()
    if resolved == source or (source.is_dir() and source in resolved.parents):
        raise InputError(f"{target} is the source, or lies in it, and the source is never touched: give another place")


def _beside(folder: Path, checkpoint: Checkpoint) -> tuple[list[Path], list[Path]]:
    """What lies beside the weights and is copied (configuration, tokenizer), and other weights, which are not."""
    done = {shard.file for shard in checkpoint.shards} | {checkpoint.index}
    copied: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path in done or path.is_dir() or any(part.startswith(".") for part in place.parts):
            continue
        weights = path.suffix in (*TORCH, _ENDING) or path.name.endswith(INDEX)
        (left_out if weights else copied).append(place)
    return copied, left_out


def _write_index(index: Path, temporary: Path, rename: Callable[[str], str]) -> None:
    written: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    weight_map: Mapping[str, str] = written["weight_map"]
    written["weight_map"] = {
        name: str(Path(file).with_name(rename(Path(file).name))) for name, file in weight_map.items()
    }
    (temporary / rename(index.name)).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
