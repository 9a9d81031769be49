"""Which tensors may be pruned: by type, by name, by predicate; tied and shared tensors counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from secateur import anatomy
from secateur.anatomy import Layout
from secateur.errors import InputError, InputTypeError, UnknownNameError, nearest
from secateur.support.tables import Printed, Table, number

Selector = str | type[nn.Module]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BY_DEFAULT = (nn.Linear, *_CONV, *_TRANSPOSED, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
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
    """A row of an Embedding that is no weight: never pruned, never counted."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the module holds it now (`load_state_dict(assign=True)` replaces it)."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    @property
    def input_dim(self) -> int:
        """The dimension along which inputs are summed."""
        dims = self.layout.dims.removeprefix("g" if self.layout.groups else "")
        return dims.index("i") if "i" in dims else 1

    @property
    def protected(self) -> range:
        """Row-major indices that are never pruned."""
        if self.padding_row is None:
            return range(0)
        row = self.parameter[0].numel()
        return range(self.padding_row * row, (self.padding_row + 1) * row)

    @property
    def free(self) -> int:
        """Weights that may be pruned."""
        return self.parameter.numel() - len(self.protected)


class Scope(Printed, Mapping[str, nn.Parameter]):
    """The tensors that may be pruned, by name, in the model's own order; and why the others may not.

    Reads as `dict[str, Parameter]`; prints as a table of what is in and what was left out. Made by `weights`.
    """

    def __init__(self, members: Mapping[str, Member], left_out: Mapping[str, str]) -> None:
        self.members = dict(members)
        self.left_out = dict(left_out)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.members[name].parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def size(self) -> int:
        """Weights that may be pruned, in all: the N of a budget."""
        return sum(member.free for member in self.members.values())

    def table(self) -> Table:
        """One row a tensor: what is in, then what is left out and why."""
        rows = [[m.name, "in", number(m.free), _remark(m)] for m in self.members.values()]
        rows += [[name, "out", "", reason] for name, reason in self.left_out.items()]
        return Table(("tensor", "", "weights", "why"), rows, notes=[f"{self.size:,} weights in scope"])

    def __repr__(self) -> str:
        return f"Scope({len(self)} tensors, {self.size:,} weights; {len(self.left_out)} tensors left out)"


def weights(
    model: nn.Module,
    *,
    only: Selector | Sequence[Selector] | None = None,
    skip: Selector | Sequence[Selector] = (),
    where: Callable[[str, nn.Parameter], bool] | None = None,
) -> Scope:
    """Choose the tensors that may be pruned.

    By default: each floating-point or complex weight of two or more dimensions of Linear, Conv1d to 3d and their
    transposes, RNN, LSTM, GRU and their cells, and MultiheadAttention. Biases, norms and embeddings are left out.

    Args:
        model: the model; wrappers (`torch.compile`, DDP, AveragedModel) are looked through.
        only: choose these instead: globs on the names of tensors or of modules (`"lstm*"`, `"encoder.*"`), module
            types (`nn.Embedding`), or full names of parameters. Globs and types take tensors of two or more
            dimensions; a full name takes whatever it names, a bias too.
        skip: leave these out, written as for `only`; a tied tensor goes by any of its names.
        where: a last word on each tensor: `where(name, parameter)`.

    Raises:
        UnknownNameError: a name or glob that matches nothing.
        InputTypeError: a chosen tensor of integers or fp8.
        InputError: a chosen tensor that is lazy, on the meta device or sharded, or is computed by a
            parametrization or by `torch.nn.utils.prune`; or nothing is left to prune.

    >>> print(weights(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))))
    tensor         weights                                       why
    --------  ---  -------  ----------------------------------------
    0.weight   in       12                                    Linear
    0.bias    out                a bias or of one dimension (Linear)
    1.weight  out           a bias or of one dimension (BatchNorm1d)
    1.bias    out           a bias or of one dimension (BatchNorm1d)
    12 weights in scope
    """
    model = unwrap(model)
    chosen, left_out_types = _selectors(only), _selectors(skip)
    holders = _holders(model)
    names = [name for found in holders.values() for name, _, _ in found]
    for selector in (*chosen, *left_out_types):
        _require_match(selector, model, names)
    members: dict[str, Member] = {}
    left_out: dict[str, str] = {}
    for found in holders.values():
        name = found[0][0]
        reason = _reason_against(found, chosen, left_out_types, where)
        if reason:
            left_out[name] = reason
        else:
            members[name] = _member(found)
    _refuse_computed(model, chosen, left_out_types)
    for member in members.values():
        _require_prunable(member)
    if not members:
        raise InputError("nothing to prune: " + _why_empty(only, left_out))
    return Scope(members, left_out)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain model inside `torch.compile`, DataParallel, DDP or AveragedModel, so that names stay its own."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        inner = model._modules.get("module" if isinstance(model, _wrappers()) else "_orig_mod")
        if inner is None:
            return model
        model = inner


def _wrappers() -> tuple[type[nn.Module], ...]:
    from torch.optim.swa_utils import AveragedModel

    return nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel


_Holder = tuple[str, nn.Module, str]  # full name, module, attribute


