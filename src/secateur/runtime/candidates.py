"""Which layers of a model may become sparse, and why others may not; swaps of classes in a whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from secateur import anatomy
from secateur.runtime import (
    attention,
    cells,
    convolutions,
    linears,
    recurrences,
    semi_structured,
    transformer_layers,
    transposed,
)
from secateur.runtime.kernel_plans import LayerPlan
from secateur.runtime.swapping import KINDS, SPARSE_ENOUGH, Sparse, Swapped, swap, zero_share
from secateur.support.tables import percent

__all__: list[str] = []  # reached through secateur.accelerate alone

_ROOMS = (linears, convolutions, transposed, recurrences, cells, attention, semi_structured)  # each registers its own


def survey(model: nn.Module) -> Iterator[LayerPlan]:
    """Each layer with a weight matrix; those without a reason are to be tried."""
    readers = anatomy.readers(model)
    for name, module in model.named_modules():
        layer = anatomy.of(module)
        if layer is None or layer.family == "embedding" or readers[id(module)] is not module:
            continue
        mixin, weights = _mixin(module), matrices(module)
        zeros = zeros_of(weights)
        shape = max((tuple(w.shape) for w in weights), key=math.prod, default=())
        kind = type(module).__name__
        reason = f"no sparse kernel for {kind}" if mixin is None else _obstacle(module, mixin, zeros)
        yield LayerPlan(name, kind, shape, zeros, reason=reason)


def zeros_of(weights: Sequence[Tensor]) -> float:
    """Share of zeros in all of some weights."""
    return sum(zero_share(w) * w.numel() for w in weights) / max(sum(w.numel() for w in weights), 1)


def _mixin(module: nn.Module) -> type[Sparse] | None:
    kind, layer = anatomy.entry(type(module))
    taking = [] if layer is None else [mixin for mixin in KINDS if mixin.takes(kind, layer)]
    devices = {parameter.device.type for parameter in module.parameters()}
    return next((mixin for mixin in taking if mixin.device in devices), next(iter(taking), None))


def _obstacle(module: nn.Module, mixin: type[Sparse], zeros: float) -> str:
    """Why a layer cannot be sparse, or an empty string."""
    if anatomy.has_own_forward(module):
        return "its class has a forward of its own"
    strange = sorted(name for name, _ in module.named_parameters() if not _by_nature(module, name))
    if strange:
        return f"its weights are computed from {strange[0]} (by a parametrization, norm or pruning hook)"
    for name, parameter in module.named_parameters():
        if type(parameter.data) is not Tensor or parameter.layout is not torch.strided:
            return f"{name} is not a plain tensor"
        if not mixin.suits(parameter):
            return f"{name} is {parameter.dtype} on {parameter.device}, and the kernels are for {mixin.serves}"
        if parameter.dim() == 1 and not parameter.is_contiguous():
            return f"{name} is not contiguous"
    return mixin.obstacle(module) or ("" if zeros >= SPARSE_ENOUGH else f"too dense: {percent(zeros)} zeros")


def _by_nature(module: nn.Module, name: str) -> bool:
    """Whether layers of this class have this parameter."""
    place, _, attribute = name.rpartition(".")
    return place in ("", *_inner(module)) and anatomy.rank(attribute) is not None


def _inner(module: nn.Module) -> tuple[str, ...]:
    layer = anatomy.of(module)
    return () if layer is None else layer.inner


def matrices(module: nn.Module) -> list[Tensor]:
    """The weight matrices of a layer."""
    places = ("", *_inner(module), "parametrizations")
    named = ((name.rpartition(".")[0].partition(".")[0], parameter) for name, parameter in module.named_parameters())
    return [parameter for place, parameter in named if place in places and parameter.dim() > 1]


def make_sparse(module: nn.Module, name: str) -> Sparse:
    """Swap the class of a layer that may be sparse; dense for all inputs as yet."""
    mixin = _mixin(module)
    assert mixin is not None
    swap(module, mixin)
    assert isinstance(module, Sparse)
    module.prepare(name)
    return module


def enclose(model: nn.Module) -> None:
    """Swap the transformer layers that contain sparse layers, and no others."""
    for module in model.modules():
        for mixin in transformer_layers.AROUND:
            if isinstance(module, mixin.plain):
                holds = any(isinstance(inner, Sparse) for inner in module.modules())
                if holds and not isinstance(module, Swapped):
                    swap(module, mixin)
                elif not holds and isinstance(module, Swapped):
                    module.restore()
