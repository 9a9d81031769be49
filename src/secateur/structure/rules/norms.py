"""Normalisation, pooling and resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from secateur.structure.calls import tensors
from secateur.structure.capture import Site, rule
from secateur.structure.fields import Labelled, lead, support
from secateur.structure.rules.arithmetic import over_kept
from secateur.structure.rules.move import dims_of


def with_vectors(site: Site, x: Labelled, vectors: Sequence[Any], dim: int) -> None:
    """Label the result of x and vectors that meet it along one dimension."""
    shape, fields = x
    dim %= len(shape)
    sizes = [-1 if d == dim else 1 for d in range(len(shape))]
    operands = [(shape, fields)]
    for v in vectors:
        if isinstance(v, Tensor) and v.ndim == 1:
            wide = tuple(v.shape[0] if n == -1 else 1 for n in sizes)
            operands.append((wide, [f.reshape(sizes) for f in site.capture.fields(v)]))
    site.capture.label(tensors(site.out)[0], site.capture.join(operands))


@rule("batch_norm native_batch_norm instance_norm")
def batch_norm(site: Site) -> None:
    """Statistics of each channel; its parameters are of the same unit."""
    names = enumerate(("running_mean", "running_var", "weight", "bias"), 1)
    with_vectors(site, site.of(site.operand), [site.argument(i, name) for i, name in names], 1)


@rule("layer_norm rms_norm")
def layer_norm(site: Site) -> None:
    """Statistics over the units that stay; parameters are of the same unit."""
    shape, _ = site.of(site.operand)
    own = set(range(len(shape) - len(site.argument(1, "normalized_shape")), len(shape)))
    operands = [(shape, over_kept(site, own))]
    bias = site.argument(3, "bias") if site.name == "layer_norm" else None
    for p in (site.argument(2, "weight"), bias):
        if p is not None:
            wide = (1,) * (len(shape) - p.ndim) + tuple(p.shape)
            operands.append((wide, [lead(f, len(shape)) for f in site.of(p)[1]]))
    site.capture.label(site.out, site.capture.join(operands))


@rule("group_norm")
def group_norm(site: Site) -> None:
    """Statistics of a group need the same members in every group, unless each channel is a group."""
    groups = site.argument(1, "num_groups")
    shape, fields = site.of(site.operand)
    if 1 < groups < shape[1]:
        fields = [_alike_in_parts(site, f, 1, groups) for f in fields]
    with_vectors(site, (shape, fields), [site.argument(2, "weight"), site.argument(3, "bias")], 1)


def _alike_in_parts(site: Site, f: Tensor, dim: int, parts: int) -> Tensor:
    """Unite equal places of the equal parts of one dimension."""
    if dim not in support(f):
        return f
    g = f.reshape(*f.shape[:dim], parts, -1, *f.shape[dim + 1 :])
    first = g.narrow(dim, 0, 1).expand_as(g)
    site.capture.unite(first, g)
    return first.flatten(dim, dim + 1).clone()


@rule("normalize")
def normalize(site: Site) -> None:
    """A length over the units that stay."""
    dims = dims_of(site.argument(2, "dim", 1), len(site.of(site.operand)[0]))
    site.capture.label(site.out, over_kept(site, dims))


@rule("prelu")
def prelu(site: Site) -> None:
    """A slope for each channel is of the channel's unit."""
    w = site.argument(1, "weight")
    with_vectors(site, site.of(site.operand), [w] if w.numel() > 1 else [], 1 if site.operand.ndim > 1 else 0)


_POOLS = " ".join(
    f"{kind}{pool}_pool{k}d{suffix}"
    for k in (1, 2, 3)
    for kind in ("", "adaptive_")
    for pool in ("avg", "max")
    for suffix in ("", "_with_indices")
)


@rule(f"{_POOLS} lp_pool1d lp_pool2d lp_pool3d fractional_max_pool2d fractional_max_pool3d")
def pool(site: Site) -> None:
    """Places in space stay."""
    ndim = len(site.of(site.operand)[0])
    space = next(k for k in (1, 2, 3) if f"pool{k}d" in site.name)
    left = site.rigid(site.of(site.operand)[1], range(ndim - space, ndim))
    for t in tensors(site.out):
        site.capture.label(t, left)


@rule("interpolate upsample upsample_nearest upsample_bilinear grid_sample")
def resample(site: Site) -> None:
    """Places in space stay."""
    shape, fields = site.of(site.operand)
    site.capture.label(site.out, site.rigid(fields, range(2, len(shape))))
