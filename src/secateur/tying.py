"""Which Parameters are the same numbers: tied, shared, or in one piece of memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice, takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.errors import InputError

Holder = tuple[str, nn.Module, str]
"""A place that holds a Parameter: its full name, the module, and the attribute there."""


def parameter_of(holder: Holder) -> nn.Parameter:
    """The Parameter in a place."""
    parameter = holder[1]._parameters[holder[2]]
    assert parameter is not None
    return parameter


def holders(model: nn.Module) -> list[list[Holder]]:
    """All names of each parameter, in the model's order; one that is tied, shared or in the same memory has several."""
    found: dict[object, list[Holder]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(identity(parameter), []).append((full, module, attribute))
    return list(found.values())


def identity(parameter: Tensor) -> object:
    """Equal for Parameters that are the same numbers: tied, or (also transposed) in the same piece of memory."""
    if not _has_memory(parameter) or not _is_gapless(parameter):
        return id(parameter)
    return parameter.device, parameter.dtype, parameter.data_ptr(), parameter.numel()


def _has_memory(parameter: Tensor) -> bool:
    plain = not is_lazy(parameter) and type(parameter.data) is Tensor and parameter.layout is torch.strided
    return plain and not parameter.is_meta and parameter.numel() > 0


def _is_gapless(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor fill a piece of memory, each once, in whatever order."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1:
            if stride != expected:
                return False
            expected *= length
    return True


class _Span(NamedTuple):
    """From which byte of memory to which a tensor reaches."""

    start: int
    end: int
    name: str
    tensor: Tensor


def refuse_overlaps(held: Sequence[Sequence[Holder]], scope: Collection[str]) -> None:
    """Refuse a tensor in scope that shares some of its numbers with another.

    Args:
        held: all Parameters of the model, from `holders`.
        scope: names of those in scope.

    Raises:
        InputError: two tensors overlap; the message names both.
    """
    spans: dict[torch.device, list[_Span]] = {}
    for (name, *_), parameter in ((places[0], parameter_of(places[0])) for places in held):
        if _has_memory(parameter):
            reach = sum((n - 1) * stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True))
            start = parameter.data_ptr()
            span = _Span(start, start + (reach + 1) * parameter.itemsize, name, parameter)
            spans.setdefault(parameter.device, []).append(span)
    for one, other in chain.from_iterable(map(_crossing, spans.values())):
        if (one.name in scope or other.name in scope) and _share_numbers(one.tensor, other.tensor):
            raise InputError(
                f"{other.name} shares some of its numbers in memory with {one.name}, so their zeros cannot be counted "
                f"apart: give one its own, module.weight = nn.Parameter(module.weight.detach().clone()), or leave "
                f"both out: sc.weights(model, skip=[{one.name!r}, {other.name!r}])"
            )


def _crossing(spans: Sequence[_Span]) -> Iterator[tuple[_Span, _Span]]:
    """Pairs of spans of which the second begins before the first has ended."""
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    for i, one in enumerate(ordered):
        for other in takewhile(lambda other: other.start < one.end, islice(ordered, i + 1, None)):  # noqa: B023
            yield one, other


def _share_numbers(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        return True
    return bool(_used(one).as_strided(other.shape, other.stride(), other.storage_offset()).any())


def holds_twice(tensor: Tensor) -> bool:
    """Whether a tensor holds a number of its memory several times: it was expanded, or its strides overlap."""
    if not _has_memory(tensor) or _is_gapless(tensor):
        return False
    expanded = any(not stride and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return expanded or int(_used(tensor).count_nonzero()) < tensor.numel()


def _used(tensor: Tensor) -> Tensor:
    """Which numbers of its storage a tensor holds, as flat booleans."""
    storage = torch.zeros(tensor.untyped_storage().nbytes() // tensor.itemsize, dtype=torch.bool)
    storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return storage


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under its first name: tied ones, and those in one piece of memory, once."""
    found: dict[object, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(identity(tensor), (name, tensor))
    return dict(found.values())
