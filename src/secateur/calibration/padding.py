"""Which positions of a batch are padding, as its masks tell."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.support.inputs import Arguments

Shape = tuple[int, ...]

_NEVER = -1e4
"""What is added to the logit of a key that no query looks at is -inf, or as little as this."""

_TOLD = {
    nn.MultiheadAttention: ("query", "key_padding_mask"),
    nn.TransformerEncoderLayer: ("src", "src_key_padding_mask"),
    nn.TransformerEncoder: ("src", "src_key_padding_mask"),
    nn.TransformerDecoderLayer: ("tgt", "tgt_key_padding_mask"),
    nn.TransformerDecoder: ("tgt", "tgt_key_padding_mask"),
    nn.Transformer: ("tgt", "tgt_key_padding_mask"),
}
"""Modules of torch that are told what is padding: what has as many positions as their output, and which are real."""


def real_positions(model: nn.Module, call: Arguments) -> list[Tensor]:
    """The masks [examples, positions] among the arguments of a call, True where there is no padding.

    A mask is a two-dimensional tensor of bools or of whole numbers 0 and 1 whose name holds "mask". 1 stands for what
    is real, as in transformers; where the name says `padding_mask`, True stands for padding, as in torch.nn. A square
    one may say which positions look at which, [positions, positions]: it counts only if its name holds "padding_mask",
    or "attention_mask" and it is not causal.

    Args:
        model: tells the names of positional arguments.
        call: its arguments.
    """
    found = []
    for name, value in _named(model, call):
        if "mask" not in name or not isinstance(value, Tensor) or value.ndim != 2 or value.is_floating_point():
            continue
        if value.dtype != torch.bool and not ((value == 0) | (value == 1)).all():
            continue
        real = value != 0
        if "padding_mask" in name:
            found.append(~real)
        elif len(real) != real.shape[1] or ("attention_mask" in name and not _causal(real)):
            found.append(real)
    return [mask for mask in found if not mask.all()]


def real_keys(mask: object) -> list[Tensor]:
    """The key padding mask of an attention of torch as `real_positions` gives it; none where all is real.

    Args:
        mask: [examples, keys] or [keys]: of bools, True for padding; or of numbers that are added to the logits.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (1, 2):
        return []
    real = ~mask if mask.dtype == torch.bool else mask > _NEVER
    return [] if real.all() else [real.reshape(-1, real.shape[-1])]


@contextmanager
def told(model: nn.Module) -> Iterator[dict[Shape, Tensor]]:
    """Collect the masks, by shape, that modules of torch are given while a model runs: of each shape the last.

    They are as `real_positions` gives them, but [positions, examples] if such a module has its inputs so. Only the
    outermost ones are looked at: the fast path of those within takes no hooks.
    """
    masks: dict[Shape, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        of, wanted = next(names for kind, names in _TOLD.items() if isinstance(module, kind))
        given = dict(_named(module, (args, kwargs)))
        if isinstance(x := given.get(of), Tensor) and x.ndim == 3 and given.get("key", x) is x:
            masks.pop(tuple(x.shape[:2]), None)
            attention = next((one for one in module.modules() if isinstance(one, nn.MultiheadAttention)), None)
            turned = attention is not None and not attention.batch_first
            masks.update({tuple(x.shape[:2]): one.T if turned else one for one in real_keys(given.get(wanted))})

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in _outermost(model)]
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, tuple(_TOLD)):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def _causal(mask: Tensor) -> bool:
    """Whether each position looks at those up to it, or from it on; or the reverse of that is marked."""
    lower = torch.ones_like(mask).tril()
    return any(torch.equal(mask, one) for half in (lower, ~lower) for one in (half, half.T))


def kept(masks: Sequence[Tensor], shape: Sequence[int], time_first: bool = False) -> Tensor | None:
    """Which samples of an input are no padding, flat; None if no mask, or more than one, is of its shape.

    Args:
        masks: of the batch, from `real_positions`.
        shape: of the samples: [examples, positions, ...] or [examples * positions, ...].
        time_first: whether it is [positions, examples, ...] or the like instead.
    """
    found = []
    for mask in masks:
        turned = mask.T if time_first else mask
        if tuple(shape[:2]) == tuple(turned.shape):
            rest = shape[2:]
        elif len(shape) and shape[0] == mask.numel():
            turned, rest = turned.reshape(-1), shape[1:]
        else:
            continue
        wide = turned.reshape(*turned.shape, *[1] * len(rest)).expand(*turned.shape, *rest)
        found.append(wide.reshape(-1))
    if not found or any(not torch.equal(found[0], other) for other in found[1:]):
        return None
    return found[0]


def _named(model: nn.Module, call: Arguments) -> Iterator[tuple[str, Any]]:
    args, kwargs = call
    try:
        names = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # what it lacks the model itself says better
        names = kwargs
    for name, value in names.items():
        if isinstance(value, dict):  # **kwargs
            yield from value.items()
        else:
            yield name, value
