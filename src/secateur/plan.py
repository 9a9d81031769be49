"""Which weights to prune, by which score, and how many in each tensor: from a model to masks.

`budget` says how many weights go in each tensor, and `choose` which. Both work on names, numbers and streams of scores,
so that a model and a checkpoint that is larger than memory go the same way (`storage.pruning`).
"""

from __future__ import annotations

import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur import allocation as allocations
from secateur import patterns, scores, selection, sharding, streams
from secateur import scope as scopes
from secateur.allocation import Allocation
from secateur.errors import InputError, MaskError, listed, warn
from secateur.masks import Masks, as_masks
from secateur.patterns import Pattern, Picked
from secateur.scope import Member, Scope
from secateur.scores import Score
from secateur.selection import Cut
from secateur.sharding import Place, Spread
from secateur.sheets import Picks, Sheet, picked_scope, picked_sizes, sheets_of
from secateur.sparsity import Count, Sparsity, explicit, fraction, half_up
from secateur.streams import Stream
from secateur.support import bits
from secateur.support.process_groups import ALONE, Processes, together

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Share:
    """Tensors that share one sparsity: `half_up(sparsity * size)` of their weights go."""

    names: tuple[str, ...]
    sparsity: Fraction
    size: Fraction

    def count(self, sparsity: Fraction) -> int:
        """Weights to prune at a sparsity (on the way to the final one)."""
        return half_up(sparsity * self.size)


@dataclass(frozen=True)
class Budget:
    """Tensors that are ranked together, and how many of their weights go.

    Attributes:
        count: weights to prune in all.
        told: the count that a pattern is given for each tensor: of a single one its count, of several the even share,
            rounded up.
    """

    count: int
    told: Mapping[str, int]


def shares(
    sparsity: Sparsity,
    sizes: Mapping[str, int],
    pattern: Pattern | None,
    legal: Callable[[Sequence[str]], int],
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Share, ...]:
    """Read what a user asks for, as shares.

    Args:
        sparsity: a fraction, a `Count`, or `{glob: fraction}`: then each tensor has its own share.
        sizes: weights that may be pruned, tensor by tensor.
        pattern: None is free.
        legal: the most weights of some tensors that may go under the pattern.
        aliases: other names of a tied tensor, by which `{glob: fraction}` may name it.

    Raises:
        InputError, InputTypeError: no sparsity, or none that the pattern allows. UnknownNameError: an unknown glob.
    """
    size, every = sum(sizes.values()), tuple(sizes)
    wanted: dict[tuple[str, ...], Fraction]
    if isinstance(sparsity, Mapping):
        wanted = {(name,): value for name, value in explicit(sparsity, every, aliases).items()}
    elif isinstance(sparsity, Count):
        if sparsity.weights > size:
            raise InputError(
                f"Count({sparsity.weights:,}) is more than the {size:,} weights in scope: ask for fewer, or widen "
                "the scope"
            )
        wanted = {every: Fraction(sparsity.weights, size)}
    else:
        wanted = {every: fraction(sparsity)}
    fixed = pattern.sparsity if pattern is not None else None
    found = []
    for names, value in wanted.items():
        if fixed is None:
            found.append(Share(names, value, Fraction(sum(sizes[name] for name in names))))
        elif abs(value - fixed) > Fraction(1, 1000):
            raise InputError(
                f"the pattern {pattern} always gives a sparsity of {float(fixed):g}, not {float(value):g}: "
                f"ask for {float(fixed):g}, or choose another pattern"
            )
        else:
            found.append(Share(names, value, legal(names) / value))
    return tuple(found)


