"""What `secateur shrink` does: a model of the user's is built or loaded, shrunk and written with its plan."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn
from typing_extensions import Unpack

from secateur.errors import InputError, InputTypeError, UnknownNameError
from secateur.runtime.bench import input_of, model_of
from secateur.storage import load, shrink_checkpoint
from secateur.storage.checkpoints import INDEX, opened
from secateur.storage.conversion import refuse_same
from secateur.storage.pretrained import load_pretrained
from secateur.structure import Options, Plan, propose
from secateur.support.files import replacing, replacing_folder, require_file, require_place
from secateur.support.tables import Table

_SPELLING = "give --input once for each argument: 1x784, or with its name input_ids=1x16:int64"


@dataclass(frozen=True)
class Shrunk:
    """What goes from a model, and what was written.

    Attributes:
        plan: of what goes.
        weights: how many there are before and after: parameters, or, of a checkpoint, all numbers.
        written: files or folders; empty after a dry run.
    """

    plan: Plan
    weights: tuple[int, int]
    written: tuple[str, ...]

    def table(self) -> Table:
        """The groups of units, how many of them go, and what holds the others."""
        before, after = self.weights
        notes = [f"{before:,} weights become {after:,}", *(f"written: {path}" for path in self.written)]
        shown = self.plan.explain()
        return Table(shown.header, shown.rows, notes=notes)

    def to_dict(self) -> dict[str, Any]:
        """Counts and groups as plain data, for JSON."""
        shown = self.plan.explain()
        groups = [dict(zip(shown.header, row, strict=True)) for row in shown.rows]
        return {"weights": list(self.weights), "groups": groups, "written": list(self.written)}


def run(
    target: str | None,
    inputs: Sequence[str],
    *,
    hf: Path | None = None,
    weights: Path | None = None,
    out: Path | None = None,
    sparsity: float | None = None,
    **options: Unpack[Options],
) -> Shrunk:
    """Shrink a model and write it.

    Args:
        target: MODULE:FACTORY, as of `runtime.bench.model_of`; None with `hf`.
        inputs: as of `runtime.bench.input_of`, for each positional argument, or NAME=SHAPE for each keyword.
            Empty with `hf`: words or pictures as its config tells them.
        hf: a folder of `save_pretrained`.
        weights: what `sc.load` reads, to fill the model of `target`.
        out: for `target` a .safetensors file, with the plan beside it as .plan.json; for `hf` a new folder, with
            the tokenizer and what else is in the old one. None: nothing is written.
        sparsity, **options: as for `sc.shrink`.

    Raises:
        InputError, InputTypeError, UnknownNameError, StructureError: as of `model_of`, `input_of`, `sc.load` and
            `sc.shrink`; or the folder does not say of which class its model is. WriteError: `out` cannot be written.
    """
    if (target is None) == (hf is None):
        raise InputError("it is not clear which model is meant: give either MODULE:FACTORY or --hf FOLDER")
    if out is not None:
        require_target(out, hf, weights)
    model: Any
    if hf is not None:
        model = load_pretrained(hf, class_of(hf))
    else:
        model = model_of(str(target))
        if weights is not None:
            load(weights, into=model)
    model.eval()
    before = _count(model)
    plan = propose(model, _spelled(inputs) if inputs else _example(model), sparsity, **options)
    plan.apply(model)
    written: tuple[str, ...] = ()
    if out is not None:
        written = _write_folder(model, plan, hf, out) if hf is not None else _write_file(model, plan, out)
    return Shrunk(plan, (before, _count(model)), written)


def by_plan(plan: Path, weights: Path | None = None, hf: Path | None = None, out: Path | None = None) -> Shrunk:
    """Cut a checkpoint by a plan, tensor by tensor; no model with weights is made.

    Args:
        plan: a file that `run` wrote, or with what `Plan.to_json` gives.
        weights: a checkpoint.
        hf: or a folder of `save_pretrained`, whose config follows.
        out: a .safetensors file, or a new folder for one; None: nothing is written.

    Raises:
        InputError, MaskError, WriteError: as of `Plan.from_json` and `storage.shrink_checkpoint`; or neither or both of
            `weights` and `hf` are given, or there is no such file.
    """
    src = weights if hf is None else hf
    if src is None or (weights is not None and hf is not None):
        raise InputError("--plan cuts a checkpoint: give either --weights F or --hf FOLDER, and no MODULE:FACTORY")
    require_file(plan)
    told, checkpoint = Plan.from_json(plan.read_text(encoding="utf-8")), opened(src)
    told.check(checkpoint.tensors)
    shapes = {name: torch.empty(t.shape, device="meta") for name, t in checkpoint.tensors.items()}
    stay = {now: t for name, t in shapes.items() if (now := told.renamed(name)) is not None}
    before = sum(t.numel() for t in shapes.values())
    after = sum(told.cut(name, t).numel() for name, t in stay.items())
    if out is not None:
        config = None if hf is None else _config(hf, told)
        shrink_checkpoint(checkpoint, out, told)
        if config is not None:
            config.save_pretrained(out)
    return Shrunk(told, (before, after), () if out is None else (str(out),))


def _config(folder: Path, plan: Plan) -> Any:
    """The config of the smaller model."""
    cls = class_of(folder)
    with torch.device("meta"):
        model = cls(cls.config_class.from_pretrained(folder))
    plan.apply(model)
    return model.config


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def require_target(out: Path, hf: Path | None, weights: Path | None) -> None:
    """See that a model of a folder, or one that is filled with weights, can be written to `out`.

    Raises:
        InputError: it is there already, no .safetensors file, or a source. WriteError: it cannot be written.
    """
    require_place(out)
    if hf is not None:
        refuse_same(hf, out)
        if out.exists():
            raise InputError(f"{out} is there already: give a new folder")
        return
    if out.suffix != ".safetensors":
        raise InputError(f"{out} is no name of a .safetensors file: give one, such as small.safetensors")
    if weights is None:
        return
    refuse_same(weights, out)
    if weights.is_dir() or weights.name.endswith(INDEX):
        for shard in opened(weights).shards:  # which may be links to files elsewhere
            refuse_same(shard.file, out)


def class_of(folder: Path) -> Any:
    """The class of transformers that a folder's config names."""
    try:
        import transformers
    except ImportError:
        raise InputError("--hf needs transformers: pip install transformers") from None
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: give a folder of save_pretrained")
    try:
        names = transformers.AutoConfig.from_pretrained(folder).architectures or [""]
    except (ValueError, OSError) as error:
        raise InputError(f"transformers does not know the config.json of {folder}: {error}") from error
    found = getattr(transformers, names[0], None)
    if found is None:
        raise UnknownNameError(f"{folder} names {names[0]!r} as its architecture: give a model of transformers' own")
    return found


