"""`sc.shrink`: really smaller shapes, in a transaction that proves itself."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from secateur.errors import InputError, InputTypeError, StructureError, listed, warn
from secateur.masks import as_masks
from secateur.structure import rules as rules  # registers what is known of torch's functions
from secateur.structure import scales
from secateur.structure.attributes import Edits, follow_forward, follow_modules
from secateur.structure.blocks import Renaming
from secateur.structure.calls import Call
from secateur.structure.capture import Capture, capture
from secateur.structure.compensation import compensate
from secateur.structure.configs import Configs, Dim
from secateur.structure.criteria import Subject
from secateur.structure.cut import check_optimizer, cut, follow, masked, named_tensors, own_memory, twin, undo
from secateur.structure.dead import dead
from secateur.structure.depth import Shorter, shorten, shorten_by
from secateur.structure.fields import Labelled, along
from secateur.structure.groups import Groups, Worth, as_mask
from secateur.structure.meta import empty
from secateur.structure.options import Ask, Options, checked, read
from secateur.structure.plan import NOT_ASKED, Plan, as_plan
from secateur.structure.policy import POLICIES, Policy
from secateur.structure.proof import Proof
from secateur.structure.remains import Remains
from secateur.structure.targets import Target, counted, knob, reach, search_time, select, time_left
from secateur.structure.traces import Trace
from secateur.structure.units import Extent, Flags, Labels
from secateur.support.inputs import Arguments

_M = TypeVar("_M", bound=nn.Module)
_log = logging.getLogger(__name__)
_ROUNDS = 40
_LEAST = 0.5  # of the weights that were to go: with fewer the target is missed
_FEW = 0.4  # of the fraction that was asked for: where a smaller one of all weights goes, that is worth a word
_FAR, _NEAR = 0.45, 0.6  # sizes that no config tells may change where less went before, and more goes then
_MISSES = 0.4  # of the weights that were to go: with more, parts of heads are tried too


class _Result(NamedTuple):
    model: nn.Module
    plan: Plan
    missed: float  # see `Groups`
    told: bool  # whether configs tell its sizes
    unseen: Sequence[str] = ()  # parameters that no forward reaches


def shrink(model: _M, example_inputs: Any, sparsity: float | None = None, **options: Unpack[Options]) -> _M:
    """Return the same model with fewer units, or fewer blocks: smaller layers of the same classes, shorter lists.

    Args:
        model: stays as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; or a list of several of these.
        sparsity: fraction of the units of each group that go, 0 < sparsity < 1. A group keeps at least one unit.
            None, without `macs`, `params`, `latency`, `depth` or `plan`: exactly the units go that are dead already,
            because weights of them are zero: no number of theirs reaches an output. So pruning with masks ends.
        **options: see `secateur.structure.Options`.

    Returns a new model of the same class; it equals the given one with the same units masked, and blocks passed by.
    With `stats`, layers that read these units are fitted anew after that was proven, and come nearer to the given one.

    Raises:
        InputError: a sparsity, target, score or optimizer that cannot be used; two options that both say what goes; or
            a model that cannot be followed or copied: lazy, compiled, scripted, quantized or sharded.
        MaskError: masks or a plan of another model. StateError: a Pruner follows the optimizer.
        InputTypeError: inputs of another type, or inputs that the model cannot take.
        UnknownNameError: `keep` names nothing of the model.
        StructureError: nothing could be removed, or less than half of what was asked for, or the target is out of
            reach, or what was removed changed the function; says what holds it.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> shrink(model, torch.randn(2, 8), 0.5)
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
      (1): ReLU()
      (2): Linear(in_features=8, out_features=4, bias=True)
    )
    """
    return cast(_M, _transact(model, example_inputs, sparsity, options).model)


def propose(model: nn.Module, example_inputs: Any, sparsity: float | None = None, **options: Unpack[Options]) -> Plan:
    """Return what `shrink` would remove, as plain data, proven in the same way.

    Arguments and errors are those of `shrink`; an optimizer is left as it is.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> plan = propose(model, torch.randn(2, 8), 0.5)
    >>> len(plan.kept["0.weight"][0])
    8
    """
    return _transact(model, example_inputs, sparsity, {**options, "optimizer": None}).plan


@torch.inference_mode(False)  # what is made is trained on
def _transact(model: nn.Module, inputs: Any, sparsity: float | None, options: Options) -> _Result:
    examples = checked(model, inputs)
    ask = read(model, sparsity, options)
    original, optimizer = model, options.get("optimizer")
    if options.get("masks") is not None:
        model = masked(model, as_masks(options["masks"]))
    if optimizer is not None:
        check_optimizer(original, optimizer)
    shorter = Shorter(model)
    if ask.depth is not None:
        shorter = shorten(model, examples, ask.depth, ask.keep, ask.verify)
    elif ask.plan is not None and ask.plan.blocks:
        shorter = shorten_by(model, examples, ask.plan.blocks, ask.verify)
    renaming = Renaming(shorter.blocks)
    keep = {now: why for name, why in ask.keep.items() if (now := renaming(name)) is not None}
    ask = dataclasses.replace(ask, keep=keep)
    if ask.target is not None and ask.target.what == "latency":
        best = _in_time(model, examples, ask)
    elif ask.narrower:
        best = _best(shorter.model, examples, ask)
    else:
        best = _Result(shorter.model, Plan({}, {}, (), (), (), proven=True), 0.0, True)
    if not best.told:
        warn(
            "no config can tell the sizes of this model: from_pretrained cannot load it. Save the plan of propose(...) "
            "beside it, and apply that to the model it was made from"
        )
    if best.unseen:
        warn(
            f"no example reaches {listed(best.unseen)}: they keep their shapes, and calls that use them may fail. Give "
            "an example for each branch of the model, in a list"
        )
    gone = 1 - _weights(best.model) / _weights(shorter.model)
    if ask.share is not None and not ask.keep and gone < _FEW * ask.share:
        warn(
            f"only {gone:.2g} of the weights go, where {ask.share:g} of the units of each group were to go. What holds "
            f"others: {_holds(best.plan)}. secateur.structure.propose(...).explain() shows all"
        )
    if ask.share is not None and best.missed > _MISSES and gone > 1 - (1 - ask.share) ** 2:
        warn(
            f"{gone:.2g} of the weights go, more than where {ask.share:g} of the units of each group do: sizes that "
            "are tied change in steps, such as whole heads. Ask for less, or for a target, such as "
            f"params={(1 - ask.share) ** 2:.2g}; secateur.structure.propose(...).explain() shows what goes"
        )
    attributes = (*shorter.attributes, *best.plan.attributes)
    best = best._replace(plan=dataclasses.replace(best.plan, blocks=shorter.blocks, attributes=attributes))
    if ask.stats is not None:
        best = best._replace(plan=compensate(model, best.model, best.plan, ask.stats))
    own_memory(original, best.model, best.plan.kept, renaming)
    if optimizer is not None:
        follow(original, best.model, best.plan.kept, optimizer, renaming)
    return best


def _best(model: nn.Module, examples: Sequence[Arguments], ask: Ask) -> _Result:
    """The smallest model of all policies: of the first that removes what was asked for.

    Parts of heads go only where whole ones miss the wanted counts. A policy that makes no difference is not tried.
    """
    best, enough, errors, told = None, False, list[str](), Configs(model)
    consulted: set[str] = set()
    tried: list[Policy] = []
    for policy in POLICIES:
        if policy.like(consulted) in [one.like(consulted) for one in tried]:
            continue
        if best is not None and (best.missed <= _MISSES if not policy.whole_heads else enough):
            continue
        if best is not None and not policy.told and _share_gone(best.model, model, ask) >= _FAR:
            continue
        tried.append(policy)
        try:
            found = _attempt(model, examples, ask, policy, told, consulted)
        except StructureError as error:
            errors.append(str(error))
            continue
        if best is not None and not policy.told and _share_gone(found.model, model, ask) < _NEAR:
            continue
        small = ask.share is None or _weights(found.model) < (1 - ask.share) ** 1.6 * _weights(model)
        if enough and best is not None:
            if small and found.missed < best.missed:
                best = found
        elif best is None or _weights(found.model) < 0.93 * _weights(best.model):
            best = found
        enough = enough or small
    if best is None:
        raise StructureError(errors[0])  # the others are of policies that nobody asked for
    return best


def _share_gone(small: nn.Module, model: nn.Module, ask: Ask) -> float:
    """Of the weights that would go if each of them lay between units that all are cut, how many went."""
    meant = 1 - (1 - ask.share) ** 2 if ask.share is not None else 0
    return (1 - _weights(small) / _weights(model)) / meant if meant else 1


def _in_time(model: nn.Module, examples: Sequence[Arguments], ask: Ask) -> _Result:
    """A model that takes the asked fraction of the time, from a few that are measured beside the given one."""
    assert ask.target is not None
    what = knob(model, examples[0])

    def made(cost: float, verify: bool) -> _Result:
        return _best(model, examples, dataclasses.replace(ask, target=Target(what, cost, strict=False), verify=verify))

    def left(cost: float) -> float:
        return time_left(model, made(cost, False).model, examples[0], seconds=1.0)

    def sure(cost: float) -> tuple[float, _Result]:
        found = made(cost, ask.verify)
        return time_left(model, found.model, examples[0], seconds=3.0), found

    return search_time(ask.target.fraction, what, left, sure)


def _attempt(
    model: nn.Module,
    examples: Sequence[Arguments],
    ask: Ask,
    policy: Policy,
    told: Configs,
    consulted: set[str],
) -> _Result:
    """Capture, choose, cut and prove; on a failure hold what surrounds the call, and choose again."""
    small = twin(model)
    cap = _captured(small, examples, policy, ask.keep)
    consulted |= cap.consulted
    cap.consulted = consulted  # what is consulted from here on, the caller learns too
    groups = Groups(cap)
    trouble, asked, choose = "", 0, _chooser(small, cap, groups, ask, policy)
    failed: list[tuple[str, str] | None] = []
    for again in range(_ROUNDS):
        groups = Groups(cap) if again else groups
        kept, counts, shifts = choose(groups)
        plan = as_plan(small, groups, kept, counts, ())
        now = plan.weights_gone(small)
        asked = max(asked, now)
        unequal = list(groups.unequal(kept))
        if unequal:
            for rows, why in unequal:
                cap.ledger.hold(rows, f"unequal parts: {why}")
            trouble = f"unequal parts: {unequal[0][1]}"
            continue
        if not plan.removed:
            raise StructureError(_none_dead(trouble) if ask.dead else _nothing(plan, trouble))
        if ask.share is not None and now < _LEAST * asked:
            raise StructureError(
                f"{asked} weights were to go, and only {now} can: {trouble}. "
                "Change the code at that place, or ask for a sparsity at which equal parts stay equal"
            )
        plan = plan.with_shifts(small, shifts)
        done, edits = cut(small, plan.kept, shifts), Edits()
        known = len(cap.ledger.equals)
        remains = [Remains(run, as_mask(kept)) for run in cap.runs]
        traces: list[Trace] = []
        failure = (
            (_tell(told, small, cap, remains, groups, edits) if policy.told else None)
            or _fit(small, remains, policy, edits, traces)
            or (_told_right(told, small, cap, traces) if policy.told else None)
        )
        folds: list[scales.Fold] = []
        if failure is None:
            folds = list(scales.rooted(cap, as_mask(kept), model, small))
            failure = _instead(cap, folds) if not policy.fold else None
        if failure is None:
            done += scales.apply(small, _scaled(folds))
            if ask.verify:
                proof = Proof(model, remains, () if ask.exact else groups.axes)
                failure = _prove_or_fold(proof, small, cap, traces, folds, done)
        if failure is None:
            if ask.target is not None and ask.target.what == "macs" and ask.target.strict:
                ask.target.check(counted(small, examples) / counted(model, examples))
            return _Result(
                small,
                dataclasses.replace(plan, attributes=edits.listed(), scaled=_scaled(folds), proven=ask.verify),
                groups.missed,
                policy.told,
                [name for name in cap.unseen if not cap.seen(named_tensors(small)[name])],
            )
        edits.undo()
        undo(done)
        call, trouble = failure
        asked = asked if len(cap.ledger.equals) == known else 0  # sizes that a config ties were asked for too freely
        _log.info("held: %s", trouble)
        failed.append((call.name, call.line) if call is not None else None)
        alike = [call] if call is not None else []
        if failed.count(failed[-1]) > 1:  # so it is in every layer that runs the line
            line = [c for run in cap.runs for c in run.calls if (c.name, c.line) == failed[-1]]
            alike += [c for c in line if c is not call and _lose(as_mask(kept), _fields(c.outs, c.ins))]
        held = [_hold_around(cap, as_mask(kept), c, trouble) for c in alike]
        if alike and not any(held):
            break
    raise StructureError(f"the smaller model could not be proven equal to the masked one: {trouble}")


def _captured(small: nn.Module, examples: Sequence[Arguments], policy: Policy, keep: Mapping[str, str]) -> Capture:
    """The forwards of the examples, in which nothing goes of the tensors that are kept."""
    try:
        cap = capture(small, examples, policy)
    except (StructureError, InputError):
        raise
    except Exception as error:
        where = ", or load its weights: without them a forward cannot look at numbers" if empty(small) else ""
        raise InputTypeError(
            f"the model cannot take the example inputs ({type(error).__name__}: {error}): "
            f"give inputs with which model(...) runs{where}"
        ) from error
    for name, t in named_tensors(small).items():
        if name in keep and cap.seen(t):
            for f in cap.fields(t):
                cap.hold(f, keep[name])
    return cap


class _Choice(NamedTuple):
    """The labels that stay, how many go of each cell, and what is added to biases for what went."""

    kept: Flags
    counts: list[int]
    shifts: dict[str, list[float]] = {}  # noqa: RUF012


def _chooser(small: nn.Module, cap: Capture, first: Groups, ask: Ask, policy: Policy) -> Callable[[Groups], _Choice]:
    """What chooses units of the groups, the `first` and later ones, as often as some of them turn out to be held."""
    if ask.dead:

        def zeros(groups: Groups) -> _Choice:
            found = dead(small, cap.runs, policy, groups)
            kept, counts = groups.select_dead(found.units)
            return _Choice(kept, counts, found.shifts(small, groups, kept))

        return zeros
    if ask.plan is not None:
        given = ask.plan
        return lambda groups: _Choice(*given.choice(small, groups), given.shifts)
    worth = _worth(small, cap, first, ask)
    left = reach(cap, small, ask.target) if ask.target is not None else None

    def lowest(groups: Groups) -> _Choice:
        pools = ask.allocation(groups, small)
        if left is None or ask.target is None:
            return _Choice(*groups.select(worth, ask.share or 0.0, pools, ask.round_to, ask.min_width))
        try:
            return _Choice(*select(groups, worth, pools, ask.target, left, ask.round_to, ask.min_width))
        except StructureError as error:
            stay = as_plan(small, groups, np.ones(len(groups.root), bool), [0] * len(groups.cells), ())
            raise StructureError(f"{error}. What holds it: {_holds(stay) or 'nothing'}") from None

    return lowest


def _worth(small: nn.Module, cap: Capture, groups: Groups, ask: Ask) -> Worth:
    try:
        return ask.score(Subject(small, cap, groups))
    except RuntimeError as error:  # NotImplementedError is one
        if not empty(small):
            raise
        raise InputError(
            f"the score is {ask.named}, which looks at weights, and the model is on the meta device, without any: give "
            "score='random', a table of scores, or a function of the shapes"
        ) from error


def _fit(
    small: nn.Module, remains: Sequence[Remains], policy: Policy, edits: Edits, traces: list[Trace]
) -> tuple[Call, str] | None:
    """Let attributes follow, and give the traces of the fitted model. Returns the call that does not fit, and why."""
    follow_modules(small, edits, policy.whole_heads)
    for one in remains:
        trace, why = follow_forward(small, one.run, one.sizes, edits)
        if why:
            return trace.calls[min(trace.at, len(trace.calls) - 1)], why
        traces.append(trace)
    mark = len(edits)
    follow_modules(small, edits, policy.whole_heads)  # where groups went, other sizes follow these
    if len(edits) > mark:
        traces[:] = [Trace(one.run).of(small, one.run.arguments) for one in remains]
    return None


def _tell(
    told: Configs, small: nn.Module, cap: Capture, remains: Sequence[Remains], groups: Groups, edits: Edits
) -> tuple[Call | None, str] | None:
    """Let configs follow. Returns what they cannot tell, and the call to hold; None if the ledger knows already."""
    untold = told.follow(small, remains, edits)
    if untold is None:
        return None
    cap.consulted.add("told")
    kept = remains[0].kept
    named = {name: id(t) for name, t in named_tensors(small).items()}
    axes = {(id(axis.tensor), axis.dim): axis.labels for axis in groups.axes}

    def units(dim: Dim) -> Labels:
        return axes.get((named[dim[0]], dim[1]), np.zeros(1, np.int64))

    if _unseen_follow(cap, groups, named_tensors(small), untold.equal):
        return None, untold.why
    for one, other, factor in untold.equal:
        cap.ledger.equal(Extent(units(one), (0,)), Extent(units(other), (0,), factor), untold.why)
    for dim, of in untold.multiples:
        if not cap.ledger.multiple(units(dim), of, untold.why):
            cap.ledger.hold(units(dim), untold.why)
    gone = [u for dim in untold.dims if not kept[u := units(dim)].all()]
    for own in () if untold.equal or untold.multiples else gone:
        cap.ledger.hold(own, untold.why)
    return untold.call or (None if gone or untold.equal else cap.runs[-1].calls[-1]), untold.why


def _unseen_follow(
    cap: Capture, groups: Groups, named: Mapping[str, Tensor], equal: Sequence[tuple[Dim, Dim, Fraction]]
) -> bool:
    """Label tensors that no forward reaches as most of the others are whose size the same number of a config tells.

    Returns whether there were any.
    """
    axes = {(axis.name, axis.dim): axis.labels for axis in groups.axes}
    alike: dict[Dim, set[Dim]] = {}
    for one, other, _ in (pair for pair in equal if pair[2] == 1):
        alike.setdefault(one, {one}).add(other)
    found = False
    for dims in alike.values():
        rows = Counter(tuple(groups.root[axes[d]].tolist()) for d in sorted(dims) if d in axes)
        for name, dim in dims if rows else ():
            if not cap.seen(t := named[name]):
                cap.label(t, [along(np.array(rows.most_common(1)[0][0]), t.ndim, dim)])
                found = True
    return found


def _told_right(
    told: Configs, small: nn.Module, cap: Capture, traces: Sequence[Trace]
) -> tuple[Call | None, str] | None:
    untold = None if empty(small) else told.differ(small, traces)
    if untold is None:
        return None
    cap.consulted.add("told")
    return untold.call, untold.why


def _instead(cap: Capture, folds: Sequence[scales.Fold]) -> tuple[Call | None, str] | None:
    """Let stay what would need a fold. Returns why, if there is any."""
    why = "the size of a head is read as a scale"
    if not [cap.hold(f, why) for fold in folds for f in fold.units]:
        return None
    cap.consulted.add("fold")
    return None, why


def _scaled(folds: Sequence[scales.Fold]) -> tuple[scales.Scaled, ...]:
    return tuple(one for fold in folds for one in fold.scaled)


def _prove_or_fold(
    proof: Proof,
    small: nn.Module,
    cap: Capture,
    traces: Sequence[Trace],
    folds: list[scales.Fold],
    done: list[tuple[Tensor, Tensor]],
) -> tuple[Call, str] | None:
    """Prove; where a call differs because a size is its scale, fold that, in all calls of its line, and go on."""
    lines: set[tuple[str, str, str]] = set()
    known: Sequence[Trace | None] = traces if not folds else [None] * len(traces)
    while (found := proof.fails(small, known, folds)) is not None:
        call, why, factor = found
        cap.consulted |= {"fold"} if factor is not None else set()
        alone = any(isinstance(s, str) for s in call.sources[:1])  # of another weight another side may be the size

        def place(c: Call, alone: bool = alone) -> tuple[str, str, str]:
            return c.name, c.line, c.module if alone else ""

        if factor is None or not cap.policy.fold or place(call) in lines:
            return call, why
        lines.add(place(call))
        alike = [c for run in cap.runs for c in run.calls if place(c) == place(call)]
        found_folds = [fold for c in alike if (fold := scales.fold(cap, proof.kept, c, factor)) is not None]
        new = list({fold.scaled: fold for fold in found_folds}.values())
        if not new:
            return call, why
        folds += new
        done += scales.apply(small, _scaled(new))
        known = [None] * len(traces)
    return None


def _hold_around(cap: Capture, kept: Tensor, call: Call, why: str) -> bool:
    """Hold axes that lose units around one call, or in its module, or out of sight. Returns whether any does."""

    def hold(known: Iterable[Tensor]) -> bool:
        held = [cap.hold(f, why) for f in _lose(kept, known)]
        return any(held)

    def hold_one(known: Iterable[Tensor]) -> bool:
        """One axis at a time, small ones first: often it is one of them that the code has a literal for."""
        return any(hold([f]) for f in sorted(known, key=Tensor.numel))

    every = [c for run in cap.runs for c in run.calls]
    if not _lose(kept, _fields(call.outs, call.ins)) and any(
        hold_one(_fields(c.outs, c.ins)) for c in _where_used(every, call)
    ):
        return True
    beside = [f for c in every if c.module == call.module for f in _fields(c.outs, c.ins)]
    unused = [f for c in every for i, known in enumerate(c.outs) if i not in c.used for f in _fields([known])]
    return hold_one(_fields(call.outs)) or hold_one(_fields(call.ins)) or hold(beside) or hold(unused)


def _lose(kept: Tensor, known: Iterable[Tensor]) -> list[Tensor]:
    """Those of some fields of which units go."""
    return [f for f in known if not bool(kept[f.long()].all())]


def _where_used(every: Sequence[Call], call: Call) -> Iterator[Call]:
    """The calls that take up a result without units (a scale made of a size), then those that made operands."""
    users = [] if _fields(call.outs, call.ins) else [c for c in every if any(s is call for s in c.sources)]
    reach = [*users, call]
    seen = set(map(id, reach))
    for one in reach:
        yield one
        new = {id(s): s for s in one.sources if isinstance(s, Call) and id(s) not in seen}
        seen |= set(new)
        reach += new.values()


def _fields(*known: Sequence[Labelled]) -> list[Tensor]:
    return [f for some in known for _, fields in some for f in fields]


def _none_dead(trouble: str) -> str:
    why = trouble or "a dead unit has only zeros for weights, on its way in (with the bias) or on its way out"
    return f"without a sparsity only dead units go, and there are none: {why}. Give a sparsity, such as 0.5"


def _nothing(plan: Plan, trouble: str) -> str:
    largest = max((g for g in plan.groups if g.held == NOT_ASKED), key=lambda group: group.units, default=None)
    if largest is not None and not trouble:
        return (
            f"nothing would go: the largest group, {', '.join(largest.axes[:2])}, has {largest.units} units, and not "
            "one of them is to go. Ask for more to go, or for a smaller round_to or min_width"
        )
    if trouble:
        return f"nothing can be removed: {trouble}. Change the code at that place, or keep the model as it is"
    return (
        f"nothing can be removed. What holds it: {_holds(plan) or 'no forward reaches a weight'}. Change the code at "
        "that place, shrink a larger model of which this is a part, or keep the model as it is"
    )


def _holds(plan: Plan) -> str:
    """What holds the groups that lie in the most places."""
    held = [group for group in plan.groups if group.held not in ("", NOT_ASKED)]
    largest = sorted(held, key=lambda group: -group.units * len(group.axes))[:4]
    return "; ".join(f"{', '.join(group.axes[:2])}: {group.held}" for group in largest)


def _weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
