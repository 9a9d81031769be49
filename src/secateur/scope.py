"""Which tensors may be pruned, why the others may not, and their share of the model; tied tensors count once."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from secateur import anatomy
from secateur.anatomy import Layout, family
from secateur.computed_weights import computed, expression, own_names, package, require_values, set_apart, user_of
from secateur.errors import InputError, InputTypeError, UnknownNameError, nearest, warn
from secateur.support import bits, checks
from secateur.support.tables import Printed, Table, counted, number, percent
from secateur.tying import Holder, holders, holds_twice, parameter_of, refuse_overlaps

Selector = str | type[nn.Module]

_Line = tuple[str, str, int, str]  # name, in or out, weights, why
_MANY_LINES = 60  # in a table of a scope
_FLAT = "a bias, or one-dimensional"

PRUNABLE = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128
"""The dtypes of which weights can be pruned."""


@dataclass(frozen=True)
class Member:
    """One tensor in scope: where it lives, and what its dimensions mean."""

    name: str
    module: nn.Module
    attribute: str
    aliases: tuple[str, ...] = ()
    """The other names of a tied or shared tensor."""
    layout: Layout = field(default_factory=Layout)
    """Where its outputs and inputs stand."""
    padding_row: int | None = None
    """The row of an Embedding for padding: never pruned, never counted."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the module holds it now (`load_state_dict(assign=True)` replaces it)."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    @property
    def protected(self) -> range:
        """Row-major indices that are never pruned."""
        if self.padding_row is None:
            return range(0)
        row = self.parameter.shape[1:].numel()
        return range(self.padding_row * row, (self.padding_row + 1) * row)

    @property
    def free(self) -> int:
        """Weights that may be pruned."""
        return self.parameter.numel() - len(self.protected)


