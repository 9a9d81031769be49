"""What `shrink` is asked for: its options, read and checked before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.calibration.statistics import Statistics
from secateur.errors import InputError, InputTypeError, UnknownNameError, nearest
from secateur.measurement.costs import is_plain
from secateur.scope import matches
from secateur.scores import Score
from secateur.structure import criteria
from secateur.structure import elimination as elimination  # registers its criteria
from secateur.structure.allocation import ALLOCATIONS, Allocation
from secateur.structure.calls import tensors
from secateur.structure.criteria import UnitScore
from secateur.structure.cut import named_tensors
from secateur.structure.meta import empty
from secateur.structure.plan import Plan
from secateur.structure.targets import Target
from secateur.support import checks
from secateur.support.inputs import Arguments, arguments


class Options(TypedDict, total=False):
    """What `shrink` and `propose` can be told.

    Attributes:
        macs, params, latency: instead of a sparsity, the fraction that remains of the given model's
            multiply-accumulates (of all examples), of its parameters, or of the time of a call (of the first example,
            measured side by side). Above 0 and below 1; met within 0.05, or an error says what can be met.
        depth: the fraction that remains of the residual blocks: modules of a list (nn.ModuleList, nn.Sequential) that
            add to what they take. Those go whose absence changes the outputs least, and in each list one stays. Above
            0 and below 1; exactly round(depth * blocks) remain. Beside a sparsity, first blocks go, then units.
        masks: from `prune` or a `Pruner`: the units that they leave dead go, and no others. Not with a sparsity.
        plan: from `propose`, for this model or a copy: what it removes goes, and no others. Not with a sparsity.
        score: how much each unit matters: a name of `secateur.structure.CRITERIA` or `sc.scores.SCORES`, what
            `sc.accumulate` returns, or a function (name, parameter) to scores of its shape. A unit's score is the sum
            over all of its weights. Default: "l2", their squares; with `stats` "energy", what their readers lose.
        allocation: which units are ranked together, a name of `secateur.structure.ALLOCATIONS`. Default: "uniform",
            each group alone.
        round_to: dimensions that are cut keep a multiple of so many positions of each group. Default: 1.
        min_width: and at least so many. Default: 1.
        keep: tensors and modules that keep their shapes, and blocks that stay: a glob of names, a module, or several
            of these.
        verify: compare with the masked original, on the examples and on fresh inputs. Default: True.
        stats: from `sc.calibrate` of this model: the layers that read removed units are fitted anew, by least squares
            on what stays, and "energy" and "greedy" rank units by it. Where that brings the outputs, on the batches to
            check on, no nearer to the given model's, the layers are only cut; else these batches are fitted to in the
            end, too. Not with masks, dead units or a depth.
        optimizer: of the model; it trains the small model from then on, with what it remembers cut.
    """

    macs: float
    params: float
    latency: float
    depth: float
    masks: Mapping[str, Tensor]
    plan: Plan
    score: str | Score | UnitScore | Mapping[str, Tensor]
    allocation: str | Allocation
    round_to: int
    min_width: int
    keep: str | nn.Module | Sequence[str | nn.Module]
    verify: bool
    stats: Statistics | None
    optimizer: torch.optim.Optimizer | None


@dataclass(frozen=True)
class Ask:
    """What is asked for, as read from the options.

    Attributes:
        share: of the units that goes.
        target: or what is to remain.
        plan: or what goes; where none of the three is given, the dead ones go.
        score: how much each unit matters.
        named: the score, in words.
        allocation, round_to, min_width, verify: see `Options`.
        keep: tensors that keep their shapes, and why.
        depth: of the blocks that remains; None: all of them.
        masked: whether masks were given.
        stats: see `Options`.
    """

    share: float | None
    target: Target | None
    plan: Plan | None
    score: UnitScore
    named: str
    allocation: Allocation
    round_to: int
    min_width: int
    keep: dict[str, str]
    verify: bool
    depth: float | None
    masked: bool
    stats: Statistics | None

    @property
    def dead(self) -> bool:
        """Whether exactly the dead units go."""
        return self.share is None and self.target is None and self.plan is None

    @property
    def exact(self) -> bool:
        """Whether the function is to stay what it is: nothing is masked in the original that proves it."""
        return self.dead or (self.plan is not None and bool(self.plan.shifts))

    @property
    def narrower(self) -> bool:
        """Whether units are to go, and not blocks alone."""
        if self.plan is not None:
            return bool(self.plan.kept) or not self.plan.blocks
        return self.depth is None or self.masked or not self.dead


def read(model: nn.Module, sparsity: float | None, options: Options) -> Ask:
    """Read a sparsity and the options beside it.

    Raises:
        InputError, InputTypeError, UnknownNameError: as `shrink` says.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise InputTypeError(f"there is no option {name}: choose {', '.join(Options.__annotations__)}")
    asked: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
    asked |= {
        what: options[what] for what in ("macs", "params", "latency", "masks", "plan") if options.get(what) is not None
    }
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are given together: each says what goes, so give one of them")
    masks, plan = asked.pop("masks", None), asked.pop("plan", None)
    if plan is not None and not isinstance(plan, Plan):
        raise checks.wrong("plan", plan, "what propose(...) returned, or Plan.from_json(text)")
    for what, amount in asked.items():
        _check_fraction(what, amount, "of units to remove" if what == "sparsity" else f"of the {what} that remains")
    depth = options.get("depth")
    if depth is not None:
        _check_depth(depth, [*asked, *(["plan"] if plan is not None else [])], options.get("score"))
    idle = [name for name in ("score", "allocation", "round_to", "min_width") if not asked and name in options]
    if idle:
        whose = "the masks say" if masks is not None else "zeros say" if plan is None else "the plan says"
        where = f"{whose} which units go" if depth is None else "only blocks go"
        raise InputError(f"{idle[0]} chooses nothing where {where}: leave it out, or give a sparsity")
    stats = options.get("stats")
    if stats is not None:
        exact = not asked and (plan is None or bool(plan.shifts))
        _check_statistics(model, stats, exact, shorter=depth is not None or (plan is not None and bool(plan.blocks)))
    for name in ("round_to", "min_width"):
        checks.whole(name, options.get(name, 1), 1, "a number of positions")
    checks.flag("verify", options.get("verify", True))
    if empty(model):
        _without_weights(asked, options)
    rule = options.get("allocation", "uniform")
    rule = ALLOCATIONS.find(rule) if isinstance(rule, str) else rule
    checks.function("allocation", rule, "a name, or a function (groups, model) that returns the pool of each cell")
    score = options.get("score", "l2" if stats is None else "energy")
    return Ask(
        share=sparsity,
        target=next((Target(what, amount) for what, amount in asked.items() if what != "sparsity"), None),
        plan=plan,
        score=criteria.resolve(score, stats),
        named=checks.told(score),
        allocation=rule,
        round_to=options.get("round_to", 1),
        min_width=options.get("min_width", 1),
        keep=_keeping(model, options.get("keep", ())),
        verify=options.get("verify", True),
        depth=depth,
        masked=masks is not None,
        stats=stats,
    )


