"""What to prune, by which score, how much of it where: everything but when. Turns a model into masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from secateur import allocation as allocations
from secateur import patterns, scores, selection
from secateur.allocation import Allocation
from secateur.errors import InputError, InputTypeError, warn
from secateur.masks import Masks
from secateur.patterns import Pattern
from secateur.scope import Member, Scope, unwrap, weights
from secateur.scores import Score
from secateur.selection import Stream
from secateur.sparsity import Count, Sparsity, explicit, fraction, half_up
from secateur.support import bits


@dataclass(frozen=True)
class Share:
    """Tensors that share one budget: `half_up(sparsity * size)` of their weights go."""

    names: tuple[str, ...]
    sparsity: Fraction
    size: Fraction

    def count(self, sparsity: Fraction) -> int:
        """Weights to prune at a sparsity (on the way to the final one)."""
        return half_up(sparsity * self.size)


@dataclass(frozen=True)
class Plan:
    """The choices of one pruning, checked against the model."""

    scope: Scope
    shares: tuple[Share, ...]
    score: Score
    allocation: Allocation
    pattern: Pattern | None

    def counts(self, at: Callable[[Fraction], Fraction] = lambda final: final) -> tuple[int, ...]:
        """Weights to prune in each share; `at` says how far on the way to the final sparsity."""
        return tuple(share.count(at(share.sparsity)) for share in self.shares)

    def settings(self) -> dict[str, Any]:
        """What two plans must have in common to go on with each other, as plain data (dicts, lists, numbers, words).

        Two functions of a user are the same if their names are: what they compute is not compared.
        """
        return {
            "sparsity": {name: float(share.sparsity) for share in self.shares for name in share.names},
            "weights": float(sum(share.size for share in self.shares)),
            "score": _name(self.score),
            "allocation": {**vars(self.allocation), "share": _name(self.allocation.share)},
            "pattern": str(self.pattern),
        }

    def masks(self, counts: Sequence[int], held: Masks | None = None) -> Masks:
        """Choose the weights to prune; those that `held` prunes stay pruned. The model is only read.

        Raises:
            InputError: NaN or inf in a weight, a score that cannot rank, a budget that cannot be met.
        """
        names = [name for share in self.shares for name in share.names]
        global_magnitude = self.score is scores.magnitude and self.pattern is None and self.allocation.share is None
        if not global_magnitude:  # whose selection looks for NaN and inf as it goes, and so spares a pass
            for name in names:
                selection.require_finite(name, self.scope[name])
        prepare = getattr(self.score, "prepare", None)
        if prepare is not None:
            prepare()
        kept: dict[str, Tensor] = {}
        for share, count in zip(self.shares, counts, strict=True):
            members = {name: self.scope.members[name] for name in share.names}
            streams = [self._stream(member, held) for member in members.values()]
            kept.update(self._split(streams, count, held))
        found = {name: self._expand(self.scope.members[name], kept[name]) for name in names}
        masks = Masks.from_bits(found, {name: self.scope[name].shape for name in names})
        masks = masks if held is None else masks & held
        if not self.allocation.allow_empty:
            warn_of_collapse(masks.counts(), {name: masks.shape(name).numel() for name in masks})
        return masks

    def _stream(self, member: Member, held: Masks | None) -> Stream:
        name, weight = member.name, member.parameter.detach()
        packed = held.packed(name).to(weight.device) if held is not None and name in held else None
        if self.pattern is None and getattr(self.score, "elementwise", False):
            return Stream(name, weight, self.score, packed, member.protected)
        values = selection.zeros_first(scores.evaluate(self.score, name, weight), weight)
        if self.pattern is None:
            return Stream(name, values, None, packed, member.protected)
        values = values.float() if values.itemsize < 4 else values
        if packed is not None:
            values.masked_fill_(~bits.unpack(packed, values.numel()).view(values.shape), -math.inf)
        if member.padding_row is not None:
            values[member.padding_row] = math.inf
        group = self.pattern.group(weight.shape)
        return Stream(name, self.pattern.reduce(values, member.input_dim), group=group)

    def _expand(self, member: Member, kept: Tensor) -> Tensor:
        if self.pattern is None:
            return kept
        shape = member.parameter.shape
        groups = bits.unpack(kept, len(kept) * 8)
        flat = groups[: self.pattern.reduce(torch.empty(shape, device="meta"), member.input_dim).numel()]
        return bits.pack(self.pattern.expand(flat, shape, member.input_dim))

    def _split(self, streams: list[Stream], count: int, held: Masks | None) -> dict[str, Tensor]:
        """Share `count` among the streams; give each one's kept bits."""
        free = {s.name: self.scope.members[s.name].free for s in streams}
        most = {s.name: self._most(self.scope.members[s.name]) // s.group * s.group for s in streams}
        if count > sum(most.values()):
            spared = f"each tensor keeps {self.allocation.min_keep} at least"
            spared += ", and the pattern spares some" if self.pattern is not None else ""
            raise InputError(
                f"{count:,} of {sum(free.values()):,} weights cannot go: {spared}, leaving {sum(most.values()):,}; "
                "ask for less, or insist with allocation=sc.allocation.global_(allow_empty=True)"
            )
        if self.allocation.share is None or len(streams) == 1:
            return selection.together(streams, count, most, selection.keep_all)
        least = held.counts() if held is not None else {}
        bounds = {name: (least.get(name, 0), most[name]) for name in free}
        counts = allocations.shared(self.allocation, {s.name: self._weights(s.name) for s in streams}, bounds, count)
        return {s.name: selection.keep(s, selection.threshold([s], counts[s.name]))[0] for s in streams}

    def _most(self, member: Member) -> int:
        most = self.allocation.most(member.free)
        return most if self.pattern is None else min(most, _legal(member, self.pattern))

    def _weights(self, name: str) -> Tensor:
        """The weights of a tensor that count: all but a padding row."""
        weight, row = self.scope[name].detach(), self.scope.members[name].padding_row
        return weight if row is None else torch.cat([weight[:row], weight[row + 1 :]])


def make(
    model: nn.Module,
    sparsity: Sparsity,
    *,
    score: str | Score | Mapping[str, Tensor],
    allocation: str | Allocation | Callable[[Mapping[str, Tensor], int], Mapping[str, int]],
    pattern: str | Pattern | None,
    scope: Mapping[str, nn.Parameter] | None,
) -> Plan:
    """Check what a user asks for against the model, and write it down; nothing is changed.

    Raises:
        InputError, InputTypeError, UnknownNameError, PatternError: as `prune` says.
    """
    chosen = _scope(model, scope)
    shape = patterns.resolve(pattern)
    if shape is not None:
        for member in chosen.members.values():
            shape.check(member.name, member.parameter.shape, member.input_dim)
    shared = allocations.resolve(allocation)
    if isinstance(sparsity, Mapping):
        wanted = explicit(sparsity, list(chosen))
        shares = [_share(chosen, (name,), value, shape) for name, value in wanted.items()]
    elif isinstance(sparsity, Count):
        if sparsity.weights > chosen.size:
            raise InputError(f"Count({sparsity.weights:,}) is more than the {chosen.size:,} weights in scope")
        shares = [_share(chosen, tuple(chosen), Fraction(sparsity.weights, chosen.size), shape)]
    else:
        shares = [_share(chosen, tuple(chosen), fraction(sparsity), shape)]
    return Plan(chosen, tuple(shares), scores.resolve(score), shared, shape)


def _scope(model: nn.Module, scope: Mapping[str, nn.Parameter] | None) -> Scope:
    if scope is None:
        return weights(model)
    if not isinstance(scope, Mapping):
        raise InputTypeError(f"scope is a {type(scope).__name__}: give sc.weights(model, only=..., skip=...)")
    if not isinstance(scope, Scope):
        return weights(model, only=list(scope))
    own = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for name, parameter in scope.items():
        if own.get(name) is not parameter:
            raise InputError(f"the scope is of another model: {name} is not this model's; call sc.weights(model) anew")
    return scope


def _share(scope: Scope, names: tuple[str, ...], sparsity: Fraction, pattern: Pattern | None) -> Share:
    members = [scope.members[name] for name in names]
    size = Fraction(sum(member.free for member in members))
    if pattern is None or (fixed := pattern.sparsity) is None:
        return Share(names, sparsity, size)
    if abs(sparsity - fixed) > Fraction(1, 1000):
        raise InputError(f"the pattern {pattern} makes a sparsity of {float(fixed):g}; asked was {float(sparsity):g}")
    return Share(names, sparsity, sum(_legal(member, pattern) for member in members) / sparsity)


def _legal(member: Member, pattern: Pattern) -> int:
    rows, *rest = member.parameter.shape
    return pattern.legal((rows - (member.padding_row is not None), *rest), member.input_dim)


def _name(choice: object) -> str:
    return str(getattr(choice, "__qualname__", None) or getattr(choice, "__name__", type(choice).__name__))


def warn_of_collapse(pruned: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Warn of tensors that lose far more of their weights than the others do."""
    density = 1 - sum(pruned.values()) / max(sum(sizes.values()), 1)
    for name, size in sizes.items():
        kept = size - pruned[name]
        if kept < 0.01 * size and kept < 0.1 * density * size:
            warn(
                f"{name} keeps under 1 % of its weights while the others keep more than ten times as many: it may no "
                "longer let anything through; raise its share with allocation='erk' or min_keep=0.01"
            )