class Scope(Printed, Mapping[str, nn.Parameter]):
    """The tensors that may be pruned, by name, in the model's own order; and why the others may not.

    Reads as `dict[str, Parameter]`; prints as a table of what is in and what was left out. Made by `weights`.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        left_out: Mapping[str, str],
        parameters: int,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.members = dict(members)
        self.left_out = dict(left_out)
        self.modules = tuple(modules)
        """The modules that were looked at, of what is left out too."""
        self.parameters = parameters
        """Numbers in all parameters of the model, tied ones once."""

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.members[name].parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def items(self) -> ItemsView[str, nn.Parameter]:
        return {name: member.parameter for name, member in self.members.items()}.items()

    def values(self) -> ValuesView[nn.Parameter]:
        return {name: member.parameter for name, member in self.members.items()}.values()

    @property
    def size(self) -> int:
        """Weights that may be pruned, in all: the N of a budget."""
        return sum(member.free for member in self.members.values())

    def table(self) -> Table:
        """One row a tensor: what is in, then what is left out and why.

        In a long table those that differ only in numbers of their names share a row: `layers.*.fc.weight`.
        """
        lines = [(m.name, "in", m.free, _remark(m)) for m in self.members.values()]
        lines += [(name, "out", 0, reason) for name, reason in self.left_out.items()]
        rows = [[name, in_or_out, number(n) if n else "", why] for name, in_or_out, n, why in _together(lines)]
        share = percent(self.size / max(self.parameters, 1))
        note = f"{self.size:,} weights in scope, {share} of the {self.parameters:,} parameters of the model"
        return Table(("tensor", "", "weights", "why"), rows, notes=[note])

    def __repr__(self) -> str:
        held = f"{counted(len(self), 'tensor')}, {counted(self.size, 'weight')}"
        return f"Scope({held}; {counted(len(self.left_out), 'tensor')} left out)"


def weights(
    model: nn.Module,
    *,
    only: Selector | Sequence[Selector] | None = None,
    also: Selector | Sequence[Selector] = (),
    skip: Selector | Sequence[Selector] = (),
    where: Callable[[str, nn.Parameter], bool] | None = None,
) -> Scope:
    """Choose the tensors that may be pruned.

    By default: each floating-point or complex weight of two or more dimensions of the layers that secateur knows.
    These are Linear, Conv1d to 3d and their transposes, RNN, LSTM, GRU and their cells, MultiheadAttention; the
    `Conv1D` of transformers, fused experts of a mixture, the layers of PyTorch Geometric; the `weight` of a module that
    has `in_features` and `out_features`; the `weight_raw` of a weight drop. Biases, norms, embeddings (also those tied
    to a head) and adapters of PEFT are left out.

    Args:
        model: the model; wrappers (`torch.compile`, DDP, AveragedModel, Fabric, DeepSpeed) are looked through.
        only: choose these instead: globs on the names of tensors or of modules (`"lstm*"`, `"encoder.*"`), module
            types (`nn.Embedding`), or full names of parameters. Globs and types take tensors of two or more
            dimensions; a full name takes whatever it names, a bias too.
        also: choose these in addition to the default ones, written as for `only`.
        skip: leave these out, written as for `only`; a tied tensor goes by any of its names.
        where: a function `where(name, parameter)`, called for each chosen tensor: False leaves it out.

    Warns:
        SecateurWarning: none of `only`, `also`, `skip`, `where` is given, and of the weights of two or more dimensions
            (embeddings and adapters aside) more than 5 % stay dense, because their modules are unknown.

    Raises:
        UnknownNameError: a name or glob that matches nothing.
        InputTypeError: a chosen tensor of integers or fp8; a scripted model, which does not tell its types.
        InputError: a chosen tensor that is lazy, on the meta device or sharded, is computed by a parametrization or
            by `torch.nn.utils.prune`, or shares some of its memory with another; or nothing is left to prune.

    >>> print(weights(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))))
    tensor         weights                                       why
    --------  ---  -------  ----------------------------------------
    0.weight   in       12                                    Linear
    0.bias    out                a bias, or one-dimensional (Linear)
    1.weight  out           a bias, or one-dimensional (BatchNorm1d)
    1.bias    out           a bias, or one-dimensional (BatchNorm1d)
    12 weights in scope, 57.14 % of the 21 parameters of the model
    """
    model = unwrap(model)
    _refuse_model(model)
    if where is not None:
        checks.function("where", where, "a function (name, parameter) that says whether a tensor is in")
    chosen = None if only is None else _selectors("only", only)
    wanted = _Wanted(chosen, _selectors("also", also), _selectors("skip", skip), where)
    default = wanted == _Wanted(None, (), (), None)
    places = holders(model)
    names = [name for found in places for name, _, _ in found]
    for selector in (*(wanted.only or ()), *wanted.also, *wanted.skip):
        _require_match(selector, model, names)
    apart = set_apart(model)
    members: dict[str, Member] = {}
    left_out: dict[str, str] = {}
    dense: dict[str, Member] = {}  # would count as weights, but are of unknown modules
    for found in places:
        member = _member(found)
        reason = _reason_against(found, wanted, apart)
        if not reason:
            members[member.name] = member
        else:
            left_out[member.name] = reason
            if not any(n in apart for n, _, _ in found) and _is_matrix(model, member):
                dense[member.name] = member
    _refuse_computed(model, wanted)
    for member in members.values():
        require_prunable(member)
    refuse_overlaps(places, members)
    if not members:
        raise InputError("nothing to prune: " + _why_empty(left_out))
    if default:
        _warn_of_dense(dense, sum(member.parameter.numel() for member in members.values()))
    everything = (parameter_of(found[0]) for found in places)
    modules = [module for found in places for _, module, _ in found]
    return Scope(members, left_out, sum(p.numel() for p in everything if not is_lazy(p)), modules)


def resolve(model: nn.Module, given: Mapping[str, nn.Parameter] | None) -> Scope:
    """Turn what a user may pass as `scope=` into a Scope; of a plain dict only the names count.

    Raises:
        InputTypeError: no mapping. InputError: a scope of another model; and as `weights`.
    """
    if given is None:
        return weights(model)
    if not isinstance(given, Mapping):
        raise InputTypeError(f"scope is {checks.kind(given)}: give sc.weights(model, only=..., skip=...)")
    if not isinstance(given, Scope):
        return weights(model, only=list(given))
    own = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for name, parameter in given.items():
        if own.get(name) is not parameter:
            raise InputError(
                f"the scope is of another model: {name} is not a tensor of this model; call sc.weights(model) again"
            )
    return given


_WRAPPERS = {  # package and class: where the model is
    "torch.DataParallel": "module",
    "torch.DistributedDataParallel": "module",
    "torch.AveragedModel": "module",
    "torch.OptimizedModule": "_orig_mod",
    "lightning._FabricModule": "_original_module",
    "lightning_fabric._FabricModule": "_original_module",
    "deepspeed.DeepSpeedEngine": "module",
    "opacus.GradSampleModule": "_module",
}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain model inside `torch.compile`, DDP, AveragedModel and the like, whose own names are then used."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        places = (_WRAPPERS.get(f"{package(kind)}.{kind.__name__}", "") for kind in type(model).__mro__)
        place = next(filter(None, places), None)
        inner = model._modules.get(place) if place is not None else None
        if inner is None:
            return resharded(model)
        model = inner


def resharded(model: nn.Module) -> nn.Module:
    """The same model, whose modules under `fully_shard` hold their shards again.

    After a forward without backward they may hold whole weights, copies that are thrown away at the next one.
    """
    if "torch.distributed.fsdp" in sys.modules:
        for module in model.modules():
            if isinstance(module, sys.modules["torch.distributed.fsdp"].FSDPModule):
                module.reshard()
    return model


def _refuse_model(model: nn.Module) -> None:
    """Refuse models whose tensors cannot be read or identified."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError(
            "a scripted or traced model does not show the types of its layers: prune the model it was made from, and "
            "script or trace it again, or set the same weights to zero here, with masks.apply(model)"
        )
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise InputError(
                f"{name or 'the model'} is wrapped by FullyShardedDataParallel, so that each process holds flat pieces "
                "of its weights: prune before wrapping, or shard it with fully_shard in its place"
            )