def budget(
    bounds: Mapping[str, tuple[int, int]],
    count: int,
    allocation: Allocation,
    weights: Callable[[str], Tensor],
    *,
    pattern: Pattern | None = None,
) -> list[Budget]:
    """Say how many weights go in each tensor, or in all of them where the scores are to say that.

    Args:
        bounds: for each tensor the least that it loses (it is pruned already) and the most that it may.
        count: weights to prune in all.
        allocation: how to share them.
        weights: a tensor by its name; an allocation by shapes takes anything that has one.
        pattern: for the message only.

    Raises:
        InputError: `count` cannot be met; an allocation whose numbers mean nothing.
    """
    most = {name: most for name, (_, most) in bounds.items()}
    possible = sum(most.values())
    _require_possible(possible, count, allocation, pattern)
    if allocation.share is None or len(bounds) == 1:
        return [Budget(count, {name: -(-count * n // max(possible, 1)) for name, n in most.items()})]
    counts = allocations.shared(allocation, {name: weights(name) for name in bounds}, bounds, count)
    return [Budget(n, {name: n}) for name, n in counts.items()]


def _require_possible(possible: int, count: int, allocation: Allocation, pattern: Pattern | None) -> None:
    if count > possible:
        spared = f"each tensor keeps at least {allocation.min_keep}"
        spared += ", and the pattern keeps some" if pattern is not None else ""
        raise InputError(
            f"{count:,} weights cannot be pruned: {spared}, so that at most {possible:,} can; ask for less",
            in_python=", or allow empty tensors with allocation=sc.allocation.global_(allow_empty=True)",
        )


def choose(
    budgets: Sequence[Budget],
    stream: Callable[[str, int], Stream],
    most: Mapping[str, int],
    apply: Callable[[Stream, Cut], tuple[_Result, int, int]],
    processes: Processes = ALONE,
    *,
    at_once: bool = False,
) -> dict[str, tuple[_Result, int, int]]:
    """Say which weights go: the lowest of each budget.

    Args:
        budgets: from `budget`.
        stream: the scores of a tensor, by its name and what its budget tells of it.
        most: weights that each tensor may lose.
        apply: applies a cut to a stream: what comes of it, the scores that it loses here, and another number.
        processes: that each read some of the streams; by default this one works alone.
        at_once: all budgets, so that processes seldom wait for each other; for weights in memory.

    Returns:
        For each tensor what came of it, and the sums of the two numbers over all processes.
    """
    found: dict[str, tuple[_Result, int, int]] = {}
    many = len(budgets) if at_once else 1
    for start in range(0, len(budgets), max(many, 1)):
        several = budgets[start : start + many]
        digit = selection.NARROW if len(several) > 1 else selection.WIDE
        jobs = [
            selection.lowest(functools.partial(_streams, stream, each.told), each.count, most, apply, digit)
            for each in several
        ]
        for each in selection.run(jobs, processes):
            found |= each
    return found


def _streams(stream: Callable[[str, int], Stream], told: Mapping[str, int]) -> list[Stream]:
    return [stream(name, count) for name, count in told.items()]


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
            "allocation": {
                **{field.name: getattr(self.allocation, field.name) for field in fields(Allocation)},
                "share": _name(self.allocation.share),
            },
            "pattern": str(self.pattern),
        }

    def masks(self, counts: Sequence[int], held: Masks | None = None) -> Masks:
        """Choose the weights to prune; those that `held` prunes stay pruned. The model is only read.

        Raises:
            InputError: NaN or inf in a weight, a score that cannot rank, a budget that cannot be met.
        """
        names = [name for share in self.shares for name in share.names]
        spread = sharding.spread({name: self.scope[name] for name in names})
        processes = ALONE if spread is None else spread.grid
        global_magnitude = self.score is scores.magnitude and self.pattern is None and self.allocation.share is None
        if not global_magnitude:  # whose selection looks for NaN and inf as it goes, and so spares a pass
            together(processes, lambda: self._require_finite(names))
        generator = getattr(self.score, "generator", None)
        if spread is not None and generator is not None:
            _require_one_state(generator, spread)
        table = getattr(self.score, "table", None)
        if spread is not None and table is not None:
            given = {name: table[name] for name in names if name in table}
            sharding.agree(spread.grid, lambda: _told(given), lambda told: {"scores": told})
        prepare = getattr(self.score, "prepare", None)
        if prepare is not None:
            together(processes, prepare)
        found: dict[str, Tensor] = {}
        for share, count in zip(self.shares, counts, strict=True):
            found |= self._kept(sheets_of(self.scope, share.names, self.pattern), count, held, spread)
        shapes = {name: self.scope[name].shape for name in names}
        masks = Masks.from_bits({name: found[name] for name in names}, shapes, spread)
        masks = masks if held is None else masks & held
        if spread is not None and self.pattern is None and masks.pruned != sum(counts):
            raise InputError(
                f"{masks.pruned:,} weights would go in place of {sum(counts):,}: a score that changes from call to "
                "call, or weights that something else changes meanwhile; leave them still"
            )
        if not self.allocation.allow_empty:
            warn_of_collapse(masks.counts(), {name: masks.shape(name).numel() for name in masks})
        return masks

    def _require_finite(self, names: Iterable[str]) -> None:
        for name in names:
            streams.require_finite(name, self.scope[name])

    def require_possible(self) -> None:
        """See that so many weights may go in the end.

        Raises:
            InputError: they may not.
        """
        for share, count in zip(self.shares, self.counts(), strict=True):
            sheets = sheets_of(self.scope, share.names, self.pattern).values()
            _require_possible(sum(map(self._most, sheets)), count, self.allocation, self.pattern)

    def _most(self, sheet: Sheet) -> int:
        """The most weights of a sheet that may go, in whole groups."""
        most = min(sum(self.allocation.most(member.free) for member in sheet.members), sheet.legal(self.pattern))
        group = sheet.group(self.pattern)
        return most // group * group

    def _kept(
        self, sheets: Mapping[str, Sheet], count: int, held: Masks | None, spread: Spread | None
    ) -> dict[str, Tensor]:
        """Choose `count` weights of some sheets: for each tensor the bits of what it keeps."""
        pruned = held.counts() if held is not None else {}
        bounds, groups = {}, {}
        for name, sheet in sheets.items():
            least = sum(pruned.get(member.name, 0) for member in sheet.members)
            least = sheet.gone(held) if isinstance(sheet, Picks) and held is not None else least
            bounds[name] = least, self._most(sheet)

        def stream(name: str, told: int) -> Stream:
            found = self._stream(sheets[name], told, held, spread)
            groups[name] = found.values.numel()
            return found

        budgets = budget(bounds, count, self.allocation, lambda name: sheets[name].weights(), pattern=self.pattern)
        limits = {name: most for name, (_, most) in bounds.items()}
        processes = ALONE if spread is None else spread.grid
        chosen = choose(budgets, stream, limits, _keep, processes, at_once=spread is not None)
        kept = {name: packed for name, (packed, _, _) in chosen.items()}
        if self.pattern is None:
            return kept
        found: dict[str, Tensor] = {}
        for name, sheet in sheets.items():
            mask = self.pattern.expand(bits.unpack(kept[name], groups[name]), sheet.here)
            for part_of, part in sheet.unlay(mask):
                packed = bits.pack(part)
                found[part_of] = found[part_of] & packed if part_of in found else packed
        return found

    def _stream(self, sheet: Sheet, told: int, held: Masks | None, spread: Spread | None) -> Stream:
        if self.pattern is not None:
            values = self._reduced(sheet, self.pattern, told, held, spread)
            place = None if spread is None else sheet.place(self.pattern, spread.places)
            here = place is None or place.counts
            return Stream(sheet.name, values, group=sheet.group(self.pattern), here=here, place=place)
        (member,) = sheet.members
        name, weight = member.name, bits.local(member.parameter)
        packed = held.packed(name).to(weight.device) if held is not None and name in held else None
        place = spread.places[name] if spread is not None else None
        here, protected = place is None or place.counts, sharding.protected(member, place)
        if getattr(self.score, "elementwise", False):
            return Stream(name, weight, self.score, packed, protected, here=here, place=place)
        values = streams.zeros_first(self._scores(member), weight)
        return Stream(name, values, None, packed, protected, here=here, place=place)

    def _scores(self, member: Member) -> Tensor:
        """The scores of the weights that are here."""
        name, weight, part = member.name, member.parameter, bits.local(member.parameter)
        if getattr(self.score, "by_shape", False) and bits.is_sharded(weight):
            call = functools.partial(self.score, name)
            return scores.evaluate(lambda *_: sharding.by_shape(call, name, weight), name, part)
        return scores.evaluate(self.score, name, part)

    def _reduced(self, sheet: Sheet, pattern: Pattern, told: int, held: Masks | None, spread: Spread | None) -> Tensor:
        """The scores of groups: those pruned already come first, then those that are zero; +inf for what must stay."""
        values, zero, gone = {}, {}, {}
        for member in sheet.members:
            name, weight = member.name, bits.local(member.parameter)
            found = self._scores(member)
            values[name] = found = found.float() if found.itemsize < 4 else found
            zero[name] = weight == 0
            if held is not None:
                kept = bits.local(held[name]).to(weight.device) if name in held else None
                gone[name] = ~kept if kept is not None else torch.zeros_like(zero[name])
            row = sharding.protected(member, None if spread is None else spread.places[name])
            if row:
                values[name] = found = found.clone(memory_format=torch.contiguous_format)
                found.view(-1)[row.start : row.stop] = math.inf
        laid = sheet.lay(values)
        ranks = [(sheet.lay(gone), -math.inf)] if held is not None else []
        if self.score is not scores.magnitude:  # by which zeros come first in any case
            ranks.insert(0, (sheet.lay(zero), torch.finfo(laid.dtype).min))
        if sheet.group(pattern) == 1:
            for flags, value in ranks:
                laid = laid.masked_fill(flags & (laid < math.inf), value)
            return pattern.reduce(laid, told)
        reduced = pattern.reduce(laid, told)
        for flags, value in ranks:
            whole = pattern.reduce((~flags).float(), told) == 0
            reduced = reduced.masked_fill(whole & (reduced < math.inf), value)
        return reduced


def _told(table: Mapping[str, Tensor]) -> dict[str, str]:
    """Checksums of the whole tensors in a table."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in table.items() if not bits.is_sharded(tensor)}
    return {
        name: f"with the checksum {zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"
        for name, tensor in whole.items()
    }


def _require_one_state(generator: torch.Generator, spread: Spread) -> None:
    """See that all processes will draw the same numbers.

    Raises:
        InputError: they will not.
    """
    if spread.grid.differ(hashlib.sha256(generator.get_state().cpu().numpy().tobytes()).hexdigest()):
        raise InputError(
            "the generator of the score is not in the same state in all processes: give it one seed in all of them, as "
            "sc.scores.random(seed=0) does"
        )


def _keep(stream: Stream, cut: Cut) -> tuple[Tensor, int, int]:
    return *selection.keep(stream, cut), 0


@dataclass(frozen=True)
class FixedMasks:
    """A plan whose masks are given, so that it has nothing to choose."""

    scope: Scope
    given: Masks
    score: Score = scores.magnitude
    shares: tuple[Share, ...] = ()
    pattern: Pattern | None = None

    def counts(self, at: Callable[[Fraction], Fraction] = lambda final: final) -> tuple[int, ...]:
        """Weights that the masks prune in each tensor, wherever a schedule is."""
        return tuple(self.given.counts().values())

    def require_possible(self) -> None:
        """They are possible."""

    def masks(self, counts: Sequence[int], held: Masks | None = None) -> Masks:
        """The masks."""
        return self.given.on(sharding.spread(self.scope))

    def settings(self) -> dict[str, Any]:
        """What two runs must have in common: the same masks. Of masks of parts only their counts are told."""
        if any(map(self.given.is_spread, self.scope)):
            return {"masks": self.given.counts()}
        kept = hashlib.sha256()
        for name in self.scope:
            kept.update(self.given.packed(name).cpu().numpy().tobytes())
        return {"masks": kept.hexdigest()}


def of(model: nn.Module, sparsity: Sparsity | Masks, **options: Any) -> Plan | FixedMasks:
    """A plan, or, where masks are given in place of a sparsity, those. No process waits for another here.

    Raises:
        As `make`; InputError, MaskError, UnknownNameError: masks that do not fit, or other choices beside them.
    """
    made = _of(model, sparsity, options)
    spread = sharding.spread(made.scope)  # what cannot be pruned as it is spread is refused now
    if isinstance(made, FixedMasks):
        made.given.require_on(spread)
    return made


def _of(model: nn.Module, sparsity: Sparsity | Masks, options: Mapping[str, Any]) -> Plan | FixedMasks:
    masks: Any = sparsity
    if isinstance(masks, Mapping) and masks and all(isinstance(mask, Tensor) and mask.ndim for mask in masks.values()):
        masks = as_masks(masks)
    if not isinstance(masks, Masks):
        return make(model, masks, **options)
    if options != {"score": "magnitude", "allocation": "global", "pattern": None, "scope": None}:
        raise InputError("given masks say which weights go: leave score, allocation, pattern and scope as they are")
    masks.match(scopes.unwrap(model))
    scope = scopes.weights(model, only=list(masks))
    names = {name: name for name in scope} | {
        name: alias for name, member in scope.members.items() for alias in member.aliases if name not in masks
    }
    twice = set(masks) - set(names.values())
    if twice:
        raise MaskError(f"{min(twice)} is a second name of a tied tensor that has a mask already: leave it out")
    return FixedMasks(scope, masks.named(names))


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
    shape = patterns.resolve(pattern)
    chosen = scopes.resolve(model, scope) if not isinstance(shape, Picked) else picked_scope(model, scope, shape)
    shared = allocations.resolve(allocation)

    def legal(names: Sequence[str]) -> int:
        return sum(sheet.legal(shape) for sheet in sheets_of(chosen, names, shape).values())

    if shape is not None:
        for name in chosen:
            shape.check(name, chosen.members[name].layout.shape(chosen[name].shape))
    sizes = {name: member.free for name, member in chosen.members.items()}
    if isinstance(shape, Picked):
        sizes = picked_sizes(chosen, shape)
    aliases = {name: member.aliases for name, member in chosen.members.items()}
    found = shares(sparsity, sizes, shape, legal, aliases=aliases)
    for share in found:
        sheets_of(chosen, share.names, shape)  # what cannot be laid out is refused now
    made = Plan(chosen, found, scores.resolve(score), shared, shape)
    if any(map(bits.is_sharded, chosen.values())):
        _require_spreadable(made)
    return made


def _require_spreadable(plan: Plan) -> None:
    """See that parts of tensors can be ranked each by itself.

    Raises:
        PatternError, InputError: a pattern, score or allocation that looks at whole tensors.
    """
    remedy = "prune before sharding"
    if plan.pattern is not None:
        places = {
            name: sharding.place_of(name, tensor) or Place.whole(tensor.shape) for name, tensor in plan.scope.items()
        }
        for share in plan.shares:
            for sheet in sheets_of(plan.scope, share.names, plan.pattern).values():
                sheet.place(plan.pattern, places)
    of_parts = any(getattr(plan.score, mark, False) for mark in ("elementwise", "by_shape"))
    if not (of_parts or isinstance(plan.score, scores.GradientScore)):
        called = getattr(plan.score, "__name__", type(plan.score).__name__)
        raise InputError(
            f"the score {called} looks at whole tensors, and these are sharded: {remedy}, or, if it looks at each "
            "weight alone, mark it with @sc.scores.elementwise"
        )
    if not plan.allocation.of_parts:
        called = _name(plan.allocation.share).removesuffix(".share")
        raise InputError(
            f"the allocation {called} looks at whole tensors, and these are sharded: {remedy}, or use "
            '"global", "uniform" or "erk"'
        )


def _name(choice: object) -> str:
    return str(getattr(choice, "__qualname__", None) or getattr(choice, "__name__", type(choice).__name__))


def warn_of_collapse(pruned: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Warn of tensors that lose far more of their weights than the others do."""
    density = 1 - sum(pruned.values()) / max(sum(sizes.values()), 1)
    kept = {name: 1 - pruned[name] / size for name, size in sizes.items() if size}
    starved = sorted((name for name in kept if kept[name] < min(0.01, 0.1 * density)), key=kept.__getitem__)
    if starved:
        its, they = ("keeps under 1 % of its", "it") if len(starved) == 1 else ("keep under 1 % of their", "they")
        warn(
            f"{listed(starved)} {its} weights while all together keep more than ten times as many: {they} may no "
            "longer let anything through; try the allocation erk or uniform",
            in_python=", or allocation=sc.allocation.global_(min_keep=0.05)",
        )
