"""A model's state in a packed file: `save` it, `load` it back, into a module or as a state_dict."""

from __future__ import annotations

import json
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import sharding
from secateur.calibration.statistics import Statistics
from secateur.errors import InputError, InputTypeError, UnknownNameError, listed, nearest, warn
from secateur.exchange import Exchange, part_of
from secateur.masks import FORMAT
from secateur.scope import unwrap
from secateur.storage.checkpoints import INDEX, Checkpoint, Shard, opened
from secateur.storage.coding import BLOCK, Decoder, Level, effort_of, level_of
from secateur.storage.contents import Contents, TensorInfo, notes
from secateur.storage.dtypes import kind_of
from secateur.storage.reading import SUFFIX
from secateur.storage.rounding import checked, rounded
from secateur.storage.sharing import mine, stored_apart
from secateur.storage.state_hash import StateHash
from secateur.storage.stored import Alias, Stored, stored_of
from secateur.storage.writing import write_packed
from secateur.support import bits, checks
from secateur.support.files import StrPath, refusals, replacing, replacing_folder, require_covered
from secateur.support.machine import free_memory
from secateur.support.process_groups import ALONE, Processes, during, everyone, shared, together
from secateur.support.tables import counted, size


class _Filled(dict[str, Tensor]):
    """The tensors of a module that were filled; says how many rather than all numbers. Pickles as a state_dict does."""

    def __repr__(self) -> str:
        return f"Filled({counted(len(self), 'tensor')}, {size(sum(tensor.nbytes for tensor in self.values()))})"

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())


_INDEX = f"model.packed{INDEX}"
_WORTH_THREADS = 1 << 22  # elements: for fewer, starting threads and passing Python's lock around costs more


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: StrPath,
    *,
    level: str = "lossless",
    step: float | None = None,
    effort: str = "normal",
    max_file_bytes: int | None = None,
    stats: Statistics | None = None,
) -> Contents:
    """Write a model's state to a packed `.safetensors` file, or a folder of them, near the entropy of its weights.

    Every tensor comes back bit for bit, unless a lossy level is asked for. Then zeros stay zero, non-zero weights stay
    non-zero, and numbers that the level cannot hold are stored exactly. Tied tensors are stored once. An old file stays
    as it is until the new one is whole.

    A model of DTensors is saved by all processes of its mesh, which call this alike. They write the bytes that one
    process with the whole model would, each file by one of them, block by block: no tensor is gathered. Of what each
    process has by itself (buffers), the first one's is saved.

    Args:
        model: a module (wrappers are looked through) or a state_dict, on any device.
        path: ends in `.safetensors`; with `max_file_bytes` a folder. Several processes need one file system for that.
        level: "lossless"; "fp16" or "bf16" (float32 and float64 tensors keep that many bits); "near", "small" or
            "tiny": weights, floating-point tensors of two or more dimensions, become whole steps of 1/64, 1/16 or
            1/4 of the root mean square of the non-zero weights.
        step: a step of your own, relative to that root mean square, instead of a level.
        effort: "fast", "normal" or "best": how hard to look for a small file. Reading takes the same time.
        max_file_bytes: begin another file where the tensors of one would take more bytes in memory; a larger tensor
            has a file for itself. The names are those that `pack` gives to the files of transformers.
        stats: of this model, from `sc.calibrate`; the weights that they know become those whole steps that change
            the outputs of the layers least (`storage.rounding`), in as many bytes. Then a non-zero weight may become
            zero. Takes memory for a copy of the weights.

    Returns:
        What was written, tensor by tensor: bytes, ratio to dense, relative L2 error where something was lost.

    Raises:
        InputError: an unknown level or effort, or the wrong suffix; processes that do not call it alike; statistics of
            another model, or with a level that has no step.
        InputTypeError: something that is no plain tensor; statistics without a module. WriteError: the system refuses
            to write; a folder that holds other files; one that not all processes see. Of several processes what one
            raises, all raise.
        GroupError: a process was lost; what was there is intact.

    >>> import tempfile
    >>> model = nn.Linear(256, 256)
    >>> _ = sc.prune(model, 0.9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = save(model, f"{folder}/m.safetensors")
    ...     back = load(f"{folder}/m.safetensors")
    >>> written.ratio < 0.12, torch.equal(back["weight"], model.weight)
    (True, True)
    """
    state = _state_of(model)
    numbers = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

    def make() -> tuple[Level, int, Path, list[Stored]]:
        target = packed_name(path) if max_file_bytes is None else _folder_name(path, max_file_bytes)
        asked, tensors = level_of(level, step), _tensors_of(state)
        if stats is not None:
            tensors = rounded(tensors, checked(model, asked, stats), asked, stats)
        return asked, effort_of(effort), target, tensors

    def tell(made: tuple[Level, int, Path, list[Stored]]) -> dict[str, Any]:
        asked = {"path": os.path.abspath(made[2]), "level": str(made[0]), "effort": effort, "names": list(state)}
        forms = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in state.items()}
        return {**asked, "max_file_bytes": max_file_bytes, "tensors": forms}

    with during("the model was saved"):
        chosen, coder, target, tensors = sharding.alike(numbers, make, tell)
        spread = sharding.spread(state)
        processes: Processes = ALONE if spread is None else spread.grid
        exchange = None
        if spread is not None:
            exchange = Exchange({name: part_of(tensor) for name, tensor in state.items()}, spread)
            tensors = stored_apart(state, tensors, spread, exchange)
        files = _files(tensors, target, max_file_bytes)

        def see() -> None:
            if max_file_bytes is not None and processes.rank == 0:
                require_covered(target, [*(file.file for file in files.shards), Path(_INDEX)])

        together(processes, see)
        place = replacing(target) if max_file_bytes is None else replacing_folder(target)
        with shared(place, processes, seen=max_file_bytes is not None) as temporary:
            write = partial(_written, files, temporary, mine(files, processes), chosen, coder)
            written = write() if exchange is None else exchange.run(write)
            if len(files.shards) > 1 and processes.rank == 0:
                _write_index(files, temporary)
        told = [file for text in everyone(processes, written) for file in json.loads(text)]
    infos = {info["name"]: TensorInfo(**{**info, "shape": tuple(info["shape"])}) for _, found in told for info in found}
    return Contents(str(path), tuple(infos[name] for name in state), sum(size for size, _ in told), notes([*state]))


