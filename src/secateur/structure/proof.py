"""The proof: the small model computes what the original does with the same units masked, call by call in step.

A unit that is gone does not count in a statistic over units (norms, means), a masked one would. So those calls of the
masked original run on the kept units only, cut out and put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from secateur.structure.capture import Call, Run, calm, key, results, tensors
from secateur.structure.fields import masks
from secateur.structure.groups import Axis
from secateur.structure.policy import contract
from secateur.support.inputs import Arguments

_STATISTICS = """layer_norm rms_norm group_norm instance_norm mean var std var_mean std_mean normalize norm weight_norm
softmax log_softmax"""
_OVER_KEPT = frozenset(_STATISTICS.split())


class _Steps(TorchFunctionMode):
    """Counts the calls that were captured, and takes a fingerprint of the results of each, if asked."""

    def __init__(self, calls: Sequence[Call], closely: bool) -> None:
        super().__init__()
        self.calls, self.at, self.closely = calls, 0, closely
        self.prints: list[list[Tensor] | None] = []

    def step(self, name: str) -> Call | None:
        if self.at < len(self.calls) and self.calls[self.at].name == name:
            self.at += 1
            return self.calls[self.at - 1]
        return None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out, name = func(*args, **kwargs or {}), key(func)
        outs = results(name, args, out)
        if outs and self.step(name):
            self.prints.append([_fingerprint(t) for t in outs] if self.closely else None)
        return out


class _Masked(_Steps):
    """The original with units masked, its parameters one at a time, as a call reads them."""

    def __init__(
        self, calls: Sequence[Call], closely: bool, kept: Tensor, parameters: Mapping[int, list[Axis]], masked: bool
    ) -> None:
        super().__init__(calls, closely)
        self.kept, self.parameters, self.masked = kept, parameters if masked else {}, masked

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = key(func)
        if not name.startswith("get.") or name in ("get.data", "get.T", "get.mT", "get.H", "get.mH"):
            args, kwargs = tree_map(self._mask, args), tree_map(self._mask, dict(kwargs or {}))
        kwargs = dict(kwargs or {})
        ahead = self.at < len(self.calls) and self.calls[self.at].name == name
        call = self.calls[self.at] if ahead else None
        train = name == "batch_norm" and True in (args[5:6] or [kwargs.get("training")])
        if self.masked and call is not None and (name in _OVER_KEPT or train) and any(fields for _, fields in call.ins):
            self.at += 1
            self.prints.append(None)
            return self._over_kept(call, func, args, kwargs)
        out = func(*args, **kwargs)
        outs = results(name, args, out)
        if outs and self.step(name) is call and call is not None:
            known = zip(outs, call.outs, strict=False)
            cuts = (self._cut(t, masks(*one, self.kept)) for t, one in known) if self.closely else ()
            self.prints.append([_fingerprint(t) for t in cuts] if self.closely else None)
        return out

    def _mask(self, t: Any) -> Any:
        axes = self.parameters.get(id(t)) if isinstance(t, Tensor) else None
        if not axes:
            return t
        masked = t.detach().clone()
        for axis in axes:
            gone = ~self.kept[torch.from_numpy(axis.labels)]
            if bool(gone.any()):
                masked.index_fill_(axis.dim, gone.nonzero().flatten().to(t.device), 0)
        return masked

    def _cut(self, t: Tensor, stays: Sequence[Tensor | None]) -> Tensor:
        for d, mask in enumerate(stays):
            if mask is not None:
                t = t.index_select(d, mask.nonzero().flatten().to(t.device))
        return t

    def _over_kept(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = iter(call.ins)
        small: dict[int, Tensor] = {}

        def shrink(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            if id(t) not in small:
                small[id(t)] = self._cut(t, masks(*next(known), self.kept))
            return small[id(t)]

        args, kwargs = tree_map(shrink, args), tree_map(shrink, kwargs)
        if call.name in ("layer_norm", "rms_norm"):
            args = (args[0], tuple(args[0].shape[-len(args[1]) :]), *args[2:])
        if call.name == "group_norm" and args[1] == call.ins[0][0][1]:
            args = (args[0], args[0].shape[1], *args[2:])
        outs = iter(call.outs)

        def grow(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            shape, fields = next(outs)
            stays = masks(shape, fields, self.kept)
            if all(mask is None for mask in stays):
                return t
            shape = tuple(
                n if mask is not None else t.shape[d] for d, (n, mask) in enumerate(zip(shape, stays, strict=True))
            )
            full = torch.zeros(shape, dtype=t.dtype, device=t.device)
            at = [torch.arange(n) if m is None else m.nonzero().flatten() for n, m in zip(shape, stays, strict=True)]
            full[torch.meshgrid(*at, indexing="ij")] = t
            return full

        return tree_map(grow, func(*args, **kwargs))


def _fingerprint(t: Tensor) -> Tensor:
    """Two sums over a tensor, one of them weighted by place; with the sum of magnitudes to compare them by."""
    t = t.to_dense() if t.layout is not torch.strided else t
    values = t.detach().double().flatten().nan_to_num(posinf=0, neginf=0) if not t.is_complex() else t.abs().flatten()
    place = torch.linspace(1, 2, len(values), dtype=torch.float64, device=t.device)
    return torch.stack([values.abs().sum(), (values * place).sum()]).cpu()


def difference(
    original: nn.Module,
    small: nn.Module,
    run: Run,
    arguments: Arguments,
    kept: Tensor,
    axes: Sequence[Axis],
    limit: float,
    masked: bool = True,
) -> tuple[float, Call | None] | None:
    """How much the small model differs from the masked original, relative to the largest number of an output.

    Args:
        original: the model, uncut.
        small: the cut one.
        run: of the capture.
        arguments: of the forward: those of the run, or fresh ones.
        kept: for each label, whether it stays.
        axes: of the model's tensors.
        limit: differences up to this one are none.
        masked: whether the units that go are masked in the original. Else it computes as it is.

    Returns the difference, and the call where it begins if it is above the limit. None if the forward with these
    arguments makes other calls than the run did.
    """
    named = dict(original.named_parameters())
    parameters: dict[int, list[Axis]] = {}
    for axis in axes:
        if axis.name in named:
            parameters.setdefault(id(named[axis.name]), []).append(axis)
    args, kwargs = arguments
    for closely in (False, True):
        with calm(small, run.training), _Steps(run.calls, closely) as ours:
            got = small(*args, **kwargs)
        with calm(original, run.training), _Masked(run.calls, closely, kept, parameters, masked) as theirs:
            want = original(*args, **kwargs)
        if not ours.at == theirs.at == len(run.calls):
            return None
        pairs = zip(tensors(contract(want)), tensors(contract(got)), strict=True)
        worst = max((_apart(a, b) for a, b in pairs), default=0.0)
        if worst <= limit:
            return worst, None
    prints = zip(run.calls, theirs.prints, ours.prints, strict=True)
    return worst, next((call for call, a, b in prints if _differ(a, b)), run.calls[-1])


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    if not a.is_floating_point():
        return float(not torch.equal(a, b))
    a, b = (t.double().nan_to_num(posinf=0, neginf=0) for t in (a, b))
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.numel() else 0.0


def _differ(a: Sequence[Tensor] | None, b: Sequence[Tensor] | None) -> bool:
    return (
        a is not None
        and b is not None
        and any(bool(((x - y).abs() > 1e-4 * x[0] + 1e-12).any()) for x, y in zip(a, b, strict=False))
    )


def tolerance(model: nn.Module) -> float:
    """The largest difference that rounding explains, for the least exact type among the parameters."""
    eps = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    return max([1e-4, *(16 * one for one in eps if one > 1e-6)])


def fresh(arguments: Arguments, seed: int = 0) -> Arguments:
    """Other arguments of the same kind: floats are drawn anew, integers change places among themselves."""
    generator = torch.Generator().manual_seed(seed)

    def other(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.is_complex() or t.numel() < 2:
            return t
        if not t.is_floating_point():
            return t.flatten()[torch.randperm(t.numel(), generator=generator).to(t.device)].reshape(t.shape)
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        return (noise * t.double().std() + t.double().mean()).to(t.dtype)

    args, kwargs = arguments
    return tree_map(other, args), tree_map(other, kwargs)