def _holders(model: nn.Module) -> dict[int, list[_Holder]]:
    """All names of each parameter, in the model's order; a tied or shared one has several."""
    found: dict[int, list[_Holder]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(id(parameter), []).append((full, module, attribute))
    return found


def _selectors(given: Selector | Sequence[Selector] | None) -> tuple[Selector, ...]:
    if given is None:
        return ()
    listed = (given,) if isinstance(given, (str, type)) else tuple(given)
    for selector in listed:
        if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
            raise InputTypeError(f"{selector!r} selects nothing: give a glob on names or a module type")
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


def _reason_against(
    found: list[_Holder],
    only: tuple[Selector, ...],
    skip: tuple[Selector, ...],
    where: Callable[[str, nn.Parameter], bool] | None,
) -> str:
    """Why a tensor is left out, or an empty string; any one of its names is enough to choose or to skip it."""
    name, module, attribute = found[0]
    parameter = module._parameters[attribute]
    assert parameter is not None
    if any(_selects(s, n, m) for s in skip for n, m, _ in found):
        return "skipped"
    named_in_full = any(n in only for n, _, _ in found)
    flat = not isinstance(parameter, UninitializedParameter) and parameter.ndim < 2
    if (flat or all(a.startswith("bias") for _, _, a in found)) and not named_in_full:
        return f"a bias or of one dimension ({type(module).__name__})"
    if only and not any(_selects(s, n, m) for s in only for n, m, _ in found):
        return "not chosen"
    if not only and not any(_default(m, a) for _, m, a in found):
        return f"{type(module).__name__} is not pruned by default"
    if where is not None and not where(name, parameter):
        return "where() said no"
    return ""


def _default(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, nn.MultiheadAttention):  # its bias_k and bias_v have three dimensions
        return attribute.endswith("weight")
    return isinstance(module, _BY_DEFAULT) and "weight" in attribute


def _member(found: list[_Holder]) -> Member:
    padding = [m.padding_idx for _, m, a in found if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and a == "weight"]
    name, module, attribute = found[0]
    return Member(
        name=name,
        module=module,
        attribute=attribute,
        aliases=tuple(n for n, _, _ in found[1:]),
        layout=anatomy.layout(module, attribute),
        padding_row=next((row for row in padding if row is not None), None),
    )


def _require_prunable(member: Member) -> None:
    parameter, name = member.parameter, member.name
    if isinstance(member.module, parametrize.ParametrizationList):
        raise InputError(
            f"{name} is what a parametrization computes a weight from, so its zeros would not be zeros of the weight: "
            "call torch.nn.utils.parametrize.remove_parametrizations on its module, or leave it out of the scope"
        )
    if isinstance(parameter, UninitializedParameter):
        raise InputError(f"{name} is lazy: run one batch through the model first, so that its shape is known")
    if parameter.is_meta:
        raise InputError(
            f"{name} is on the meta device and holds no values: materialise it first (to_empty, then load)"
        )
    if type(parameter.data) is not Tensor:
        raise InputError(
            f"{name} is a {type(parameter.data).__name__}, not a plain tensor: prune before sharding or quantizing"
        )
    if parameter.dtype not in PRUNABLE:
        raise InputTypeError(
            f"{name} is {parameter.dtype}: only fp16, bf16, fp32, fp64 and complex weights can be pruned; "
            f"prune before quantizing, or leave it out: sc.weights(model, skip=[{name!r}])"
        )


def _refuse_computed(model: nn.Module, only: tuple[Selector, ...], skip: tuple[Selector, ...]) -> None:
    """Refuse a weight that is recomputed at each forward: zeros written into it would not last."""
    for prefix, module in model.named_modules():
        chosen = any(_selects(s, f"{prefix}.weight", module) for s in only) if only else isinstance(module, _BY_DEFAULT)
        if not chosen or any(_selects(s, f"{prefix}.weight", module) for s in skip):
            continue
        place = prefix or "the model"
        if any(name.endswith("_mask") and f"{name[:-5]}_orig" in module._parameters for name in module._buffers):
            raise InputError(
                f"{place} was pruned with torch.nn.utils.prune, which renames its weights: "
                "make it plain first, with sc.from_torch_prune(model)"
            )
        for weight, norm, remedy in _computed(module, f"model.{prefix}" if prefix else "model"):
            raise InputError(
                f"{place}: {weight} is computed by {norm}, so zeros in it would not last: call torch.nn.utils.{remedy} "
                f"and prune, or leave it out: sc.weights(model, skip=[{prefix!r}])"
            )


def _computed(module: nn.Module, place: str) -> Iterator[tuple[str, str, str]]:
    """Name each weight of a module that is computed from others, what computes it, and how to make it plain."""
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            if "weight" in name:
                remedy = f"parametrize.remove_parametrizations({place}, {name!r})"
                yield name, "a parametrization (weight_norm and its like)", remedy
    for attribute in module._parameters:
        for norm, ending in (("weight_norm", "_g"), ("spectral_norm", "_orig")):
            if "weight" in attribute and attribute.endswith(ending):
                name = attribute.removesuffix(ending)
                yield name, norm, f"remove_{norm}({place}, {name!r})"


def _remark(member: Member) -> str:
    remarks = [type(member.module).__name__]
    if member.aliases:
        remarks.append("tied to " + ", ".join(member.aliases))
    if member.padding_row is not None:
        remarks.append(f"row {member.padding_row} is padding")
    return "; ".join(remarks)


def _why_empty(only: object, left_out: Mapping[str, str]) -> str:
    if not left_out:
        return "the model has no parameters"
    name, reason = next(iter(left_out.items()))
    remedy = "name the tensors in full: sc.weights(model, only=[...])"
    return f"{name}: {reason}" + (f", and {len(left_out) - 1} more were left out" if left_out else "") + f"; {remedy}"
