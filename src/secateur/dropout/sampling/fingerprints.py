"""Keys of models, inputs and outputs: those with equal keys are sampled by the same plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.support.inputs import Arguments


def spec(call: Arguments) -> Any:
    """What a plan depends on of the inputs."""
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x) for x in tree_leaves(call))


def identity(output: Callable[..., Any] | None) -> Any:
    """What tells one `output` from another: a plain lambda by its code, as it is a new one at each call."""
    plain = isinstance(output, FunctionType) and output.__closure__ is None and not output.__defaults__
    return output.__code__ if isinstance(output, FunctionType) and plain else id(output)


_PLAIN = {bool, int, float, str, type(None)}
_OTHERWISE = {"_parameters", "_buffers", "_modules"}  # values do not matter, and modules are met one by one
_DEEP = 4  # settings within settings


def fingerprint(model: nn.Module) -> int:
    """What a plan depends on of a model: modules, hooks, and the plain values that these and their settings hold."""
    found: list[Any] = []
    queue: list[tuple[Any, int]] = [(module, 0) for module in model.modules()]
    seen = {id(module) for module, _ in queue}
    for thing, depth in queue:
        found += id(thing), type(thing)
        for part in _parts(thing):
            if type(part) in _PLAIN:
                found.append(part)
            elif id(part) not in seen and depth < _DEEP and not isinstance(part, (Tensor, type, FunctionType)):
                seen.add(id(part))
                queue.append((part, depth + 1))
    return hash(tuple(found))


def _parts(thing: Any) -> Iterable[Any]:
    if isinstance(thing, nn.Module):
        named = vars(thing).items()  # of which many are dicts of hooks, empty as a rule
        return (
            value for name, value in named if name not in _OTHERWISE and not (isinstance(value, dict) and not value)
        )
    if isinstance(thing, Mapping):
        return thing.values()
    if isinstance(thing, (list, tuple, set)):
        return thing
    return getattr(thing, "__dict__", {}).values()