@dataclass(frozen=True)
class _Wanted:
    only: tuple[Selector, ...] | None
    also: tuple[Selector, ...]
    skip: tuple[Selector, ...]
    where: Callable[[str, nn.Parameter], bool] | None


def _selectors(name: str, chosen: Selector | Sequence[Selector] | None) -> tuple[Selector, ...]:
    if chosen is None:
        return ()
    one = isinstance(chosen, (str, bytes, type, Tensor)) or not isinstance(chosen, Iterable)
    listed: tuple[Any, ...] = (chosen,) if one else tuple(chosen)  # type: ignore[arg-type]
    for selector in listed:
        if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
            raise InputTypeError(
                f"{name}: {checks.told(selector)} selects nothing: give a glob on names or a module type"
            )
    return listed


def _selects(selector: Selector, name: str, module: nn.Module) -> bool:
    return isinstance(module, selector) if isinstance(selector, type) else matches(selector, name)


def matches(glob: str, name: str) -> bool:
    """Tell whether a glob is that of a tensor, or of a module that holds it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), glob) for i in range(1, len(parts) + 1))


def _require_match(selector: Selector, model: nn.Module, names: list[str]) -> None:
    if isinstance(selector, type):
        if not any(isinstance(module, selector) for module in model.modules()):
            present = sorted({type(module).__name__ for module in model.modules()})
            raise UnknownNameError(f"the model has no {selector.__name__}; it is made of: {', '.join(present)}")
        return
    places = names + [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if not any(fnmatchcase(place, selector) for place in places):
        raise UnknownNameError(f"{selector!r} matches no tensor and no module; {nearest(selector, names)}")


def _reason_against(found: list[Holder], wanted: _Wanted, apart: Mapping[str, str]) -> str:
    """Why a tensor is left out, or an empty string; any one of its names is enough to choose or to skip it."""
    (name, module, _), parameter = found[0], parameter_of(found[0])
    if any(_selects(s, n, m) for s in wanted.skip for n, m, _ in found):
        return "skipped"
    listed = (*(wanted.only or ()), *wanted.also)
    selected = any(_selects(s, n, m) for s in listed for n, m, _ in found)
    replaced = next((apart[n] for n, _, _ in found if n in apart), "")
    if replaced and not selected and wanted.only is None:
        return replaced
    flat = not is_lazy(parameter) and parameter.ndim < 2
    if (flat or all(_is_bias(a) for _, _, a in found)) and not any(n in listed for n, _, _ in found):
        return f"{_FLAT} ({type(module).__name__})"
    if not selected:
        if wanted.only is not None:
            return "not chosen"
        if embedded := _embedded(found):
            return f"{embedded} is not pruned by default"
        if not any(anatomy.is_weight(*user_of(m, a)) for _, m, a in found):
            return f"{type(module).__name__} is not pruned by default"
    if wanted.where is not None and not wanted.where(name, parameter):
        return "where() returned False"
    return ""


def _is_bias(attribute: str) -> bool:
    return attribute.startswith("bias") or attribute.endswith("bias")


def _embedded(found: Sequence[Holder]) -> str:
    """The embedding that a tensor belongs to, and what is tied to it; or an empty string."""
    kinds = [type(m).__name__ for _, m, _ in found if family(m) == "embedding"]
    tied = [n for n, m, _ in found if family(m) != "embedding"]
    return kinds[0] + (f", tied to {', '.join(tied)}," if tied else "") if kinds else ""


def _member(found: list[Holder]) -> Member:
    (name, module, attribute), parameter = found[0], parameter_of(found[0])
    user, used = user_of(module, attribute)
    padding = (getattr(m, "padding_idx", None) for _, m, _ in found if family(m) == "embedding")
    return Member(
        name=name,
        module=module,
        attribute=attribute,
        aliases=tuple(n for n, _, _ in found[1:]),
        layout=anatomy.layout(user, used, parameter),
        padding_row=next((row for row in padding if row is not None), None),
    )


_ASIDE = re.compile(r"embed|token|position|pos_|query|queries|prompt|norm")
"""What is looked up, learned as an input or a norm, by the names of a module's type and of the Parameter in it."""
_MOST_DENSE = 0.05


