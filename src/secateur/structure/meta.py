"""Models on the meta device: their tensors have shapes and no values, which is all that labels need.

What has values stays real until it meets a tensor that has none: masks and lengths that are made of real inputs can
still be looked at, and a tensor that a forward makes on the CPU can meet a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from secateur.structure.calls import in_place, replaced


def empty(model: nn.Module) -> bool:
    """Whether all parameters are on the meta device."""
    found = [p.is_meta for p in model.parameters()]
    return bool(found) and all(found)


def zeros(tree: Any) -> Any:
    """Zeros on the CPU in place of the tensors that have no values."""
    return replaced(tree, lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)


class Mixed(TorchFunctionMode):
    """Calls in which real tensors meet others without values: those run without values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        meta = {t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        name = getattr(func, "__name__", "")
        if True not in meta:  # arange(n, device=weight.device), or lengths.to(weight.device)
            args, kwargs = tree_map(_here, (args, kwargs))
        if len(meta) < 2 or (name == "__getitem__" and args[0].is_meta):  # a real mask says how many it picks
            return func(*args, **kwargs)
        out = func(*tree_map(_away, args), **tree_map(_away, kwargs))  # not all of torch's functions would refuse
        return args[0] if in_place(func) else out  # it stays the same tensor; its values are those before


def _here(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value


def _away(t: Any) -> Any:
    return t.to("meta") if isinstance(t, Tensor) else t