def _check_fraction(what: str, amount: object, meant: str) -> None:
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < 1:
        raise InputError(f"{what} is {amount!r}: give the fraction {meant}, between 0 and 1")


def _check_depth(depth: float, beside: Iterable[str], score: object) -> None:
    _check_fraction("depth", depth, "of the blocks that remains")
    for what in beside:
        if what != "sparsity":
            raise InputError(
                f"depth and {what} are given together, and it is not clear what each is to take: shrink with "
                f"depth={depth:g} first, then shrink the result with {what}="
            )
    if score is not None and not isinstance(score, str):
        raise InputError(
            "score knows weights by their names, which change where blocks go: shrink with depth= first, then score "
            "the result and shrink it"
        )


def _check_statistics(model: nn.Module, stats: object, exact: bool, shorter: bool) -> None:
    if not isinstance(stats, Statistics):
        raise checks.wrong("stats", stats, "what sc.calibrate(model, batches) returned")
    if shorter:
        raise InputError(
            "stats are of the inputs that layers have now, and blocks that go change them: shrink with depth= first, "
            "then calibrate the result, and shrink it with its own stats="
        )
    if exact:
        raise InputError(
            "only units go that are dead, with which nothing is lost that stats could restore: leave stats out; to fit "
            "what masks left, call sc.refit(model, masks, stats) first"
        )
    stats.require(model)


def _without_weights(asked: Mapping[str, float], options: Options) -> None:
    """See that what is asked for needs no weights."""
    needs = {
        "what blocks do to the outputs": options.get("depth") is not None,
        "which units are dead": not asked and options.get("plan") is None,
        "the time of a call": "latency" in asked,
        "how layers are fitted anew": options.get("stats") is not None,
    }
    what = next((what for what, asks in needs.items() if asks), None)
    if what is not None:
        raise InputError(
            f"the model is on the meta device, without weights that tell {what}: give a sparsity, macs or params"
        )
    if options.get("verify", True):
        raise InputError(
            "the model is on the meta device, without weights to prove anything with: give verify=False, and prove "
            "the plan later, with sc.shrink(model, example_inputs, plan=plan) of the model with its weights"
        )


