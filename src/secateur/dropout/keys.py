"""What tells one model, one input and one output from another, as far as a plan for samples depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.costs import Call as Arguments


def spec(call: Arguments) -> Any:
    """What a plan depends on of the inputs."""
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x) for x in tree_leaves(call))


def identity(output: Callable[..., Any] | None) -> Any:
    """What tells one `output` from another: a plain lambda by its code, as it is a new one at each call."""
    plain = isinstance(output, FunctionType) and output.__closure__ is None and not output.__defaults__
    return output.__code__ if isinstance(output, FunctionType) and plain else id(output)


_PLAIN = bool, int, float, str, type(None)
_DEEP = 4  # settings within settings


def fingerprint(model: nn.Module) -> int:
    """What a plan depends on of a model: modules, hooks, and the plain values that these and their settings hold."""
    seen: set[int] = set()
    found: list[Any] = []
    queue: list[tuple[Any, int]] = [(module, 0) for module in model.modules()]
    for thing, depth in queue:
        if isinstance(thing, _PLAIN):
            found.append(thing)
            continue
        if id(thing) in seen or depth > _DEEP or isinstance(thing, (Tensor, type, FunctionType)):
            continue
        seen.add(id(thing))
        found.append((id(thing), type(thing)))
        if isinstance(thing, Mapping):
            parts = list(thing.values())
        elif isinstance(thing, (list, tuple, set)):
            parts = list(thing)
        else:
            parts = list(getattr(thing, "__dict__", {}).values())
        queue += [(part, depth + 1) for part in parts if not isinstance(part, nn.Module)]
    return hash(tuple(found))
