"""Hugging Face models in packed folders; transformers itself does all but the weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from secateur.errors import InputError, InputTypeError
from secateur.storage.archive import load
from secateur.storage.contents import Contents
from secateur.storage.conversion import pack
from secateur.support import bits, checks
from secateur.support.files import StrPath, scratch_folder


def save_pretrained(
    model: Any, folder: StrPath, *, level: str = "lossless", step: float | None = None, effort: str = "normal"
) -> Contents:
    """Save a transformers model to a folder as its own `save_pretrained` does, with its weights packed.

    `load_pretrained` reads the folder; `secateur unpack FOLDER OUT` gives one that `from_pretrained` reads without
    secateur. The packed files have names that `from_pretrained` does not look for, so that it says so.

    Args:
        model: a `transformers.PreTrainedModel`.
        folder: where to; what an earlier call wrote there gives way, other files (a tokenizer) stay.
        level, step, effort: as for `save`.

    Returns:
        What was written, tensor by tensor.

    Raises:
        InputTypeError: not a model of transformers. InputError: sharded weights. WriteError: the system refuses to
            write, or the folder holds other weights.
    """
    if not hasattr(model, "save_pretrained"):
        raise InputTypeError(f"{type(model).__name__} is not a model of transformers: use secateur.save for it")
    if isinstance(model, torch.nn.Module) and any(map(bits.is_sharded, model.parameters())):
        raise InputError(
            "the weights are sharded: write them with sc.save(model, folder, max_file_bytes=...) in all processes, and "
            "the configuration with model.config.save_pretrained(folder) in one"
        )
    target = checks.path("folder", folder)
    with scratch_folder(folder) as plain:
        if target.is_dir():  # a tokenizer may be there already
            shutil.copytree(target, plain, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
        model.save_pretrained(plain)
        return pack(plain, folder, level=level, step=step, effort=effort)


def load_pretrained(folder: StrPath, cls: Any) -> Any:
    """Load a transformers model from a folder of `save_pretrained` (or any other of its kind), ready for inference.

    Args:
        folder: with the configuration and the weights, packed or not.
        cls: a class of transformers: `BertModel`, `AutoModelForCausalLM`, ...

    Raises:
        InputTypeError: not such a class. FileError: the weights are damaged.

    Returns:
        The model, in `eval()` mode, as `cls.from_pretrained` would give it.
    """
    if not hasattr(cls, "from_pretrained"):
        raise InputTypeError(f"{cls!r} is not a class of transformers: use secateur.load(path, into=model)")
    checks.path("folder", folder)
    from transformers import AutoConfig, GenerationConfig

    config = getattr(cls, "config_class", None) or AutoConfig
    config = config.from_pretrained(folder)
    if hasattr(cls, "from_config"):  # an AutoModel: find out of which class it would make one
        with torch.device("meta"):
            cls = type(cls.from_config(config))
    model = cls.from_pretrained(None, config=config, state_dict=load(folder))
    model.name_or_path = model.config.name_or_path = os.fspath(folder)
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