def _keeping(model: nn.Module, keep: str | nn.Module | Sequence[str | nn.Module]) -> dict[str, str]:
    """The tensors that keep their shapes, and why."""
    paths = {id(m): path for path, m in model.named_modules()}
    names = list(named_tensors(model))
    found: dict[str, str] = {}
    several = (keep,) if isinstance(keep, str | nn.Module) else keep
    checks.several("keep", several, "a name, a glob, a module, or a list of these")
    for one in several:
        if isinstance(one, nn.Module):
            if id(one) not in paths:
                raise InputError(f"keep has {checks.kind(one)} that is none of the model's modules: give its own")
            matched = [n for n in names if n.startswith(f"{paths[id(one)]}.".lstrip("."))]
            found.update(dict.fromkeys(matched, f"kept, as keep={paths[id(one)]!r} asks"))
            continue
        if not isinstance(one, str):
            raise checks.wrong("keep", one, "names, globs or modules")
        matched = [n for n in names if matches(one, n)]
        if not matched:
            raise UnknownNameError(
                f"keep={one!r} matches no tensor or module; {nearest(one, [*names, *paths.values()])}"
            )
        found.update(dict.fromkeys(matched, f"kept, as keep={one!r} asks"))
    return found


def checked(model: nn.Module, inputs: Any) -> list[Arguments]:
    """The examples, where the model and these can be used at all.

    Raises:
        InputError, InputTypeError: as `shrink` says.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model is {checks.kind(model)}: give an nn.Module")
    if isinstance(model, torch.jit.ScriptModule) or any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise InputError("the model is scripted, and its code cannot be followed: shrink the model it was made from")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InputError(
            "the model is wrapped for several processes or devices: shrink model.module, and wrap the result"
        )
    if hasattr(model, "_orig_mod"):
        raise InputError("the model is compiled: shrink model._orig_mod, and compile what is returned")
    for path, module in model.named_modules():
        if "_secateur" in vars(module):
            raise InputError(
                f"{path or 'the model'} is accelerated, so that it computes with packed copies of its weights: shrink "
                "sc.dense(model), and accelerate what is returned"
            )
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(t):
            raise InputError(f"{name} has no shape yet: run the model once, then shrink it")
        if t.is_quantized or type(t).__module__.partition(".")[0] in ("bitsandbytes", "torchao"):
            raise InputError(f"{name} is quantized: shrink the model first, then quantize it")
        if t.is_inference():
            raise InputError(f"{name} was made in inference mode, and cannot be copied: make the model outside of it")
        if type(t).__module__.startswith("torch.distributed"):
            raise InputError(f"{name} is sharded: shrink the whole model on one process, then shard it")
        if t.is_meta and (not empty(model) or any(hasattr(m, "_hf_hook") for m in model.modules())):
            raise InputError(f"{name} has no weights here, they are offloaded: load it without a device_map")
    for one, other in _overlapping(model):
        raise InputError(
            f"{one} and {other} are two tensors in one memory, and would part: let both be the same parameter, or "
            "compute one of the other in the forward"
        )
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise InputError(f"{path} is compiled: compile the whole model instead, after it was shrunk")
        if module._compiled_call_impl is not None:
            raise InputError(
                f"{path or 'the model'} was compiled in place: shrink copy.deepcopy(model), which is not, and compile "
                "what is returned"
            )
        if type(module).__module__.startswith("torch.ao.nn") and ".quantized" in type(module).__module__:
            raise InputError(f"{path} is quantized: shrink the model first, then quantize it")
        for attribute, t in vars(module).items():
            if isinstance(t, Tensor) and not t.is_leaf:
                name = f"{path}.{attribute}".lstrip(".")
                raise InputError(
                    f"{name} is computed from other weights, and cannot be copied: make it plain first, with "
                    "sc.from_torch_prune(model) or torch.nn.utils.remove_weight_norm(module)"
                )
    if isinstance(inputs, list) and not inputs:
        raise InputError("example_inputs is an empty list: give at least one example")
    examples = [arguments(one, empty(model)) for one in (inputs if isinstance(inputs, list) else [inputs])]
    given = [t for t in tensors(examples) if not t.is_meta]
    if any(t.is_floating_point() and bool(t.isnan().any()) for t in given):
        raise InputError("example_inputs hold NaN, with which no difference would show: give numbers")
    if given and not any(t.numel() for t in given):
        raise InputError(f"example_inputs hold no number, {tuple(given[0].shape)}: give a batch of one or more")
    return examples


def _overlapping(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a parameter and another tensor that share numbers; buffers, mostly constants, may share some."""
    named = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if is_plain(t) and t.numel()}
    places = []
    for name, t in named.items():
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        places += [] if t.is_meta else [(str(t.device), t.data_ptr(), t.data_ptr() + last * t.itemsize, name)]
    before: dict[tuple[str, bool], tuple[int, str]] = {}  # of parameters and of buffers, that which ends last so far
    for device, start, end, name in sorted(places):
        trained = isinstance(named[name], nn.Parameter)
        for kind in (True, False) if trained else (True,):
            reach, other = before.get((device, kind), (-1, ""))
            if start <= reach:
                yield other, name
        before[device, trained] = max((end, name), before.get((device, trained), (-1, "")))
