"""What `secateur prune` does with data: a model of the user's is calibrated, pruned without training, and written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_model
from torch import nn

from secateur.calibration import calibrate, oneshot
from secateur.calibration.contest import Pruned
from secateur.errors import InputError
from secateur.runtime.bench import model_of, named
from secateur.scope import weights as weights_of
from secateur.shrink_command import class_of, require_target
from secateur.storage import load, save, save_pretrained
from secateur.storage.coding import STEPS
from secateur.storage.pretrained import load_pretrained
from secateur.support import checks
from secateur.support.files import replacing, replacing_folder, require_file
from secateur.support.tables import Table

_AT_ONCE = 16  # texts
_LONGEST = 512  # tokens of a text
_VOCABULARIES = ("tokenizer*.json", "tokenizer.model*", "tekken.json", "*.tiktoken")
_TOKENIZER = "save the tokenizer of the model there with save_pretrained, or give --data MODULE:BATCHES"


@dataclass(frozen=True)
class Source:
    """The model that is meant, and the data that it is calibrated on.

    Attributes:
        target: MODULE:FACTORY, as of `runtime.bench.model_of`; None with `hf`.
        data: MODULE:BATCHES: an iterable of inputs, or a function that returns one.
        weights: what `sc.load` reads, to fill the model of `target`.
        hf: a folder of `save_pretrained`.
        texts: a file of text, an example a line, in place of `data` with `hf`.
    """

    target: str | None = None
    data: str | None = None
    weights: Path | None = None
    hf: Path | None = None
    texts: Path | None = None

    def model(self) -> Any:
        """Build or load the model."""
        if (self.target is None) == (self.hf is None):
            raise InputError("it is not clear which model is meant: give either MODULE:FACTORY or --hf FOLDER")
        if self.hf is not None:
            return load_pretrained(self.hf, class_of(self.hf))
        model = model_of(str(self.target))
        if self.weights is not None:
            load(self.weights, into=model)
        return model

    def batches(self, model: Any) -> Iterable[Any]:
        """The inputs of the model."""
        if (self.data is None) == (self.texts is None):
            raise InputError("it is not clear which data is meant: give either --data MODULE:BATCHES or --texts FILE")
        if self.data is not None:
            found = named(self.data, "MODULE:BATCHES", "data:batches, for batches, or batches(), of data.py")
            made = found() if callable(found) and not isinstance(found, Iterable) else found
            checks.several(self.data, made, "an iterable of inputs, or a function that returns one")
            return made  # type: ignore[no-any-return]
        if self.hf is None:
            raise InputError("--texts are for the tokenizer of --hf FOLDER: give --data MODULE:BATCHES")
        return _tokens(self.hf, Path(str(self.texts)), model)


@dataclass(frozen=True)
class Done:
    """What was pruned, and what was written.

    Attributes:
        masks: which also print what each layer lost.
        written: a file or a folder; empty after a dry run.
    """

    masks: Pruned
    written: str

    def table(self) -> Table:
        """One row a layer, with the share of its output that is lost; then the ways that were tried."""
        shown = self.masks.table()
        notes = [*shown.notes, *([f"written: {self.written}"] if self.written else [])]
        return Table(shown.header, shown.rows, shown.title, notes)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        layers = [
            {"name": name, "zeros": zeros, "weights": size, "lost": loss}
            for name, (zeros, size, loss) in self.masks.losses.items()
        ]
        return {
            "zeros": self.masks.pruned,
            "weights": self.masks.size,
            "layers": layers,
            "tried": dict(self.masks.tried),
            "way": self.masks.way,
            "written": self.written,
        }


def run(
    source: Source,
    sparsity: float,
    *,
    out: Path | None = None,
    allocation: str = "uniform",
    pattern: str | None = None,
    chosen: tuple[Sequence[str], Sequence[str]] = ((), ()),
    pack: str | None = None,
) -> Done:
    """Prune a model by what its layers read, and write it.

    Args:
        source: the model and the data.
        sparsity, allocation, pattern: as for `sc.oneshot`.
        out: for a model of MODULE:FACTORY a .safetensors file; for `hf` a new folder, with the tokenizer and what else
            is in the old one. None: nothing is written.
        chosen: globs of what is pruned, none for all weights, and of what is left out.
        pack: a level of `sc.save`; None writes what any reader reads.

    Raises:
        InputError, InputTypeError, UnknownNameError, PatternError: as of `sc.calibrate` and `sc.oneshot`; it is not
            clear which model or data is meant. WriteError: `out` cannot be written.
    """
    if out is not None:
        require_target(out, source.hf, source.weights)
    model = source.model().eval()
    only, skip = chosen
    scope = weights_of(model, only=list(only) or None, skip=list(skip))
    progress = Console(stderr=True).is_terminal
    stats = calibrate(model, source.batches(model), scope=scope, progress=progress)
    masks = oneshot(model, stats, sparsity, allocation=allocation, pattern=pattern, scope=scope, progress=progress)
    if out is not None and source.hf is not None:
        _write_folder(model, source.hf, out, pack)
    elif out is not None and pack is not None:
        save(model, out, level=pack, stats=stats if pack in STEPS else None)
    elif out is not None:
        _write_file(model, out)
    return Done(masks, "" if out is None else str(out))


def _tokens(folder: Path, texts: Path, model: Any) -> list[dict[str, Any]]:
    """The lines of a file, as the tokenizer of a folder reads them."""
    require_file(texts)
    lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{texts} holds no text: give a file with an example a line")
    tokenizer = _tokenizer(folder)
    special = {*tokenizer.all_special_ids}  # the one for what is unknown, too
    if all(special.issuperset(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in lines):
        raise InputError(f"the tokenizer of {folder} knows no word of {texts}: {_TOKENIZER}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    most = min(tokenizer.model_max_length, *_positions(model))
    chunks = [lines[i : i + _AT_ONCE] for i in range(0, len(lines), _AT_ONCE)]
    return [dict(tokenizer(one, padding=True, truncation=True, max_length=most, return_tensors="pt")) for one in chunks]


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; where there is none, transformers would make one that knows no word."""
    import transformers  # of the folder, so that it is there

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise InputError(f"transformers reads no tokenizer from {folder} ({error}): {_TOKENIZER}") from error
    names = [*tokenizer.vocab_files_names.values()]  # none where letters are tokens
    there = [path.name for path in folder.iterdir() if path.name != "tokenizer_config.json"]
    if names and not any(name in names or any(fnmatch(name, glob) for glob in _VOCABULARIES) for name in there):
        raise InputError(f"{folder} has no tokenizer, which is in {' and '.join(names)}: {_TOKENIZER}")
    return tokenizer


def _positions(model: Any) -> Iterator[int]:
    """How many tokens of a text are read, by us and by the model."""
    yield _LONGEST
    config = model.config.get_text_config()
    told = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    yield from (most for most in told if isinstance(most, int) and most > 0)
    for name, table in model.named_modules():  # RoBERTa and its kin count from behind the position of padding
        if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            yield table.num_embeddings - table.padding_idx - 1


def _write_file(model: nn.Module, out: Path) -> None:
    with replacing(out) as new:
        save_model(model, str(new), metadata={"format": "pt"})


def _write_folder(model: Any, old: Path, out: Path, pack: str | None) -> None:
    with replacing_folder(out) as new:
        shutil.copytree(old, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
        if pack is None:
            model.save_pretrained(new)
        else:
            save_pretrained(model, new, level=pack)