def _spelled(inputs: Sequence[str]) -> Any:
    """A tuple of positional or a dict of keyword arguments."""
    generator = torch.Generator().manual_seed(0)
    named = [text.partition("=") for text in inputs if "=" in text]
    if named and len(named) < len(inputs):
        raise InputError(f"some inputs have a name and some have none: {_SPELLING}")
    if named:
        return {name: input_of(spelled, generator) for name, _, spelled in named}
    return tuple(input_of(text, generator) for text in inputs)


def _example(model: Any) -> dict[str, torch.Tensor]:
    """Words or pictures for a model of transformers."""
    name = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    words, size = getattr(config, "vocab_size", None), getattr(config, "image_size", None)
    if name == "input_ids" and isinstance(words, int):
        names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
        return dict(_spelled([f"{one}=2x16:int64:{words}" for one in names]))
    if name == "pixel_values" and isinstance(size, int):
        return dict(_spelled([f"{name}=2x{getattr(config, 'num_channels', 3)}x{size}x{size}"]))
    raise InputTypeError(f"it is not clear what {type(model).__name__} takes: {_SPELLING}")


def _write_file(model: nn.Module, plan: Plan, out: Path) -> tuple[str, ...]:
    beside = out.with_suffix(".plan.json")
    with replacing(beside) as new:
        new.write_text(plan.to_json())
    with replacing(out) as new:
        save_model(model, str(new), metadata={"format": "pt"})
    return str(out), str(beside)


def _write_folder(model: Any, plan: Plan, old: Path, out: Path) -> tuple[str, ...]:
    with replacing_folder(out) as new:
        shutil.copytree(old, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
        model.save_pretrained(new)
        (new / "secateur.plan.json").write_text(plan.to_json())
    return (str(out),)
