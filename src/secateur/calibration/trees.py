"""Nested containers of tensors: as JSON beside a list of tensors, in a file, and in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from secateur.errors import FileError, InputError, SecateurError
from secateur.support import checks
from secateur.support.files import replacing, require_file

_PLAIN = str, int, float, bool, type(None)


def flat(tree: Any, tensors: list[Tensor], where: str) -> Any:
    """Write nested containers as JSON, with numbers in the places of tensors, which are listed once each.

    Args:
        tree: dicts with texts as keys, lists, tuples, packed sequences, texts, numbers, tensors.
        tensors: the list; those that are new are added.
        where: what the tree is, for messages.

    Raises:
        InputError: something else is in it.
    """
    if isinstance(tree, Tensor):
        number = next((i for i, one in enumerate(tensors) if one is tree), len(tensors))
        if number == len(tensors):
            tensors.append(tree)
        return {"tensor": number}
    if type(tree) in _PLAIN:
        return tree
    if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
        return {"dict": {key: flat(value, tensors, where) for key, value in tree.items()}}
    if isinstance(tree, PackedSequence):
        return {"packed": [flat(value, tensors, where) for value in tree]}
    if isinstance(tree, tuple | list):
        return {"list" if isinstance(tree, list) else "tuple": [flat(one, tensors, where) for one in tree]}
    raise InputError(
        f"{where} holds {checks.kind(tree)}, which no file of tensors holds: give batches of tensors, dicts, tuples, "
        "lists, numbers and texts"
    )


def tree(written: Any, tensors: Sequence[Tensor]) -> Any:
    """Read what `flat` wrote.

    Raises:
        ValueError, KeyError, IndexError, TypeError, AttributeError: it did not write this.
    """
    if type(written) in _PLAIN:
        return written
    ((kind, content),) = written.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: tree(value, tensors) for key, value in content.items()}
    values = [tree(one, tensors) for one in content]
    if kind == "packed":
        return PackedSequence(*values)
    return {"list": list, "tuple": tuple}[kind](values)


def write(path: Path, kind: str, contents: dict[str, Any], tensors: Sequence[Tensor]) -> None:
    """Write a `.safetensors` file of tensors, with contents that name them; an old file stays until it is whole.

    Args:
        path: of the file.
        kind: what it holds, told to `read`.
        contents: as JSON, of what `flat` gave.
        tensors: those that it lists.

    Raises:
        WriteError: the system refuses to write.
    """
    stored: dict[str, Tensor] = {}
    for number, tensor in enumerate(tensors):
        plain = tensor.detach().cpu().contiguous()
        shared = any(plain.untyped_storage()._cdata == one.untyped_storage()._cdata for one in stored.values())
        whole = plain.untyped_storage().nbytes() == plain.nbytes
        stored[str(number)] = plain if whole and not shared else plain.clone()  # a file takes no memory twice
    metadata = {"format": kind, "version": "1", "contents": json.dumps(contents)}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata)


def read(path: Path, kind: str, device: str | torch.device) -> tuple[dict[str, Any], list[Tensor]]:
    """Read what `write` wrote.

    Raises:
        InputError: there is no such file. FileError: it holds something else, or is damaged.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind or metadata.get("version") != "1":
                raise FileError(f"{path} is no file of {kind}, version 1: give one that was saved as that")
            # a copy: where a number lies in a file may change how a product rounds
            tensors = [file.get_tensor(str(number)).clone() for number in range(len(list(file.keys())))]
        return dict(json.loads(metadata["contents"])), tensors
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be read as {kind} ({error}): make it again") from error


@contextmanager
def taken(batch: Any, number: int) -> Iterator[None]:
    """Run a model on a batch, which it may not take.

    Args:
        batch: for the message.
        number: of it, counted from 1.

    Raises:
        InputError: in the place of what the model raises.
    """
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        raise InputError(
            f"the model does not take batch {number}, {told(batch)} ({type(error).__name__}: {error}): give each batch "
            "as a tensor, a tuple of positional or a dict of keyword arguments, without labels unless the model takes "
            "them, on the device of the model"
        ) from error


def told(tree: Any, depth: int = 2) -> str:
    """Word a batch in a message: containers, and dtype and shape of each tensor.

    >>> import torch
    >>> told({"x": torch.zeros(2, 3), "n": [1, 2]})
    'a dict {x: float32 [2, 3], n: a list (int, int)}'
    """
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {list(tree.shape)}"
    if isinstance(tree, Mapping) and depth:
        return f"{checks.kind(tree)} {{{', '.join(f'{key}: {told(value, depth - 1)}' for key, value in tree.items())}}}"
    if isinstance(tree, tuple | list) and depth:
        shown = [told(one, depth - 1) for one in tree[:8]] + ["..."] * (len(tree) > 8)
        return f"{checks.kind(tree)} ({', '.join(shown)})"
    return type(tree).__name__