def _folder_name(path: StrPath, max_file_bytes: int) -> Path:
    target = checks.path("path", path)
    if isinstance(max_file_bytes, bool) or not isinstance(max_file_bytes, int) or max_file_bytes < 1:
        raise InputError(f"max_file_bytes={max_file_bytes!r}: give a whole number of bytes, such as 5_000_000_000")
    if target.suffix == ".safetensors":
        raise InputError(f"{target}: several files go into a folder, so give its name, or leave max_file_bytes out")
    return target


def _files(tensors: Sequence[Stored], target: Path, most: int | None) -> Checkpoint:
    """Which tensors go to which file; a tied one to that of the first."""
    files: list[list[Stored]] = [[]]
    held: dict[str, list[Stored]] = {}
    size = 0
    for tensor in tensors:
        if isinstance(tensor, Alias):
            held[tensor.of.name].append(tensor)
            continue
        if most is not None and files[-1] and size + tensor.nbytes > most:
            files.append([])
            size = 0
        size += tensor.nbytes
        files[-1].append(tensor)
        held[tensor.name] = files[-1]
    count = len(files)
    names = [f"model-{k:05d}-of-{count:05d}.packed.safetensors" for k in range(1, count + 1)]
    if most is None or count == 1:
        names = ["" if most is None else "model.packed.safetensors"]
    shards = tuple(Shard(Path(name), tuple(file), {"format": "pt"}) for name, file in zip(names, files, strict=True))
    return Checkpoint(target, shards, {tensor.name: tensor for tensor in tensors})


def _written(files: Checkpoint, folder: Path, own: Sequence[Shard], level: Level, effort: int) -> str:
    """Write some of the files; as JSON, of each one its bytes and what was written, tensor by tensor."""
    told = []
    with refusals(files.path):
        for file in own:
            path = folder / file.file
            infos = write_packed(path, file.tensors, level=level, effort=effort, metadata=file.metadata)
            told.append((path.stat().st_size, [asdict(info) for info in infos]))
    return json.dumps(told)


