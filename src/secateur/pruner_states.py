"""What a Pruner saves: a state that is damaged, or of another Pruner, is refused before anything changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur import sharding
from secateur.errors import InputError, listed
from secateur.feedback import STATE, Feedback
from secateur.masks import Masks
from secateur.plan import FixedMasks, Plan
from secateur.regrow import Regrowth
from secateur.schedules import Function, Schedule
from secateur.scope import Scope
from secateur.scores import GradientScore, precise
from secateur.sharding import Place
from secateur.support import bits, checks

VERSION = 2
"""Of the state of a Pruner. In version 1 bits run on from row to row."""

_MOST_STEPS = 10**12
"""No training makes so many: at a thousand a second it would take 30 years."""

_When = Schedule | Function
_Moves = Regrowth | Feedback | None


def settings(plan: Plan | FixedMasks, schedule: _When, regrow: _Moves) -> dict[str, Any]:
    """What two runs must have in common to go on with each other, as plain data."""
    found = {**plan.settings(), "schedule": schedule.settings()}
    return found if regrow is None else {**found, "regrow": vars(regrow)}


def _words(plan: Plan | FixedMasks, schedule: _When, regrow: _Moves) -> str:
    """The settings as states of before July 2026 tell them."""
    shares = ", ".join(f"{float(share.sparsity)!r} of {share.size}" for share in plan.shares)
    score = getattr(plan.score, "__name__", type(plan.score).__name__)
    moves = f"; regrow {regrow}" if regrow is not None else ""
    return f"sparsity {shares}; schedule {schedule}; score {score}; pattern {plan.pattern}{moves}"


def _damaged(what: str) -> InputError:
    return InputError(f"the saved pruner is damaged: {what}; load an earlier checkpoint")


def _differs(theirs: object, mine: object) -> bool:
    return type(theirs) is not type(mine) or theirs != mine


def _differences(place: str, theirs: object, mine: object) -> Iterator[str]:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        for key in {**mine, **theirs}:
            yield from _differences(
                f"{place}.{key}".lstrip("."), theirs.get(key, "not there"), mine.get(key, "not there")
            )
    elif _differs(theirs, mine):
        yield f"{place or 'settings'} {theirs!r} in the saved one, {mine!r} in this one"


def require_whole(state: object) -> None:
    """See that a state is one of a Pruner, and has all parts that each of them has.

    Raises:
        InputError: it is not.
    """
    if not isinstance(state, Mapping) or type(state.get("version")) is not int or state["version"] not in (1, VERSION):
        raise InputError(f"this is not a state_dict of a Pruner, version {VERSION}: give what Pruner.state_dict() gave")
    for key in ("settings", "steps", "counts", "shapes", "bits"):
        if key not in state:
            raise InputError(
                f"this is not a state_dict of a Pruner, it has no {key!r}: give what state_dict() returned"
            )


def require_shapes(theirs: object, scope: Scope) -> None:
    """See that a state is of these tensors.

    Raises:
        InputError: it is of others.
    """
    if not isinstance(theirs, Mapping):
        raise _damaged(f"its shapes are {checks.kind(theirs)}")
    mine = {name: list(weight.shape) for name, weight in scope.items()}
    differ = sorted(map(str, set(theirs) ^ set(mine))) or [name for name in mine if _differs(theirs[name], mine[name])]
    if differ:
        raise InputError(f"the saved pruner has another scope ({listed(differ)}): build this one with the scope it had")


def require_settings(theirs: object, plan: Plan | FixedMasks, schedule: _When, regrow: _Moves) -> None:
    """See that a state was saved by a Pruner with the same settings.

    Raises:
        InputError: it was not; the message says what differs.
    """
    tell = _words if isinstance(theirs, str) else settings
    mine: Any = tell(plan, schedule, regrow)
    saved = theirs.get("masks") if isinstance(theirs, Mapping) and isinstance(plan, FixedMasks) else None
    if saved is not None and type(saved) is not type(mine["masks"]):  # one told of the whole, the other of parts
        mine = {**mine, "masks": saved}  # `require_same` compares the bits
    differ = list(_differences("", theirs, mine))
    if differ:
        raise InputError(f"the saved pruner has other settings: {'; '.join(differ[:3])}; build this one with the same")


def require_bits(state: Mapping[str, Any], scope: Scope) -> None:
    """See that the bits of the masks are those of these tensors, as far as they are here.

    Raises:
        InputError: they are damaged.
    """
    packed, flat = state["bits"], state["version"] == 1
    if not isinstance(packed, Mapping) or set(packed) != set(scope):
        raise _damaged(f"its bits are {type(packed).__name__} of other names than those in scope")
    for name, weight in scope.items():
        kept, size = packed[name], weight.numel()
        plain = isinstance(kept, Tensor) and kept.layout is torch.strided and not kept.is_meta
        if not plain or kept.dtype != torch.uint8:
            raise _damaged(f"the bits of {name} are {_told(kept)}, not uint8")
        if flat and (kept.shape != (-(-size // 8),) or (size % 8 and int(kept[-1]) >> size % 8)):
            raise _damaged(f"the bits of {name} are {_told(kept)}, not those of {size:,} weights")
        rows, each, here = weight.shape[0], math.prod(weight.shape[1:]), bits.local(kept)
        if flat:
            continue
        place = sharding.place_of(name, kept)
        if place is not None and tuple(here.shape) != tuple(map(len, place.index)):
            raise InputError(
                f"the bits of {name} are those of another process: torch.save keeps the part of one process, save with "
                "torch.distributed.checkpoint"
            )
        if kept.shape != (rows, -(-each // 8)) or (each % 8 and here.numel() and int(here[:, -1].max()) >> each % 8):
            raise _damaged(f"the bits of {name} are {_told(kept)}, not those of {rows:,} rows of {each:,} weights")


def read_masks(state: Mapping[str, Any], scope: Scope) -> Masks:
    """Read the bits of the masks, seen to be right, to where the weights are now. All processes do it together."""
    spread = sharding.spread(scope)
    found = {}
    for name, weight in scope.items():
        place, kept = Place.whole(weight.shape) if spread is None else spread.places[name], state["bits"][name]
        flat = state["version"] == 1
        part = place.part(bits.unpack(kept, place.numel).view(place.shape)) if flat else place.unpacked(kept)
        found[name] = bits.pack(part).to(weight.device)
    return Masks.from_bits(found, {name: weight.shape for name, weight in scope.items()}, spread)


def require_same(theirs: Masks, mine: Masks) -> None:
    """See that the masks of a state are those that a Pruner was given to hold.

    Raises:
        InputError: they are others.
    """
    differ = [
        name for name in mine if theirs.counts()[name] and not torch.equal(theirs.packed(name), mine.packed(name))
    ]
    if differ:
        raise InputError(f"the saved pruner holds other masks of {listed(differ)}: build this one with the same")


def read_numbers(state: Mapping[str, Any], masks: Masks, most: Sequence[int], *, exact: bool) -> tuple[int, ...]:
    """Read how many weights each share had lost, of at most `most`; see that they are, if `exact`, those of the masks.

    Raises:
        InputError: the steps or the counts are damaged.
    """
    steps, counts = state["steps"], state["counts"]
    if type(steps) is not int or not 0 <= steps < _MOST_STEPS:
        raise _damaged(f"its steps are {steps!r}, not a whole number from 0 to {_MOST_STEPS:,}")
    if not isinstance(counts, (list, tuple)) or len(counts) != len(most) or any(type(n) is not int for n in counts):
        raise _damaged(f"its counts are {counts!r}, not {len(most)} whole numbers")
    if any(not 0 <= count <= limit for count, limit in zip(counts, most, strict=True)):
        raise _damaged(f"its counts are {list(counts)}, not between 0 and {list(most)}")
    if exact and sum(counts) != masks.pruned:
        raise _damaged(f"its counts add up to {sum(counts):,}, its bits prune {masks.pruned:,}")
    return tuple(counts)


def sums(score: GradientScore, scope: Scope) -> dict[str, Any]:
    """What a state keeps of a score that is made of gradients: of all tensors, as a checkpoint that is read in place
    needs them from the first step on, and the names of those that were seen."""
    none = {name: torch.zeros_like(precise(bits.local(weight))) for name, weight in scope.items()}
    kept = {name: score.sums[name].clone() if name in score.sums else part for name, part in none.items()}
    return {
        "sums": {name: sharding.spread_like(part, scope[name]) for name, part in kept.items()},
        "seen": [name for name in scope if name in score.sums],
    }


def require_sums(state: Mapping[str, Any], scope: Scope) -> None:
    """See that the sums of a score that is made of gradients are those of these tensors, as far as they are here.

    Raises:
        InputError: they are damaged.
    """
    sums = state.get("sums")
    if not isinstance(sums, Mapping) or not set(sums) <= set(scope):
        raise _damaged("its sums of gradients are missing, or of other names than those in scope")
    for name, total in sums.items():
        weight = scope[name]
        number = isinstance(total, Tensor) and (
            total.is_floating_point() or (total.is_complex() and weight.is_complex())
        )
        number = number and total.layout is torch.strided
        if not number or total.is_meta or total.shape != weight.shape or not bool(bits.local(total).isfinite().all()):
            raise _damaged(
                f"its sum of gradients of {name} is {_told(total)}, not {tuple(weight.shape)} finite numbers"
            )
    _seen("gradients", state.get("seen", list(sums)), sums)


def read_sums(state: Mapping[str, Any], scope: Scope) -> dict[str, Tensor]:
    """Read the sums of a score that is made of gradients, seen to be right. All processes do it together."""
    sums = state["sums"]
    parts = {name: sharding.part_like(sums[name], scope[name]) for name in state.get("seen", list(sums))}
    return {name: precise(part.clone()).to(scope[name].device) for name, part in parts.items()}


def require_generator(state: Mapping[str, Any], generator: torch.Generator) -> None:
    """See that the state of a generator of this kind was saved.

    Raises:
        InputError: it was not, or is damaged.
    """
    saved = state.get("generator")
    try:
        torch.Generator(generator.device).set_state(saved.cpu())  # type: ignore[union-attr]
    except (AttributeError, TypeError, RuntimeError) as error:
        raise _damaged(f"its generator is {_told(saved)}, not the state of one") from error


def require_grown(saved: object, generator: torch.Generator) -> None:
    """See that the number of weights that grew was saved, and the state of the generator of a regrowth.

    Raises:
        InputError: they were not, or are damaged.
    """
    if not isinstance(saved, Mapping) or type(saved.get("grown")) is not int or saved["grown"] < 0:
        raise _damaged(f"its regrowth is {checks.told(saved)}, not a number of weights and the state of a generator")
    require_generator(saved, generator)


def require_withheld(state: Mapping[str, Any], scope: Scope) -> None:
    """See that a state has what a feedback keeps beside the model, of these tensors, as far as they are here.

    Raises:
        InputError: it is damaged, or missing.
    """
    saved = state.get("withheld")
    if not isinstance(saved, Mapping) or set(saved) - {"seen"} != set(STATE):
        raise _damaged(f"its dense weights are {checks.kind(saved) if saved is not None else 'missing'}")
    for key, tensors in ((key, saved[key]) for key in STATE):
        if not isinstance(tensors, Mapping) or not set(tensors) <= set(scope):
            raise _damaged(f"its {key} are of other names than those in scope")
        for name, value in tensors.items():
            shape = scope[name].shape if key == "hidden" else torch.Size()
            plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
            if not plain or value.shape != shape or value.is_complex() > scope[name].is_complex():
                raise _damaged(f"its {key} of {name} is {_told(value)}, not numbers of shape {tuple(shape)}")
    _seen("dense weights", saved.get("seen", list(saved["hidden"])), saved["hidden"])


def read_withheld(state: Mapping[str, Any], scope: Scope) -> dict[str, dict[str, Tensor]]:
    """Read the dense weights that a feedback keeps beside the model, and what it learned, seen to be right.

    All processes do it together.
    """
    saved = state["withheld"]
    number, seen = torch.empty(()), saved.get("seen", list(saved["hidden"]))
    return {
        key: {
            name: sharding.part_like(saved[key][name], scope[name] if key == "hidden" else number).to(
                scope[name].device
            )
            for name in (seen if key == "hidden" else saved[key])
        }
        for key in STATE
    }


def require_dense(names: Iterable[str], withheld: Mapping[str, Mapping[str, Tensor]]) -> None:
    """See that the dense weights of some tensors were read.

    Raises:
        InputError: they were not.
    """
    if lost := sorted(set(names) - set(withheld["hidden"])):
        raise _damaged(f"it has masks of {listed(lost)}, but no dense weights")


def _seen(what: str, names: object, known: Mapping[str, object]) -> None:
    """See that these are names whose numbers say something, among those that a checkpoint keeps of all tensors."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name in known for name in names):
        raise _damaged(f"the names whose {what} were seen are {checks.told(names)}, not among those it keeps")


def _told(thing: object) -> str:
    if isinstance(thing, Tensor):
        sparse = "sparse " if thing.layout is not torch.strided else ""
        return f"{sparse}{thing.dtype} {tuple(thing.shape)} on {thing.device}"
    return checks.kind(thing) if thing is not None else "missing"