def _is_matrix(model: nn.Module, member: Member) -> bool:
    """Whether people would count a tensor among the weights: a matrix, and no embedding, norm or learned input."""
    parameter = member.parameter
    path = member.name.rpartition(".")[0].split(".")
    owner = model.get_submodule(
        ".".join(path[: path.index("parametrizations")] if "parametrizations" in path else path)
    )
    if is_lazy(parameter) or sum(length > 1 for length in parameter.shape) < 2 or _is_bias(member.attribute):
        return False
    aside = _ASIDE.search(f"{type(owner).__name__}.{member.attribute}".lower())
    return not aside and family(owner) != "embedding"


def _warn_of_dense(dense: Mapping[str, Member], pruned: int) -> None:
    sizes = {name: member.parameter.numel() for name, member in dense.items()}
    left = sum(sizes.values())
    if left > _MOST_DENSE * (left + pruned):
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        listed = ", ".join(f"{n} ({type(dense[n].module).__name__}, {number(sizes[n])} weights)" for n in largest)
        more = f" and {len(sizes) - len(largest)} more" if len(sizes) > len(largest) else ""
        warn(
            f"{percent(left / (left + pruned))} of the model's weights stay dense and do not count in the sparsity, "
            f"because secateur does not know their modules: {listed}{more}. Take them in with "
            f"scope=sc.weights(model, also={largest[:1]!r}), or say that they stay dense with skip={largest[:1]!r}"
        )