def _write_index(files: Checkpoint, folder: Path) -> None:
    found = {tensor.name: str(shard.file) for shard in files.shards for tensor in shard.tensors}
    size = sum(tensor.nbytes for shard in files.shards for tensor in shard.tensors if not isinstance(tensor, Alias))
    index = {"metadata": {"total_size": size}, "weight_map": {name: found[name] for name in files.tensors}}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load(
    path: StrPath | Checkpoint,
    *,
    into: nn.Module | None = None,
    strict: bool = True,
    verify: bool = False,
    key: str | None = None,
) -> dict[str, Tensor]:
    """Read a packed file, or any other checkpoint, as a state_dict or into a module.

    Into a module, weights are decoded where they will stay: no second copy is made. The file's names, shapes and
    checksums are checked before anything changes.

    Args:
        path: a file of `save` or `pack`, or whatever else `secateur inspect` reads.
        into: a module to fill in place; its parameters stay the objects they are, on their device, in their dtype. Of
            a sharded one each process that calls this fills its part, tensor by tensor, and waits for no other.
        strict: whether names that only the file or only the module has are an error.
        verify: decode twice, the first time to compare with the SHA-256 of what was saved. Checksums of the stored
            bytes are compared in any case.
        key: of a file of `torch.save` with several states ("model", "ema"), the one to take.

    Returns:
        The state_dict, in its order, on the CPU. With `into`, those tensors of the module that were filled, as a dict
        that prints in a line. Tied tensors are one tensor.

    Raises:
        FileError: the file is damaged or of another version; it names the tensor.
        UnknownNameError: (strict) names that differ; no such key. InputError: a shape that differs; a file of masks;
            more than the memory that is free. Nothing was changed.
    """
    checks.flag("strict", strict)
    checks.flag("verify", verify)
    checkpoint = opened(path, key)
    tensors = checkpoint.tensors
    if any(shard.metadata.get("format") == FORMAT for shard in checkpoint.shards):
        raise InputError(f"{checkpoint.path} holds masks, not weights: read it with secateur.Masks.load")
    targets = {} if into is None else _targets(unwrap(into), tensors, checkpoint.path, strict)
    _in_threads([partial(_check, t) for t in tensors.values()], sum(t.numel() for t in tensors.values()))
    if verify:
        _verify(checkpoint)
    sources = {name: t.of if isinstance(t, Alias) else t for name, t in tensors.items()}
    if into is None:
        own = {source.name: source for source in sources.values()}
        _require_memory(checkpoint, sum(source.nbytes for source in own.values()))
        targets = {name: [source.room()] for name, source in own.items()}
    _fill(targets, {source.name: source for source in sources.values()})
    found = {name: targets[source.name][0] for name, source in sources.items() if source.name in targets}
    return found if into is None else _Filled(found)


def _require_memory(checkpoint: Checkpoint, needed: int) -> None:
    """See that there is memory for all tensors: blocks of zeros take a hundred thousand times what they are stored in.

    Raises:
        InputError: there is not.
    """
    free = free_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{checkpoint.path} takes {size(needed)} of memory, and {size(free)} are free: load it into a model that "
            "is there (into=), or read it tensor by tensor with secateur.storage.checkpoints.iter_tensors"
        )


def _verify(checkpoint: Checkpoint) -> None:
    """Compare the decoded tensors of each packed file with the SHA-256 of what was saved.

    Raises:
        FileError: they differ.
    """
    for shard in checkpoint.shards:
        state = StateHash()
        for tensor in shard.tensors if shard.sha256 is not None else ():
            for _ in state.passing(tensor, BLOCK):
                pass
        if shard.sha256 is not None:
            state.require(shard.sha256, shard.file)


def packed_name(path: StrPath) -> Path:
    """Return a path to write a file to.

    Raises:
        InputError: it does not end in `.safetensors`.
    """
    target = checks.path("path", path)
    if target.suffix != ".safetensors":
        better = f"{target.stem or 'model'}.safetensors"
        raise InputError(f"{target}: secateur writes .safetensors files, so give a name that ends in it: {better}")
    return target


def refuse_names(names: Iterable[str]) -> None:
    """See that a packed file can hold tensors of these names.

    Raises:
        InputError: one is that of a packed tensor, which was read without unpacking; or no file can hold it.
    """
    for name in names:
        if name.endswith(SUFFIX):
            raise InputError(f"{name} is packed already: read it with secateur.load, then save what that gives")
        if name == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise InputError(f"no .safetensors file holds a tensor named {name!r}: rename it")


def _state_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    state = unwrap(model).state_dict() if isinstance(model, nn.Module) else model
    if isinstance(model, nn.Module):
        left = [name for name in model.state_dict() if not any(end in state for end in _ends(name))]
        if left:
            warn(
                f"{listed(left)} of the {type(model).__name__} around the model is not in the file, which is that of "
                "the model inside: to go on with the wrapper, save its state_dict()"
            )
    if not isinstance(state, Mapping):
        raise InputTypeError(f"save takes a module or a state_dict, not {checks.kind(state)}")
    return state


