"""Data movement: the same function runs on the labels. What needs a word more follows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.structure.calls import replaced, tensors
from secateur.structure.capture import Site, rule
from secateur.structure.fields import Shape, blend, labels, lead, measured, squeeze, support
from secateur.structure.meta import zeros
from secateur.structure.units import tally


def dims_of(dim: Any, ndim: int) -> set[int]:
    """The dimensions that a `dim` argument names; all where it is None or empty."""
    if dim is None or dim == ():
        return set(range(ndim))
    return {d % ndim for d in ([dim] if isinstance(dim, int) else dim)}


@rule(
    """permute transpose t T mT H mH movedim moveaxis swapaxes swapdims expand expand_as broadcast_to repeat
    repeat_interleave tile squeeze unsqueeze narrow flip fliplr flipud rot90 pixel_shuffle pixel_unshuffle
    channel_shuffle native_channel_shuffle diagonal tril triu stack hstack vstack dstack
    column_stack atleast_1d atleast_2d atleast_3d meshgrid broadcast_tensors block_diag as_strided""",
    moves=True,
)
def move(site: Site) -> None:
    """Labels move with the data: the same function runs on them."""
    outs: list[list[Tensor]] = [[] for _ in tensors(site.out)]
    operands = list({id(t): t for t in tensors((site.args, site.kwargs))}.values())
    kwargs = {k: 0 if k == "value" else v for k, v in site.kwargs.items()}
    dense = site.name == "as_strided"  # reads by stride, so that a stride of 0 would be taken for data
    for own in operands:
        shape, fields = site.of(own)
        for f in fields:
            ride = f.expand(shape).contiguous() if dense else f.expand(shape)

            def swap(t: Tensor, own: Tensor = own, ride: Tensor = ride) -> Tensor:
                if not measured(t) and t is not own:
                    return t
                return ride if t is own else torch.zeros((), dtype=ride.dtype).expand(site.of(t)[0])

            moved = site.func(*replaced(site.args, swap), **replaced(kwargs, swap))
            for into, r in zip(outs, tensors(moved), strict=True):
                if (g := squeeze(r)) is not None:
                    into.append(g)
    for t, found in zip(tensors(site.out), outs, strict=True):
        site.capture.label(t, blend(found) if len(operands) > 1 else found)


@rule("cat concat concatenate", moves=True)
def cat(site: Site) -> None:
    """Labels lie side by side along the dimension; along the others equal positions are one unit."""
    out = site.out
    dim = site.argument(1, "dim", site.kwargs.get("axis", 0)) % out.ndim
    parts = [site.of(t) for t in site.argument(0, "tensors") if t.ndim == out.ndim and t.numel()]
    if not parts or any(dim in support(f) and len(support(f)) > 1 for _, fields in parts for f in fields):
        move(site)
        return
    beside, start = list[Tensor](), 0
    for shape, fields in parts:
        for f in (f for f in fields if dim in support(f)):
            wide = f.new_zeros([out.shape[d] if d == dim else 1 for d in range(out.ndim)])
            wide.narrow(dim, start, shape[dim]).copy_(f)
            beside.append(wide)
        start += shape[dim]
    rest = [((*shape[:dim], 1, *shape[dim + 1 :]), [f for f in own if dim not in support(f)]) for shape, own in parts]
    site.capture.label(out, [*blend(beside), *site.capture.join(rest)])


@rule("pad", moves=True)
def pad(site: Site) -> None:
    """Padding belongs to no unit along the padded dimension; along the others it goes with the rest."""
    shape, fields = site.of(site.operand)
    pads, how = site.argument(1, "pad"), site.argument(2, "mode", "constant")
    done: list[Tensor] = []
    for f in fields:
        own = [p if len(shape) - 1 - i // 2 in support(f) else 0 for i, p in enumerate(pads)]
        if how == "constant" or not any(own):
            done.append(F.pad(f, own))
        elif (g := squeeze(F.pad(f.expand(shape), pads, how))) is not None:
            done.append(g)
    site.capture.label(site.out, done)


@rule("unfold im2col")
def unfold(site: Site) -> None:
    """[.., channels, height, width] to [.., channels * window, places]: places in space stay."""
    if site.func is torch.Tensor.unfold:
        move(site)
        return
    shape, fields = site.of(site.operand)
    left = site.rigid(fields, {len(shape) - 2, len(shape) - 1})
    window = site.out.shape[-2] // shape[-3]
    site.capture.label(site.out, [f.repeat_interleave(window if f.shape[-3] > 1 else 1, -3).flatten(-2) for f in left])


@rule("view_as_real")
def view_as_real(site: Site) -> None:
    """Both parts of a number are of its unit."""
    site.capture.label(site.out, [f.unsqueeze(-1) for f in site.of(site.operand)[1]])


@rule("view_as_complex")
def view_as_complex(site: Site) -> None:
    """Both parts of a number are of its unit."""
    shape, fields = site.of(site.operand)
    site.capture.label(site.out, [f.squeeze(-1) for f in site.rigid(fields, {len(shape) - 1})])


@rule("fold col2im")
def fold(site: Site) -> None:
    """[.., channels * window, places] to [.., channels, height, width]: windows stay whole."""
    shape, fields = site.of(site.operand)
    done: list[Tensor] = []
    for f in fields:
        wide = f.expand(*f.shape[:-2], shape[-2], f.shape[-1])
        g = squeeze(wide.reshape(*wide.shape[:-2], site.out.shape[-3], -1, wide.shape[-1]))
        done += [] if g is None else site.rigid([g], {g.ndim - 1, g.ndim - 2})
    site.capture.label(site.out, done)


def factors(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of (dimensions of old, dimensions of new) that hold the same numbers in row-major order.

    >>> list(factors((2, 3, 4), (6, 2, 2)))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        ours: list[int] = []
        theirs: list[int] = []
        p = q = 1
        while True:
            if p <= q and i < len(old) and (p < q or not ours):
                ours.append(i)
                p, i = p * old[i], i + 1
            elif j < len(new) and (q < p or not theirs):
                theirs.append(j)
                q, j = q * new[j], j + 1
            else:
                break
        yield ours, theirs


@rule("view reshape view_as reshape_as unsafe_view flatten unflatten ravel", moves=True)
def reshape(site: Site) -> None:
    """Labels keep their order where dimensions merge; where one is split, equally many stay in every part."""
    cap, out = site.capture, site.out
    shape, fields = site.of(site.operand)
    groups = list(factors(shape, tuple(out.shape)))
    ready: list[Tensor] = []
    for f in fields:
        left: Tensor | None = f
        for ours, _ in groups:
            joint = [d for d in ours if left is not None and d in support(left)]
            if left is not None and len(joint) > 1:
                rest = [d for d in range(left.ndim) if d not in joint]
                flat = left.permute(joint + rest).flatten(0, len(joint) - 1).flatten(1)[:, 0]
                if not bool((flat.diff() >= 0).all()):
                    left = cap.rigid(left, set(joint) - {max(joint, key=f.shape.__getitem__)})
        if left is not None and (g := squeeze(left.expand(shape).reshape(out.shape))) is not None:
            ready.append(g)
    cap.label(out, ready)
    for f in cap.fields(out):
        for _, theirs in groups:
            split = [d for d in theirs if d in support(f)]
            for k in range(1, len(split)):
                rest = [d for d in range(f.ndim) if d not in split[:k]]
                parts = math.prod(f.shape[d] for d in split[:k])
                cap.balance(f.permute(split[:k] + rest).reshape(parts, -1))


@rule("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit", moves=True)
def split(site: Site) -> None:
    """Labels move with the data; where all parts are as large, equally many stay in each."""
    move(site)
    out = site.out
    shape, fields = site.of(site.operand)
    dim = next((d for d in range(len(shape)) if len(out) and out[0].shape[d] != shape[d]), None)
    if dim is not None and len({t.shape[dim] for t in out}) == 1:
        for f in fields:
            if dim in support(f):
                site.capture.balance(torch.stack([g.flatten() for g in f.chunk(len(out), dim)]))


@rule("unbind select __iter", moves=True)
def unbind(site: Site) -> None:
    """Positions that are picked one by one stay."""
    shape, fields = site.of(site.operand)
    dim = site.argument(1, "dim", 0) % len(shape)
    left = [f for f in fields if support(f) != {dim} or site.capture.rigid(f, {dim}) is not None]
    site.before[id(site.operand)] = shape, left
    move(site)


def _index_dims(shape: Shape, index: Sequence[Any]) -> tuple[set[int], set[int], set[int]]:
    """Dimensions that an index picks from by int, by slice, and by tensor."""

    def width(i: Any) -> int:
        if i is None or i is Ellipsis or isinstance(i, bool):
            return 0
        return i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1

    ints: set[int] = set()
    slices: set[int] = set()
    data: set[int] = set()
    d = 0
    for i in index:
        if i is Ellipsis:
            d += len(shape) - sum(map(width, index))
        elif isinstance(i, slice):
            if len(range(*i.indices(shape[d]))) != shape[d]:
                slices.add(d)
        elif width(i):
            (ints if isinstance(i, int) else data).update(range(d, d + width(i)))
        d += width(i)
    return ints, slices, data


def _strides_meet(site: Site, f: Tensor, index: Sequence[Any]) -> None:
    """Every k-th position stays every k-th where k neighbours stay or go together."""
    if any(i is None or isinstance(i, Tensor) for i in index):
        return
    at = next((k for k, i in enumerate(index) if i is Ellipsis), len(index))
    for d, i in [*enumerate(index[:at]), *enumerate(index[at + 1 :], f.ndim - len(index) + at + 1)]:
        step = i.step or 1 if isinstance(i, slice) else 1
        if step > 1 and d in support(f):
            if f.shape[d] % step:
                site.capture.hold(f)
            else:
                g = f.reshape(*f.shape[:d], -1, step, *f.shape[d + 1 :])
                site.capture.unite(g.narrow(d + 1, 0, 1).expand_as(g), g)


def _at_ends(shape: Shape, index: Any) -> bool:
    """Whether an index picks positions by int at the ends of dimensions only."""
    d, picks = 0, index if isinstance(index, tuple) else (index,)
    for i in picks:
        if i is Ellipsis:
            d += len(shape) - sum(j is not None and j is not Ellipsis for j in picks)
        elif i is not None:
            if isinstance(i, int) and i % shape[d] not in (0, shape[d] - 1):
                return False
            d += 1
    return not any(isinstance(i, Tensor | bool) for i in picks)


def _sliced(index: Any) -> Any:
    """An index with a slice for a list of one int, which picks the same: x[..., [-1], :] is x[..., -1:, :]."""
    picks = index if isinstance(index, tuple) else (index,)
    by_data = [i for i in picks if not isinstance(i, slice) and i is not None and i is not Ellipsis]
    if len(by_data) != 1 or not isinstance(by_data[0], list) or [type(n) for n in by_data[0]] != [int]:
        return index
    return tuple(slice(i[0], i[0] + 1 or None) if isinstance(i, list) else i for i in picks)


def _indexed(site: Site, x: Tensor, index: Any) -> list[Tensor]:
    """The fields of x[index]."""
    cap, index = site.capture, _sliced(zeros(index))
    shape, fields = site.of(x)
    ints, slices, data = _index_dims(shape, list(index) if isinstance(index, tuple) else [index])
    out: list[Tensor] = []
    for f in site.rigid(fields, data):
        if support(f) <= ints:
            ends = f.expand(shape)[index] if _at_ends(shape, index) else f  # the first and the last stay there
            cap.hold(ends)
            continue
        _strides_meet(site, f, index if isinstance(index, tuple) else (index,))
        r = f.expand(shape)[index]
        if slices & support(f):
            every, taken = (tally(labels(g))[0] for g in (f, r))
            rest = every[~np.isin(every, taken, assume_unique=True)]
            if len(taken) == len(rest):
                cap.ledger.balance(np.stack([taken, rest]), str(cap.now))
        if (g := squeeze(r)) is not None:
            out.append(g)
    return out


@rule("__getitem", moves=True)
def getitem(site: Site) -> None:
    """Labels move with the data; positions picked by an int or by data stay."""
    site.capture.label(site.out, _indexed(site, site.args[0], site.args[1]))


@rule("__setitem", moves=True)
def setitem(site: Site) -> None:
    """What is written and where it is written to are the same units."""
    x, index, value = site.args[:3]
    if isinstance(value, Tensor):
        site.capture.make_elastic(x, False)
        part = x[index]
        shape, fields = site.of(value)
        there = _indexed(site, x, index)
        wide = (1,) * (part.ndim - len(shape)) + shape
        site.capture.join([(tuple(part.shape), there), (wide, [lead(f, part.ndim) for f in fields])])


@rule("index_select gather take_along_dim index_fill")
def by_index(site: Site) -> None:
    """Positions picked by data stay."""
    shape, fields = site.of(site.operand)
    site.capture.label(site.out, site.rigid(fields, dims_of(site.argument(1, "dim", 0), len(shape))))


@rule("scatter scatter_add scatter_reduce index_add index_copy index_reduce")
def into_index(site: Site) -> None:
    """Positions picked by data stay; along the other dimensions what is written goes with where it is written to."""
    shape, fields = site.of(site.operand)
    dims = dims_of(site.argument(1, "dim", 0), len(shape))
    operands = [(shape, site.rigid(fields, dims))]
    source = site.argument(3, "source", site.kwargs.get("src"))
    if isinstance(source, Tensor):
        size, written = site.of(source)
        written = site.rigid(written, dims | {d for d in range(len(size)) if size[d] != shape[d] != 1})
        operands.append((tuple(1 if d in dims else n for d, n in enumerate(size)), written))
    site.capture.label(site.out, site.capture.join(operands))


@rule("pack_padded_sequence pad_packed_sequence")
def packed(site: Site) -> None:
    """[batch, time, features] to and from [steps, features]: features keep their labels."""
    out = tensors(site.out)[0]
    ndim = 2 if "pack_padded" in site.name else 1
    left = site.rigid(site.of(tensors(site.args)[0])[1], range(ndim))
    site.capture.label(out, [g.reshape((1,) * (3 - ndim) + tuple(g.shape[ndim:])) for g in left])
