"""What a run keeps that goes section by section: inputs in memory or on disk, and what is done in a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten

from secateur.errors import FileError, InputError, MaskError
from secateur.masks import Masks
from secateur.support import bits
from secateur.support.files import refusals, replacing
from secateur.support.inputs import Arguments

_FORMAT = "secateur.sequential 1"
_OTHER = {"model": "of another model", "format": "of another version of secateur"}
_NOTES, _INPUTS, _SECTIONS = "run.json", "inputs", "sections"


class Inputs(ABC):
    """The tensors that each batch brings to a stage of the run, by key."""

    @abstractmethod
    def lay(self, stage: str, batch: int, tensors: Mapping[str, Tensor]) -> None:
        """Lay them down, each without gaps: so they are the same, bit for bit, wherever they lie."""

    @abstractmethod
    def take(self, stage: str, batch: int, keys: Collection[str]) -> dict[str, Tensor]:
        """Take up some of them; they stay there too.

        Raises:
            FileError: what lies on disk is damaged.
        """

    @abstractmethod
    def leave(self, stage: str, batch: int, keys: Collection[str]) -> None:
        """Only these are needed from now on, if the run is not interrupted."""

    @abstractmethod
    def clear(self, stage: str) -> None:
        """None of a stage is needed any more."""


class InputsInMemory(Inputs):
    """They stay where they are."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], dict[str, Tensor]] = {}

    def lay(self, stage: str, batch: int, tensors: Mapping[str, Tensor]) -> None:
        self._held[stage, batch] = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}

    def take(self, stage: str, batch: int, keys: Collection[str]) -> dict[str, Tensor]:
        return {key: self._held[stage, batch][key] for key in keys}

    def leave(self, stage: str, batch: int, keys: Collection[str]) -> None:
        self._held[stage, batch] = self.take(stage, batch, keys)

    def clear(self, stage: str) -> None:
        self._held = {place: held for place, held in self._held.items() if place[0] != stage}


