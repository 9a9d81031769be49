"""Sizes that are read as scales: what that changes is folded into the query.

Attention divides by the root of the size of a head. Where heads get smaller the quotient grows, so the rows that make
the query are multiplied by sqrt(new / old): then the function is the same. The proof judges the result, as all else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.structure.calls import Call
from secateur.structure.capture import Capture
from secateur.structure.cut import named_tensors
from secateur.structure.fields import labels
from secateur.structure.remains import size

_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul")
_SCALERS = ("layer_norm", "rms_norm", "mul", "__mul", "__rmul", "multiply")
_MAKERS = frozenset(["linear", "addmm", "conv1d", "conv2d", *_SCALERS, *_PRODUCTS])
"""Functions whose result is multiplied where all of their parameters are."""


@dataclass(frozen=True)
class Scaled:
    """Positions of a cut tensor along a dimension, which are multiplied by a factor."""

    name: str
    dim: int
    positions: tuple[int, ...]
    factor: float

    def apply(self, tensor: Tensor) -> Tensor:
        """A multiplied copy."""
        at = torch.tensor(self.positions, device=tensor.device)
        factor = torch.ones(tensor.shape[self.dim], dtype=tensor.dtype, device=tensor.device)
        factor[at] = self.factor
        return tensor * factor.reshape([-1 if d == self.dim else 1 for d in range(tensor.ndim)])


@dataclass(frozen=True)
class Fold:
    """What is multiplied so that one call sees no new scale.

    Attributes:
        scaled: the tensors.
        between: the calls in between, which do see it.
        units: fields that may stay instead.
        call: the one call.
    """

    scaled: tuple[Scaled, ...]
    between: frozenset[str]
    units: tuple[Tensor, ...] = ()
    call: str = ""


def rooted(cap: Capture, kept: Tensor, model: nn.Module, small: nn.Module) -> Iterator[Fold]:
    """What is to be folded for attention that divides by the root of the present size of a head itself.

    Args:
        cap: of the small model, before it was cut.
        kept: for each label, whether it stays.
        model: the original.
        small: cut, and its attributes follow.
    """
    done: set[str] = set()
    for call in (c for run in cap.runs for c in run.calls if c.rooted):
        if call.name == "multi_head_attention_forward":
            one = small.get_submodule(call.module)
            if call.module not in done and isinstance(one, nn.MultiheadAttention):
                done.add(call.module)
                old = model.get_submodule(call.module)
                assert isinstance(old, nn.MultiheadAttention)
                if one.head_dim != old.head_dim:
                    scaled = tuple(_projection(call.module, one, (one.head_dim / old.head_dim) ** 0.5))
                    rows = one.in_proj_weight if one._qkv_same_embed_dim else one.q_proj_weight
                    yield Fold(scaled, frozenset(), tuple(f for f in cap.fields(rows) if f.shape[0] > 1))
        elif str(call) not in done:
            new, old_size = size(*call.ins[0], kept)[-1], call.ins[0][0][-1]
            if new != old_size:
                done.add(str(call))
                if (found := fold(cap, kept, call, (new / old_size) ** 0.5)) is not None:
                    yield replace(found, units=tuple(f for f in call.ins[0][1] if f.shape[-1] > 1))


def _projection(path: str, module: nn.MultiheadAttention, factor: float) -> Iterator[Scaled]:
    rows = tuple(range(module.out_proj.weight.shape[1]))
    names = ("in_proj_weight" if module._qkv_same_embed_dim else "q_proj_weight", "in_proj_bias")
    for name in names:
        if getattr(module, name) is not None:
            yield Scaled(f"{path}.{name}".lstrip("."), 0, rows, factor)


def fold(cap: Capture, kept: Tensor, call: Call, factor: float) -> Fold | None:
    """What to multiply by `factor` so that the first operand of a call is multiplied by it.

    Returns None where the factor is no root of how a size changed, or where that operand cannot be multiplied alone:
    a tensor that makes it is read by other calls too, or is added, for example.
    """
    sizes = [call.ins[0]] if call.ins else []
    between: dict[int, Call] = {}
    makers: dict[int, Call] = {}
    reach = [s for s in call.sources[:1] if isinstance(s, Call)]
    if len(call.sources) == 1 and isinstance(call.sources[0], str):  # weight / in_features**0.5
        makers[id(call)] = call
    while reach:
        one = reach.pop()
        if id(one) in between or id(one) in makers:
            continue
        if any(isinstance(s, str) for s in one.sources):
            if any(fields for _, fields in one.outs):
                makers[id(one)] = one
            continue
        between[id(one)] = one
        sources = one.sources
        if one.name in _PRODUCTS:
            sources = one.sources[:1]
            sizes.append(one.ins[0])
        reach += [s for s in sources if isinstance(s, Call)]
    ratios = {n / o for shape, fields in sizes for n, o in zip(size(shape, fields, kept), shape, strict=True)}
    exact = [ratio ** (1 / power) for ratio in ratios for power in (2, 4)]
    exact = [one for one in exact if abs(factor / one - 1) < 3e-4]
    if not exact:
        return None
    factor = exact[0]
    query = {int(n) for _, fields in sizes for f in fields for n in labels(f).ravel()} - {0}
    scaled: dict[str, Scaled] = {}
    for one in makers.values():
        own = [s for s in one.sources if isinstance(s, str)]
        if (one.name not in _MAKERS and one is not call) or any(_reads_elsewhere(cap, one, s) for s in own):
            return None
        scaled |= {s.name: s for s in _rows(kept, one, query, factor)}
    if not scaled:
        return None
    return Fold(tuple(scaled.values()), frozenset(map(str, (*between.values(), *makers.values()))), call=str(call))


def _reads_elsewhere(cap: Capture, call: Call, name: str) -> bool:
    return any(
        name in other.sources and (other.name, other.module) != (call.name, call.module)
        for run in cap.runs
        for other in run.calls
    )


def _rows(kept: Tensor, call: Call, query: set[int], factor: float) -> Iterator[Scaled]:
    """The rows of the tensors of a call that make the query; all of a vector that has no rows of its own."""
    known = [(s, *one) for s, one in zip(call.sources, call.ins, strict=True) if isinstance(s, str)]
    wanted = torch.tensor(sorted(query), dtype=torch.int64)
    found: Tensor | None = None
    for name, shape, fields in sorted(known, key=lambda one: -len(one[1])):  # matrices before their biases
        for f in fields:
            along = [d for d, n in enumerate(f.shape) if n > 1]
            stays = kept[f.long().ravel()]
            at = torch.isin(f.long().ravel(), wanted)
            if len(along) == 1 and bool(at.any()):
                found = at
                yield Scaled(name, along[0], tuple(at[stays].nonzero().flatten().tolist()), factor)
                break
            if len(shape) == 1:
                rows = found if found is not None and len(found) == shape[0] else torch.ones(shape[0], dtype=torch.bool)
                yield Scaled(name, 0, tuple(rows[stays].nonzero().flatten().tolist()), factor)
                break


def apply(model: nn.Module, scaled: Sequence[Scaled]) -> list[tuple[Tensor, Tensor]]:
    """Multiply tensors of a cut model, which stay the same objects. Returns what `undo` needs."""
    named: Mapping[str, Tensor] = named_tensors(model)
    done = []
    for one in scaled:
        t = named[one.name]
        done.append((t, t.data))
        t.data = one.apply(t.data)
    return done