def _tensors_of(state: Mapping[str, Tensor]) -> list[Stored]:
    here = {name: bits.local(tensor) if bits.is_sharded(tensor) else tensor for name, tensor in state.items()}
    for name, tensor in here.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputTypeError(
                f"{name} is {checks.kind(tensor)}: a .safetensors file holds tensors by name; save it elsewhere"
            )
        kind_of(name, tensor)
    refuse_names(state)
    if not state:
        raise InputError("there is nothing to save: the state holds no tensor")
    return stored_of(here)


def _ends(name: str) -> Iterator[str]:
    """A name, and what is left of it without the modules around: "module.0.weight", "0.weight", "weight"."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _targets(model: nn.Module, tensors: Mapping[str, Stored], path: Path, strict: bool) -> dict[str, list[Tensor]]:
    """For each tensor of the file, what is to be filled with it: several if it is tied in the file and not here."""
    places: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    places |= {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in places and p.is_meta}
    filled = {id(places[name]) for name in tensors if name in places}
    missing = [name for name, place in places.items() if name not in tensors and id(place) not in filled]
    unknown = [name for name in tensors if name not in places]
    if strict and (missing or unknown):
        lacks = f"lacks {missing[0]}; {nearest(missing[0], tensors)}" if missing else ""
        has = f"has {unknown[0]}, which the model does not have; {nearest(unknown[0], places)}" if unknown else ""
        raise UnknownNameError(
            f"{path} is of another model: it {' and '.join(filter(None, (lacks, has)))}: give one of this model",
            in_python="; strict=False loads what fits",
        )
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    last: dict[int, tuple[str, Tensor]] = {}  # of several names for one place, the last counts, as in torch
    for name, tensor in tensors.items():
        if name not in places:
            continue
        place = places[name]
        if not isinstance(place, Tensor) or id(place) not in own:
            raise InputTypeError(
                f"{name} is computed by the model and cannot be filled in place: "
                "model.load_state_dict(sc.load(path)) instead"
            )
        kind_of(name, bits.local(place) if bits.is_sharded(place) else place)
        sharding.place_of(name, place)
        if any(step == 0 and size > 1 for step, size in zip(place.stride(), place.shape, strict=True)):
            raise InputTypeError(f"{name} is expanded, so its elements share memory: copy it with .clone() first")
        if place.shape != tensor.shape:
            raise InputError(
                f"{path} is of another model: {name} has the shape {tuple(tensor.shape)} there, "
                f"and {tuple(place.shape)} here"
            )
        if tensor.dtype.is_complex and not place.dtype.is_complex:
            raise InputTypeError(f"{name} is complex in {path} and real in the model: load the state_dict and choose")
        last[id(place)] = (tensor.of.name if isinstance(tensor, Alias) else name), place.detach()
    targets: dict[str, list[Tensor]] = {}
    for source, target in last.values():
        targets.setdefault(source, []).append(target)
    return targets


def _fill(targets: Mapping[str, Sequence[Tensor]], tensors: Mapping[str, Stored]) -> None:
    """Decode each tensor into the first of its targets where it can be decoded in place, and copy it to the others."""
    direct = {name: places[0] for name, places in targets.items() if _fits(places[0], tensors[name])}
    fillers = [fill for name, place in direct.items() for fill in tensors[name].fillers(place.view(-1))]
    _in_threads(fillers, sum(place.numel() for place in direct.values()))
    for name, places in targets.items():
        if name in direct and not direct[name].is_inference():  # those have no version
            torch.autograd.graph.increment_version(direct[name])
        value = direct[name] if name in direct else tensors[name].tensor()
        for target in places[name in direct :]:
            place = sharding.place_of(name, target)
            bits.local(target).copy_(value if place is None else place.part(value))


def _fits(place: Tensor, tensor: Stored) -> bool:
    return (
        not bits.is_sharded(place)
        and place.device.type == "cpu"
        and place.dtype == tensor.dtype
        and place.is_contiguous()
    )


def _check(tensor: Stored, _: Decoder) -> None:
    tensor.check()


def _in_threads(jobs: Iterable[Callable[[Decoder], None]], elements: int) -> None:
    """Do all jobs, on this thread and, if they are about enough elements, on as many others as torch would use."""
    left = deque(jobs)
    others = torch.get_num_threads() - 1 if elements >= _WORTH_THREADS else 0

    def work() -> None:
        decoder = Decoder()
        while True:
            try:
                job = left.popleft()
            except IndexError:  # that was all
                return
            try:
                job(decoder)
            except BaseException:
                left.clear()
                raise

    with ThreadPoolExecutor(others or 1) as pool:
        futures = [pool.submit(work) for _ in range(others)]
        work()
    for future in futures:
        future.result()
