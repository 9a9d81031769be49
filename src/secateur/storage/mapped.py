"""A model without values that computes with those of a checkpoint: they stay in the files until they are looked at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.errors import InputError, listed
from secateur.scope import unwrap
from secateur.storage.checkpoints import Checkpoint
from secateur.storage.stored import Alias, InFile, InMemory


def names_in(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """For each parameter and buffer of a state_dict its name in a checkpoint; tied ones may be there once.

    A Hugging Face checkpoint may be of the model with another head or without one: then names differ by the
    `base_model_prefix`.

    Raises:
        InputError: the checkpoint lacks one, or has it in another shape.
    """
    own = model.state_dict(keep_vars=True)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    firsts: dict[int, str] = {}  # of tied ones
    for name, tensor in own.items():
        for written in (name, prefix + name, name.removeprefix(prefix)):
            if written in checkpoint.tensors:
                firsts.setdefault(id(tensor), written)
                found[name] = written
                break
    lost = [name for name, tensor in own.items() if id(tensor) not in firsts]
    if lost:
        raise InputError(f"{checkpoint.path} lacks {listed(lost)}: give the checkpoint of this model")
    for name, tensor in own.items():
        stored = checkpoint.tensors[found.setdefault(name, firsts[id(tensor)])]
        if stored.shape != tensor.shape:
            raise InputError(
                f"{checkpoint.path}: {stored.name} has shape {tuple(stored.shape)}, and {name} of the model "
                f"{tuple(tensor.shape)}: give the checkpoint of this model"
            )
    return found


@contextmanager
def mapped(model: nn.Module, checkpoint: Checkpoint) -> Iterator[nn.Module]:
    """Let a model on the meta device compute with the values of a checkpoint; afterwards it has none again.

    The values are read when they are needed, and the system forgets them again where memory is short. Buffers that no
    checkpoint holds, such as the frequencies of rotary embeddings, are made as the model makes them.

    Args:
        model: made under `torch.device("meta")`.
        checkpoint: plain; from `opened`.

    Yields:
        The model, plain.

    Raises:
        InputError: a parameter has values; the checkpoint is packed or of another model; a buffer that is not in it
            cannot be made.
    """
    model = unwrap(model)
    real = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    if real:
        raise InputError(
            f"{listed(real)} of the model has values already: make the model under `with torch.device('meta')`, or "
            "prune it without weights="
        )
    names = names_in(model, checkpoint)
    tensors = _tensors(checkpoint, set(names.values()))
    with ExitStack() as stack:
        put = _Put(stack)
        _make_buffers(model, put)
        made: dict[int, nn.Parameter] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for attribute, parameter in list(module._parameters.items()):
                if parameter is not None:
                    values = tensors[names[f"{prefix}.{attribute}".removeprefix(".")]]
                    new = made.setdefault(id(parameter), nn.Parameter(values, requires_grad=False))
                    put(module, attribute, new)
            for attribute in module._buffers.keys() - module._non_persistent_buffers_set:
                if module._buffers[attribute] is not None:
                    put(module, attribute, tensors[names[f"{prefix}.{attribute}".removeprefix(".")]].clone())
        yield model


class _Put:
    """Sets attributes of modules, which come back in the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def __call__(self, module: nn.Module, attribute: str, tensor: Tensor) -> None:
        self._stack.callback(setattr, module, attribute, getattr(module, attribute))
        setattr(module, attribute, tensor)


def _tensors(checkpoint: Checkpoint, wanted: set[str]) -> dict[str, Tensor]:
    """The tensors, mapped from their files."""
    found: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        own = [stored for stored in shard.tensors if stored.name in wanted]
        for stored in own:
            of = stored.of if isinstance(stored, Alias) else stored
            if shard.sha256 is not None or not isinstance(of, InFile | InMemory):
                raise InputError(
                    f"{shard.file} is packed, and its weights cannot be read one by one: unpack it first, with "
                    "secateur.unpack"
                )
            if isinstance(of, InMemory):  # of a file of torch.save
                found[stored.name] = of.tensor()
        if len(own) > sum(stored.name in found for stored in own):
            with safe_open(shard.file, framework="pt") as file:
                found |= {stored.name: file.get_tensor(stored.name) for stored in own}
    return found


def _make_buffers(model: nn.Module, put: Callable[[nn.Module, str, Tensor], None]) -> None:
    """Give values to the buffers that no checkpoint holds."""
    owners: dict[str, Any] = {}
    for path, module in model.named_modules():
        owners[path] = module if hasattr(type(module), "_init_weights") else owners.get(path.rpartition(".")[0])
        missing = {
            name: buffer
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
        }
        if not missing:
            continue
        with torch.random.fork_rng(devices=[]):
            values = _initialised(module, missing, owners[path]) or _rebuilt(module, missing)
        if values is None:
            raise InputError(
                f"{path}: its buffers {listed(list(missing))} are not in the checkpoint, and how "
                f"{type(module).__name__} makes them is not known: set them to their values first, on the CPU"
            )
        for name, value in values.items():
            put(module, name, value)


def _initialised(module: nn.Module, missing: Mapping[str, Tensor], owner: Any) -> dict[str, Tensor] | None:
    """Let a model of transformers fill them, which does so after loading on the meta device too."""
    if owner is None:
        return None
    values = {name: torch.full_like(buffer, _unset(buffer), device="cpu") for name, buffer in missing.items()}
    module._buffers.update(values)
    try:
        with torch.no_grad():
            owner._init_weights(module)
    finally:
        module._buffers.update(missing)
    left = [value for value in values.values() if bool(value.isnan().any() or (value == _unset(value)).any())]
    return None if left else values


def _unset(buffer: Tensor) -> float | int | bool:
    """What a buffer does not hold when it was filled."""
    if buffer.is_floating_point() or buffer.is_complex():
        return float("nan")
    return buffer.dtype is torch.bool or torch.iinfo(buffer.dtype).min


def _rebuilt(module: nn.Module, missing: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Make a module without parameters again, if it has kept what it was made with under the same names."""
    if any(True for _ in module.parameters()):
        return None
    given = {}
    for name, argument in inspect.signature(type(module)).parameters.items():
        if hasattr(module, name) and not isinstance(getattr(module, name), Tensor):
            given[name] = getattr(module, name)
        elif argument.default is argument.empty and argument.kind not in (
            argument.VAR_POSITIONAL,
            argument.VAR_KEYWORD,
        ):
            return None
    with torch.device("cpu"):
        new = type(module)(**given)
    values = {name: new._buffers.get(name) for name in missing}
    found = {name: value for name, value in values.items() if value is not None and value.shape == missing[name].shape}
    return found if found.keys() == missing.keys() else None