def require_prunable(member: Member) -> None:
    """See that zeros can be written into a tensor, and stay.

    Raises:
        InputError, InputTypeError: they cannot; the message says what to do.
    """
    parameter, name = member.parameter, member.name
    if isinstance(member.module, parametrize.ParametrizationList):
        raise InputError(
            f"{name} is what a parametrization computes a weight from, so its zeros would not be zeros of the weight: "
            "call torch.nn.utils.parametrize.remove_parametrizations on its module, or leave it out of the scope"
        )
    require_values(name, parameter)
    plain = bits.local(parameter.data)
    if type(plain) is not Tensor:
        raise InputError(f"{name} is {checks.kind(plain)}, not a plain tensor: prune before sharding or quantizing")
    if parameter.layout is not torch.strided:
        layout = str(parameter.layout).removeprefix("torch.")
        raise InputError(
            f"{name} is stored as {layout}, and zeros are written into dense tensors only: make it dense first, "
            "module.weight = nn.Parameter(module.weight.to_dense()), or leave it out: "
            f"sc.weights(model, skip=[{name!r}])"
        )
    if holds_twice(parameter):
        raise InputError(
            f"several weights of {name} share one place in memory (it was expanded, or its strides overlap), so that "
            "no single weight can be zero: give each its own memory, parameter.data = parameter.data.contiguous()"
        )
    if parameter.dtype not in PRUNABLE:
        raise InputTypeError(
            f"{name} is {parameter.dtype}: only fp16, bf16, fp32, fp64 and complex weights can be pruned; "
            f"prune before quantizing, or leave it out: sc.weights(model, skip=[{name!r}])"
        )


def _refuse_computed(model: nn.Module, wanted: _Wanted) -> None:
    """Refuse a weight that is recomputed at each forward: zeros written into it would not last."""
    for prefix, module in model.named_modules():
        listed = any(_selects(s, f"{prefix}.weight", module) for s in (*(wanted.only or ()), *wanted.also))
        layer = anatomy.of(module)
        by_default = wanted.only is None and layer is not None and layer.family != "embedding"
        if not (listed or by_default) or any(_selects(s, f"{prefix}.weight", module) for s in wanted.skip):
            continue
        place = prefix or "the model"
        own = own_names(module)
        if any(name.endswith("_mask") and f"{name[:-5]}_orig" in own for name in own):
            raise InputError(
                f"{place} was pruned with torch.nn.utils.prune, which renames its weights: "
                "make it plain first, with sc.from_torch_prune(model)"
            )
        for weight, norm, remedy in computed(module, expression(prefix)):
            leave = f", or leave it out: sc.weights(model, skip=[{prefix!r}])" if prefix else ""
            raise InputError(
                f"{place}: {weight} is computed by {norm}, so zeros in it would not last: call torch.nn.utils.{remedy} "
                f"and prune{leave}"
            )


def _together(lines: Sequence[_Line]) -> Sequence[_Line]:
    """The lines of a scope's table; of many, those that differ only in numbers of their names as one, summed up."""
    if len(lines) <= _MANY_LINES:
        return lines
    groups: dict[tuple[str, str, str], list[_Line]] = {}
    for line in lines:
        name, in_or_out, _, why = line
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        key = ("", "out", _FLAT) if why.startswith(_FLAT) else (pattern, in_or_out, why)
        groups.setdefault(key, []).append(line)
    return [
        (name or "(others)", in_or_out, sum(line[2] for line in found), f"{len(found)} x {why}")
        if len(found) > 1
        else found[0]
        for (name, in_or_out, why), found in groups.items()
    ]


def _remark(member: Member) -> str:
    remarks = [type(member.module).__name__]
    if member.aliases:
        remarks.append("tied to " + ", ".join(member.aliases))
    if member.padding_row is not None:
        remarks.append(f"row {member.padding_row} is padding")
    if member.attribute.endswith("_raw"):
        remarks.append("a weight is computed from it")
    if anatomy.has_own_forward(member.module):
        remarks.append("has a forward of its own, which may not use its zeros as they are")
    return "; ".join(remarks)


def _why_empty(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return "the model has no parameters"
    name, reason = next(iter(left_out.items()))
    remedy = "name the tensors in full: sc.weights(model, only=[...])"
    more = f", and {len(left_out) - 1} more were left out" if len(left_out) > 1 else ""
    return f"{name}: {reason}{more}; {remedy}"
