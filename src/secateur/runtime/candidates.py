"""What in a model may become sparse, and what stands against it; swaps of classes in a whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from secateur.runtime import attention, linears
from secateur.runtime import convolutions as convolutions  # registers its kinds
from secateur.runtime import recurrences as recurrences
from secateur.runtime.kernel_plans import LayerPlan
from secateur.runtime.swapping import KINDS, SPARSE_ENOUGH, Sparse, Swapped, swap, zero_share
from secateur.support.tables import percent

__all__: list[str] = []  # reached through secateur.accelerate alone

_AROUND: dict[type[nn.Module], type[Swapped]] = {
    nn.TransformerEncoderLayer: attention.SparseTransformerEncoderLayer,
    nn.TransformerEncoder: attention.SparseTransformerEncoder,
}
_OTHERS = (
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
)


def survey(model: nn.Module) -> Iterator[LayerPlan]:
    """Each layer with a weight matrix; those without a reason are to be tried."""
    inner = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        mixin = _mixin(module)
        if id(module) in inner or (mixin is None and not isinstance(module, _OTHERS)):
            continue
        weights = matrices(module)
        zeros = zeros_of(weights)
        shape = max((tuple(w.shape) for w in weights), key=math.prod, default=())
        kind = type(module).__name__
        reason = f"no sparse kernel for {kind}" if mixin is None else _obstacle(module, mixin, zeros)
        yield LayerPlan(name, kind, shape, zeros, reason=reason)


def zeros_of(weights: Sequence[Tensor]) -> float:
    """Share of zeros in all of some weights."""
    return sum(zero_share(w) * w.numel() for w in weights) / max(sum(w.numel() for w in weights), 1)


def _mixin(module: nn.Module) -> type[Sparse] | None:
    if linears.is_transposed(type(module)):
        return linears.SparseTransposedLinear
    return next((mixin for plain, mixin in KINDS.items() if isinstance(module, plain)), None)


def _obstacle(module: nn.Module, mixin: type[Sparse], zeros: float) -> str:
    """Why a layer cannot be sparse, or an empty string."""
    if mixin.plain is not nn.Module and type(module).forward is not mixin.plain.forward:
        return "its class has a forward of its own"
    strange = sorted({name for name, _ in module.named_parameters()} - _names(module))
    if strange:
        return f"its weights are computed from {strange[0]} (by a parametrization, norm or pruning hook)"
    for name, parameter in module.named_parameters():
        if type(parameter.data) is not Tensor or parameter.layout is not torch.strided:
            return f"{name} is no plain tensor"
        if parameter.dtype is not torch.float32 or not parameter.is_cpu:
            return f"{name} is {parameter.dtype} on {parameter.device}, and the kernels are for float32 on the CPU"
        if parameter.dim() == 1 and not parameter.is_contiguous():
            return f"{name} is not contiguous"
    return mixin.obstacle(module) or ("" if zeros >= SPARSE_ENOUGH else f"too dense: {percent(zeros)} zeros")


def _names(module: nn.Module) -> set[str]:
    """The parameters that a layer has by nature."""
    if isinstance(module, nn.RNNBase):
        return set(module._flat_weights_names)
    projections = {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
    attention = {*projections, "out_proj.weight", "out_proj.bias", "bias_k", "bias_v"}
    return attention if isinstance(module, nn.MultiheadAttention) else {"weight", "bias"}


def matrices(module: nn.Module) -> list[Tensor]:
    """The weight matrices of a layer."""
    return [parameter for parameter in module.parameters() if parameter.dim() > 1]


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
        for plain, mixin in _AROUND.items():
            if isinstance(module, plain):
                holds = any(isinstance(inner, Sparse) for inner in module.modules())
                if holds and not isinstance(module, Swapped):
                    swap(module, mixin)
                elif not holds and isinstance(module, Swapped):
                    module.restore()
