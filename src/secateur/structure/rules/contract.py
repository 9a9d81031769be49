"""Products summed over shared letters: linear, matmul, einsum, convolutions; and rows looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.structure.calls import tensors
from secateur.structure.capture import Letter, Site, rule
from secateur.structure.fields import Labelled, labels, lead, squeeze, support
from secateur.structure.rules.norms import with_vectors


def _multiply(site: Site, pairs: Sequence[tuple[Tensor, Sequence[Letter]]], result: Sequence[Letter]) -> None:
    cap = site.capture
    cap.label(site.out, cap.contract([(site.of(t), letters) for t, letters in pairs], result))


def _add_bias(site: Site, bias: Tensor | None, dim: int) -> None:
    if bias is not None and bias.ndim == 1:
        with_vectors(site, (tuple(site.out.shape), site.capture.fields(site.out)), [bias], dim)


@rule("linear")
def linear(site: Site) -> None:
    """Summed over inputs; outputs are the rows of the weight."""
    x, w = site.operand, site.argument(1, "weight")
    batch: list[Letter] = list(range(x.ndim - 1))
    _multiply(site, [(x, [*batch, "i"]), (w, "oi" if w.ndim > 1 else "i")], [*batch, "o"][: site.out.ndim])
    _add_bias(site, site.argument(2, "bias"), -1)


@rule("matmul bmm mm mv spmm __matmul __rmatmul __imatmul")
def matmul(site: Site) -> None:
    """Summed over the shared dimension."""
    a, b = site.operand, site.argument(1, "other", site.kwargs.get("mat2"))
    if site.name == "__rmatmul":
        a, b = b, a
    n = max(a.ndim, b.ndim)
    left = [*range(2 - a.ndim, 0), "m", "k"] if a.ndim > 1 else ["k"]  # batch dimensions count from the right
    right = [*range(2 - b.ndim, 0), "k", "n"] if b.ndim > 1 else ["k"]
    ends = [*(["m"] if a.ndim > 1 else []), *(["n"] if b.ndim > 1 else [])]
    _multiply(site, [(a, left), (b, right)], [*range(2 - n, 0), *ends])


@rule("dot vdot inner")
def inner(site: Site) -> None:
    """Summed over the last dimension of both."""
    a, b = site.operand, site.argument(1, "other")
    left, right = ([f"{side}{d}" for d in range(t.ndim - 1)] for side, t in (("a", a), ("b", b)))
    _multiply(site, [(a, [*left, "k"]), (b, [*right, "k"])], [*left, *right])


@rule("outer ger")
def outer(site: Site) -> None:
    """Each of one vector with each of the other."""
    _multiply(site, [(site.operand, "a"), (site.argument(1, "vec2"), "b")], "ab")


@rule("tensordot")
def tensordot(site: Site) -> None:
    """Summed over the pairs of dimensions that are named."""
    a, b, dims = site.operand, site.argument(1, "other", site.kwargs.get("b")), site.argument(2, "dims", 2)
    if isinstance(dims, int):
        dims = range(a.ndim - dims, a.ndim), range(dims)
    left: list[Letter] = [f"a{d}" for d in range(a.ndim)]
    right: list[Letter] = [f"b{d}" for d in range(b.ndim)]
    for i, j in zip(*dims, strict=True):
        left[i] = right[j] = f"k{i % a.ndim}"
    free = [c for c in (*left, *right) if str(c)[0] != "k"]
    _multiply(site, [(a, left), (b, right)], free)


@rule("bilinear")
def bilinear(site: Site) -> None:
    """Summed over both inputs; outputs are the rows of the weight."""
    x, y, w = (site.argument(i, name) for i, name in enumerate(("input1", "input2", "weight")))
    batch: list[Letter] = list(range(x.ndim - 1))
    _multiply(site, [(x, [*batch, "i"]), (w, "oij"), (y, [*batch, "j"])], [*batch, "o"])
    _add_bias(site, site.argument(3, "bias"), -1)


@rule("cdist pairwise_distance cosine_similarity")
def distance(site: Site) -> None:
    """A sum over the units that stay, of pairs of rows."""
    pair = [site.argument(i, f"x{i + 1}") for i in (0, 1)]
    with site.capture.inside():
        if site.name == "cdist":
            made = torch.matmul(pair[0], pair[1].transpose(-1, -2))
        else:
            dim = site.argument(2, "dim", 1) if site.name == "cosine_similarity" else -1
            made = (pair[0] * pair[1]).sum(dim, site.argument(4, "keepdim", False) is True)
    site.capture.same(site.out, made)


SUMS: dict[str, tuple[str, str, str]] = {
    "addmm": ("mk", "kn", "mn"),
    "baddbmm": ("bmk", "bkn", "bmn"),
    "addbmm": ("bmk", "bkn", "mn"),
    "addmv": ("mk", "k", "m"),
}
"""Products to which something is added: letters of both factors, and of the result."""


@rule(" ".join(SUMS))
def addmm(site: Site) -> None:
    """A matrix product and a sum."""
    cap, (left, right, result) = site.capture, SUMS[site.name]
    a = site.argument(1, "mat1", site.kwargs.get("batch1", site.kwargs.get("mat")))
    b = site.argument(2, "mat2", site.kwargs.get("batch2", site.kwargs.get("vec")))
    product = cap.contract([(site.of(a), left), (site.of(b), right)], result)
    ndim, (shape, fields) = len(result), site.of(site.operand)
    beside = (1,) * (ndim - len(shape)) + shape, [lead(f, ndim) for f in fields]
    cap.label(site.out, cap.join([(tuple(site.out.shape), product), beside]))


@rule("grouped_mm")
def grouped_mm(site: Site) -> None:
    """Rows meet one of the experts' matrices [e, k, n], whose sides are multiples of 16 bytes: experts stay."""
    x, w = site.args[:2]
    if w.ndim != 3:
        raise ValueError("its second operand is no stack of matrices")
    shape, fields = site.of(w)
    for f in fields:
        if len(support(f)) == 1 and support(f) != {0}:
            site.capture.ledger.multiple(labels(f).ravel(), 16 // w.element_size(), str(site.capture.now))
    experts = (1, *shape[1:]), site.rigid(fields, {0})  # each row meets one
    site.capture.label(site.out, site.capture.contract([(site.of(x), "tk"), (experts, "ekn")], "tn"))


@rule("einsum")
def einsum(site: Site) -> None:
    """Summed over the letters that the result lacks."""
    equation, operands = site.args[0].replace(" ", ""), site.args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    left, arrow, right = equation.partition("->")
    if not arrow:
        right = ("..." if "." in left else "") + "".join(sorted(c for c in {*left} - {*",."} if left.count(c) == 1))

    def letters(term: str, ndim: int) -> list[Letter]:
        head, dots, tail = term.partition("...")
        return [*head, *range(-(ndim - len(head) - len(tail)) if dots else 0, 0), *tail]

    pairs = [(t, letters(term, t.ndim)) for t, term in zip(operands, left.split(","), strict=True)]
    if any(len(set(own)) < len(own) for _, own in pairs):
        raise ValueError("a letter stands twice in one operand")
    result, factors = letters(right, site.out.ndim), [(site.of(t), own) for t, own in pairs]
    while len(factors) > 2:  # torch goes through them from the left, two at a time
        two, rest = factors[:2], factors[2:]
        sizes = {c: n for (shape, _), own in two for c, n in zip(own, shape, strict=True)}
        needed = [c for c in sizes if c in result or any(c in own for _, own in rest)]
        factors = [((tuple(sizes[c] for c in needed), site.capture.contract(two, needed)), needed), *rest]
    site.capture.label(site.out, site.capture.contract(factors, result))


def _meets(site: Site, at: int, size: int, kernel: int) -> str:
    """How a kernel meets the places along one dimension: "each" alone, "all" at once, or "" for windows of them."""
    stride, padding = (
        n if isinstance(n, int | str) else n[at % len(n)]
        for n in (site.argument(3, "stride", 1), site.argument(4, "padding", 0))
    )
    if padding in (0, "valid") and kernel == size > 1:
        return "all"
    return "each" if kernel == stride == 1 and padding in (0, "valid", "same") else ""


def _convolution(site: Site, transposed: bool) -> None:
    cap, out = site.capture, site.out
    x, w, groups = site.operand, site.argument(1, "weight"), site.argument(6, "groups", 1)
    k = w.ndim - 2
    with cap.inside():
        x = x if x.ndim == k + 2 else x.unsqueeze(0)
        if groups > 1:
            x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
            w = w.reshape(groups, -1, *w.shape[1:])
    if transposed and groups > 1:  # as elsewhere, inputs of each group go, not whole groups
        own = ((f, {0} if len(support(f)) > 1 else ()) for f in cap.fields(w))
        cap.label(w, [g for f, dims in own if (g := cap.rigid(f, dims)) is not None])
    kinds = [""] * k if transposed else [_meets(site, i, int(x.shape[i - k]), int(w.shape[i - k])) for i in range(k)]

    def whole(t: Tensor) -> Labelled:
        stay = [t.ndim - k + i for i, kind in enumerate(kinds) if not kind]
        return tuple(t.shape), site.rigid(cap.fields(t), stay)

    space: dict[str, list[Letter]] = {c: [f"{c}{i}" for i in range(k)] for c in "xwo"}
    for i, kind in enumerate(kinds):
        if kind:
            space["o" if kind == "each" else "w"][i] = space["x"][i]
    group: list[Letter] = ["g"] if groups > 1 else []
    sides: list[Letter] = ["i", "o"] if transposed else ["o", "i"]
    left: list[Letter] = ["n", *group, "i", *space["x"]]
    sizes, fields = whole(x)
    if not transposed:  # a product is made at each place of the result
        places = [n if kind == "all" else m for n, m, kind in zip(sizes[-k:], out.shape[-k:], kinds, strict=True)]
        sizes = (*sizes[:-k], *places)
    got = cap.contract(
        [((sizes, fields), left), (whole(w), [*group, *sides, *space["w"]])], ["n", *group, "o", *space["o"]]
    )
    if groups > 1:
        each = out.shape[-k - 1] // groups
        flat = [squeeze(f.expand(1, groups, each, *[1] * k).reshape(1, -1, *[1] * k)) for f in got]
        got = [f for f in flat if f is not None]
        for f in got:
            if each > 1:
                cap.balance(f.reshape(groups, -1))
    cap.label(out, got if out.ndim == k + 2 else [f.squeeze(0) for f in got])
    _add_bias(site, site.argument(2, "bias"), -k - 1)


@rule("conv1d conv2d conv3d")
def conv(site: Site) -> None:
    """Summed over inputs; places in space and in the kernel stay."""
    _convolution(site, False)


@rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def conv_transpose(site: Site) -> None:
    """Summed over inputs, which are the rows of the weight; places in space and in the kernel stay."""
    _convolution(site, True)


@rule("embedding embedding_bag")
def embedding(site: Site) -> None:
    """Rows are picked by data, and stay."""
    table: Any = next(t for t in (site.argument(1, "weight"), *tensors(site.args)) if t.is_floating_point())
    left = site.rigid(site.of(table)[1], {0})
    out = tensors(site.out)[0]
    site.capture.label(out, [lead(f.squeeze(0), out.ndim) for f in left])