class InputsOnDisk(Inputs):
    """A safetensors file for each stage and batch; what an interrupted run needs stays until its stage is cleared."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def lay(self, stage: str, batch: int, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        path = self._path(stage, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        devices = {key: str(tensor.device) for key, tensor in tensors.items()}
        plain = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
        }
        with replacing(path) as temporary:
            save_file(plain, temporary, metadata=devices)

    def take(self, stage: str, batch: int, keys: Collection[str]) -> dict[str, Tensor]:
        if not keys:
            return {}
        path = self._path(stage, batch)
        with _sound(path, self._folder.parent), safe_open(path, framework="pt") as file:
            devices = file.metadata() or {}
            # a copy: where a number lies in a file may change how a product rounds
            return {key: file.get_tensor(key).clone().to(devices[key]) for key in keys}

    def leave(self, stage: str, batch: int, keys: Collection[str]) -> None:
        pass

    def clear(self, stage: str) -> None:
        shutil.rmtree(self._folder / stage, ignore_errors=True)

    def _path(self, stage: str, batch: int) -> Path:
        return self._folder / stage / f"{batch:05}.safetensors"


@contextmanager
def _sound(path: Path, folder: Path) -> Iterator[None]:
    """Read a file of a run; raises FileError if it is damaged."""
    try:
        yield
    except (SafetensorError, FileNotFoundError, KeyError, MaskError, InputError) as error:
        raise FileError(f"{path} is damaged ({error}): remove {folder}, and prune again") from error


class RunFolder:
    """The sections that are done, on disk.

    Args:
        folder: made if it is not there.
        told: of the run, as JSON holds it: two runs of which it is the same go on with one another.

    Attributes:
        done: sections that were finished before.

    Raises:
        InputError: the folder holds something else, or another run. WriteError: the system refuses to make it.
    """

    def __init__(self, folder: Path, told: Mapping[str, object]) -> None:
        self.folder = folder
        self._told = {"format": _FORMAT, **told}
        with refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.done = self._begun()

    def inputs(self) -> InputsOnDisk:
        """What lies in the folder for the next section."""
        return InputsOnDisk(self.folder / _INPUTS)

    def save(self, section: int, tensors: Mapping[str, Tensor], masks: Masks) -> None:
        """Write the new weights of a section, and which of them are kept."""
        weights, kept = self._paths(section)
        with refusals(weights):
            weights.parent.mkdir(exist_ok=True)
        with replacing(weights) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        masks.save(kept)

    def load(self, section: int) -> tuple[dict[str, Tensor], Masks]:
        """The new weights of a section, which stay in the file until they are looked at, and its masks.

        Raises:
            FileError: one of the files is damaged, or not there.
        """
        weights, kept = self._paths(section)
        with _sound(weights, self.folder), safe_open(weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with _sound(kept, self.folder):
            return tensors, Masks.load(kept)

    def finish(self, section: int) -> None:
        """Note that a section is done, and all that the next one needs is there."""
        self.done = section + 1
        with replacing(self.folder / _NOTES) as temporary:
            temporary.write_text(json.dumps({**self._told, "done": self.done}, indent=1), "utf-8")

    def _paths(self, section: int) -> tuple[Path, Path]:
        place = self.folder / _SECTIONS
        return place / f"{section:04}.safetensors", place / f"{section:04}.masks.safetensors"

    def _begun(self) -> int:
        notes = self.folder / _NOTES
        if not notes.exists():
            strange = sorted(path.name for path in self.folder.iterdir() if path.name not in (_INPUTS, _SECTIONS))
            if strange:
                raise InputError(f"{self.folder} holds {strange[0]}, and no run of oneshot: give a new folder")
            return 0
        try:
            read = json.loads(notes.read_text("utf-8"))
            done, told = int(read.pop("done")), dict(read)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(f"{notes} is damaged ({error!r}): remove {self.folder}, or give another folder") from error
        asked: dict[str, object] = json.loads(json.dumps(self._told))
        differ = [_difference(key, value, told.get(key)) for key, value in asked.items()]
        if any(differ):
            raise InputError(
                f"{self.folder} holds another run, {' and '.join(filter(None, differ))}: give another folder, or "
                "remove it"
            )
        return done


def _difference(key: str, asked: object, there: object) -> str:
    """What another run has in place of what is asked, in words; empty if it is the same."""
    if not (isinstance(asked, dict) and isinstance(there, dict)):
        return "" if asked == there else _OTHER.get(key, f"with other {key}")
    names = dict.fromkeys([*asked, *there])
    other = {one: (asked.get(one, "none"), there.get(one, "none")) for one in names if asked.get(one) != there.get(one)}
    told = [_setting(name, *values) for name, values in other.items() if name != "zeros" or "sparsity" not in other]
    return f"with other {key} ({'; '.join(told)})" if told else ""


def _setting(name: str, asked: object, there: object) -> str:
    """How two runs differ in one setting; in one that has a value for each tensor, in the first of these."""
    if isinstance(asked, dict) and isinstance(there, dict):
        first = next(one for one in (*asked, *there) if asked.get(one) != there.get(one))
        name, asked, there = f"{name} of {first}", asked.get(first, "none"), there.get(first, "none")
    return f"{name}: asked {asked}, there {there}"


def digest(tensors: Iterable[tuple[str, Tensor]], words: str = "") -> str:
    """SHA-256 of names, dtypes, shapes and bytes, and of some words."""
    found = hashlib.sha256(words.encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for _, piece in bits.chunks(bits.plain(tensor).reshape(-1)):
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def batches_digest(batches: Iterable[Arguments]) -> str:
    """SHA-256 of what some batches hold."""
    found = hashlib.sha256()
    for batch in batches:
        leaves, spec = tree_flatten(batch)
        flat = [one for leaf in leaves for one in (leaf if isinstance(leaf, PackedSequence) else (leaf,))]
        tensors = [(str(at), leaf) for at, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        others = [repr(leaf) for leaf in flat if not isinstance(leaf, Tensor)]
        found.update(digest(tensors, f"{spec} {others}").encode())
    return found.hexdigest()
