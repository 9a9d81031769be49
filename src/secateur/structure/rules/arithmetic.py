"""Arithmetic element by element, and functions along dimensions."""

from __future__ import annotations

import torch

from secateur.structure.calls import tensors
from secateur.structure.capture import RULES, Site, rule
from secateur.structure.fields import lead, measured, support
from secateur.structure.rules.move import dims_of

_FROM_TORCH = {
    name.strip("_")
    for name in dir(torch.ops.aten)
    if hasattr(packet := getattr(torch.ops.aten, name), "overloads")
    and any(torch.Tag.pointwise in getattr(packet, one).tags for one in packet.overloads())
}
_SIGNS = "add sub mul div truediv floordiv mod pow and or xor eq ne lt le gt ge"
_OPERATORS = {f"__{side}{name}" for side in ("", "i", "r") for name in _SIGNS.split()}
_FURTHER = """__neg __invert __abs absolute alpha_dropout bernoulli clip complex conj copy data.set div divide dropout
dropout1d dropout2d dropout3d fake_quantize feature_alpha_dropout feature_dropout fill floor_divide
greater greater_equal hardswish imag less less_equal logsigmoid masked_fill multiply negative not_equal
polar real resolve_conj rrelu softsign subtract tanhshrink weight_norm where zero"""


@rule(
    """to float double half bfloat16 type type_as int long bool cpu cuda contiguous clone detach data requires_grad
    alias zeros_like ones_like empty_like full_like rand_like randn_like""",
    moves=True,
)
def like(site: Site) -> None:
    """The same positions: other operands give a type or a device only."""
    site.capture.label(site.out, site.of(site.operand)[1])


@rule(
    "roll cumsum cumprod softmax log_softmax softmin sort argsort topk kthvalue median mode cummax cummin logcumsumexp"
)
def along(site: Site) -> None:
    """Positions along the dimension stay."""
    cap, shape = site.capture, site.of(site.operand)[0]
    fields = site.of(site.operand)[1]
    at = 2 if site.name in ("topk", "kthvalue", "roll") else 1
    dims = dims_of(site.argument(at, "dims" if site.name == "roll" else "dim", -1), len(shape))
    if "softmax" in site.name and any(support(f) & dims for f in fields):
        cap.consulted.add("cut_softmax")
    left = over_kept(site, dims) if cap.policy.cut_softmax and "softmax" in site.name else site.rigid(fields, dims)
    for t in tensors(site.out):
        cap.label(t, left)


def over_kept(site: Site, dims: set[int]) -> list[torch.Tensor]:
    """The operand's fields where a statistic over dims runs over the units that stay."""
    left = []
    for f in site.of(site.operand)[1]:
        left += site.rigid([f], support(f) - dims) if support(f) & dims else [f]
    return left


@rule(
    """fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
    fft_rfftn fft_irfftn fft_fftshift fft_ifftshift"""
)
def spectrum(site: Site) -> None:
    """Positions along the dimensions that are transformed stay."""
    shape, fields = site.of(site.operand)
    usual = (-2, -1) if site.name.endswith("2") else None if site.name.endswith(("n", "shift")) else -1
    dims = dims_of(site.argument(1 if "shift" in site.name else 2, "dim", usual), len(shape))
    site.capture.label(site.out, site.rigid(fields, dims))


@rule("mean sum nansum var std norm vector_norm linalg_vector_norm count_nonzero prod")
def reduction(site: Site) -> None:
    """A statistic over the units that stay."""
    shape, fields = site.of(site.operand)
    at = 2 if "norm" in site.name else 1
    dims = dims_of(site.argument(at, "dim", site.kwargs.get("axis")), len(shape))
    left = site.capture.reduce(fields, dims)
    if not site.argument(at + 1, "keepdim", False):
        keep = [d for d in range(len(shape)) if d not in dims]
        left = [f.permute(keep + sorted(dims)).reshape([f.shape[d] for d in keep]) for f in left]
    for t in tensors(site.out):
        site.capture.label(t, left)


@rule("amax amin argmax argmin logsumexp all any aminmax var_mean std_mean")
def extreme(site: Site) -> None:
    """A reduction from which no unit may be missing."""
    shape, fields = site.of(site.operand)
    dims = dims_of(site.argument(1, "dim"), len(shape))
    site.before[id(site.operand)] = shape, site.rigid(fields, dims)
    reduction(site)


def pointwise(site: Site) -> None:
    """Units at equal positions stay or go together."""
    operands = tensors((site.args, site.kwargs))
    if site.name in ("max", "min") and (len(operands) < 2 or not isinstance(site.out, torch.Tensor)):
        extreme(site)
        return
    out = tensors(site.out)[0]
    spread = []
    for t in operands:
        shape, fields = site.of(t)
        spread.append(((1,) * (out.ndim - len(shape)) + shape, [lead(f, out.ndim) for f in fields]))
    site.capture.label(out, site.capture.join(spread))


@rule("zeros ones empty full new_zeros new_ones new_empty new_full", always=True)
def factory(site: Site) -> None:
    """Every position is alike: the tensor may be made smaller."""
    site.capture.label(site.out, site.capture.fresh(site.out) if measured(site.out) else [])
    site.capture.make_elastic(site.out)


rule(" ".join(sorted((_FROM_TORCH | _OPERATORS | set(_FURTHER.split())) - set(RULES))))(pointwise)
