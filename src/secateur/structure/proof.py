"""The proof: the small model computes what the original does with the same units masked, call by call in step.

A unit that is gone does not count in a statistic over units (norms, means), a masked one would. So those calls of the
masked original run on the kept units only, cut out and put back.

The result of each call is compared, beside the outputs: what a branch computes wrongly shows there, though a factor of
almost zero behind it (LayerScale, a last norm that begins at zero) hides it from the outputs. Results are not stored,
but projected: three random sums of a tensor differ by as much as the tensors do, on average.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from secateur.structure.capture import Call, Run, calm, key, results, tensors
from secateur.structure.fields import Shape, masks, support
from secateur.structure.groups import Axis
from secateur.structure.policy import contract
from secateur.support.inputs import Arguments

_STATISTICS = """layer_norm rms_norm group_norm instance_norm mean var std var_mean std_mean normalize norm weight_norm
softmax log_softmax"""
_OVER_KEPT = frozenset(_STATISTICS.split())
_STEP = 1e-3  # a call whose result differs by more, relative to its length, is wrong; rounding stays far below

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_DROPS = {
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"), 1),
    **dict.fromkeys(_RECURRENT, 5),
    "scaled_dot_product_attention": 4,
    "multi_head_attention_forward": 10,
}
"""Where functions take the share that they drop."""

_DRAWING = """bernoulli rand_like randn_like rand randn normal uniform exponential multinomial rrelu gumbel_softmax
randint feature_dropout fractional_max_pool2d fractional_max_pool3d"""
_DRAWS = frozenset(_DRAWING.split())


def repeats(run: Run) -> bool:
    """Whether a forward draws the same numbers for the small model: none for units. Dropout is left out of a proof."""
    return not any(c.name in _DRAWS and any(fields for _, fields in (*c.ins, *c.outs)) for c in run.calls)


def _dropping_nothing(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    at = _DROPS.get(name)
    if at is None:
        return args, dict(kwargs)
    if name in _RECURRENT and not isinstance(args[3], bool):
        at += 1  # packed sequences have their batch sizes in front
    if len(args) > at:
        args = (*args[:at], 0.0, *args[at + 1 :])
    return args, {k: 0.0 if k in ("p", "dropout_p") else v for k, v in kwargs.items()}


Print = tuple[int, Tensor]
"""How many numbers a tensor has, its length, and three random sums."""


class _Steps(TorchFunctionMode):
    """Counts the calls that were captured, and takes a print of the results of each."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.calls, self.at = calls, 0
        self.prints: list[list[Print]] = []

    def step(self, name: str) -> Call | None:
        if self.at < len(self.calls) and self.calls[self.at].name == name:
            self.at += 1
            return self.calls[self.at - 1]
        return None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = key(func)
        args, kwargs = _dropping_nothing(name, args, kwargs or {})
        out = func(*args, **kwargs)
        outs = results(name, args, out)
        if outs and self.step(name):
            self.prints.append([_print(t) for t in outs])
        return out


class _Masked(_Steps):
    """The original with units masked, its parameters one at a time, as a call reads them."""

    def __init__(self, calls: Sequence[Call], kept: Tensor, parameters: Mapping[int, list[Axis]]) -> None:
        super().__init__(calls)
        self.kept, self.parameters = kept, parameters

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = key(func)
        args, given = _dropping_nothing(name, args, kwargs or {})
        if not name.startswith("get.") or name in ("get.data", "get.T", "get.mT", "get.H", "get.mH"):
            args, given = tree_map(self._mask, args), tree_map(self._mask, given)
        ahead = self.at < len(self.calls) and self.calls[self.at].name == name
        call = self.calls[self.at] if ahead else None
        train = name == "batch_norm" and True in (args[5:6] or [given.get("training")])
        if (
            self.parameters
            and call is not None
            and (name in _OVER_KEPT or train)
            and any(fields for _, fields in call.ins)
        ):
            self.at += 1
            return self._over_kept(call, func, args, given)
        out = func(*args, **given)
        outs = results(name, args, out)
        if outs and self.step(name) is call and call is not None:
            known = zip(outs, call.outs, strict=False)
            self.prints.append([_print(self._closed(t, *one)) for t, one in known])
        return out

    def _mask(self, t: Any) -> Any:
        axes = self.parameters.get(id(t)) if isinstance(t, Tensor) else None
        if not axes:
            return t
        masked = t.detach()
        for axis in axes:
            gone = (~self.kept[torch.from_numpy(axis.labels)]).nonzero().flatten().to(t.device)
            if len(gone):
                masked = masked.index_fill(axis.dim, gone, 0)
        return masked

    def _closed(self, t: Tensor, shape: Shape, fields: Sequence[Tensor]) -> Tensor:
        """What stays of a result, close together; flat where lines keep different positions."""
        stays = masks(shape, fields, self.kept)
        inner: Tensor | None = None
        for f in fields:
            if len(support(f)) > 1:
                some = self._cut(
                    self.kept[f.long()], [m if n > 1 else None for m, n in zip(stays, f.shape, strict=True)]
                )
                if not bool(some.all()):
                    inner = some if inner is None else inner & some
        t = self._cut(t, stays)
        return t if inner is None else t[inner.to(t.device).expand(t.shape)]

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

        found = func(*args, **kwargs)
        self.prints.append([_print(t) for t in tensors(found)])
        return tree_map(grow, found)


_CHUNK = 1 << 18


@functools.cache
def _random() -> Tensor:
    return torch.randn(3, _CHUNK, generator=torch.Generator().manual_seed(1))


def _print(t: Tensor) -> Print:
    if not (t.is_floating_point() or t.is_complex()):  # what is chosen from numbers is as right as they are
        return 0, torch.zeros(4)
    t = t.detach().to_dense() if t.layout is not torch.strided else t.detach()
    v = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).flatten().float()
    length = torch.linalg.vector_norm(v)
    if not bool(length.isfinite()):  # masks of -inf, or of the least number of a type
        v = torch.where(v.abs() < 1e15, v, 0)
        length = torch.linalg.vector_norm(v)
    random = _random().to(v.device)
    sums = sum(random[:, : len(part)] @ part * random[0, i] for i, part in enumerate(torch.split(v, _CHUNK)))
    return v.numel(), torch.cat([length[None], torch.as_tensor(sums)]).cpu()


class Difference(NamedTuple):
    """Between a small model and the original.

    Attributes:
        worst: relative to the largest number of an output, or to the length of a call's result.
        call: where it begins, if it is above the limit.
        factor: if the result of that call is wrong by a factor only, what it should be multiplied by.
    """

    worst: float
    call: Call | None
    factor: float | None = None


def difference(
    original: nn.Module,
    small: nn.Module,
    run: Run,
    arguments: Arguments,
    kept: Tensor,
    axes: Sequence[Axis],
    between: frozenset[str] = frozenset(),
) -> Difference | None:
    """How much the small model differs from the masked original, relative to the largest number of an output.

    Args:
        original: the model, uncut.
        small: the cut one.
        run: of the capture.
        arguments: of the forward: those of the run, or fresh ones.
        kept: for each label, whether it stays.
        axes: of the model's tensors; none where the original is to compute as it is, with nothing masked.
        between: calls whose results differ by a factor that a later one takes back; see `scales`.

    Returns the difference, and the call where it begins if it is above the limit. None if the forward with these
    arguments makes other calls than the run did.
    """
    limit = tolerance(original)
    named = dict(original.named_parameters())
    parameters: dict[int, list[Axis]] = {}
    for axis in axes:
        if axis.name in named:
            parameters.setdefault(id(named[axis.name]), []).append(axis)
    args, kwargs = arguments
    with calm(small, run.training), _Steps(run.calls) as ours:
        got = small(*args, **kwargs)
    with calm(original, run.training), _Masked(run.calls, kept, parameters) as theirs:
        want = original(*args, **kwargs)
    if not ours.at == theirs.at == len(run.calls):
        return None
    pairs = zip(tensors(contract(want)), tensors(contract(got)), strict=True)
    worst = max((_apart(a, b) for a, b in pairs), default=0.0)
    for call, a, b in zip(run.calls, theirs.prints, ours.prints, strict=True):
        apart = 0.0 if call.elastic or str(call) in between else max(map(_prints_apart, a, b), default=0.0)
        if apart > max(_STEP, limit):
            return Difference(max(worst, apart), call, _factor(a, b))
    return Difference(worst, run.calls[-1] if worst > limit else None)


def _prints_apart(a: Print, b: Print) -> float:
    if a[0] != b[0]:
        return float("inf")
    return float((a[1] - b[1]).abs().max() / a[1][0].clamp_min(1e-12))


def _factor(a: Sequence[Print], b: Sequence[Print]) -> float | None:
    """The number that makes b of a, if there is one."""
    if len(a) != 1 or len(b) != 1 or a[0][0] != b[0][0] or not float(b[0][1][0]):
        return None
    factor = float(a[0][1][0] / b[0][1][0])
    return factor if _prints_apart(a[0], (b[0][0], b[0][1] * factor)) < _STEP else None


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    if not a.is_floating_point():
        return float(not torch.equal(a, b))
    a, b = (t.double().nan_to_num(posinf=0, neginf=0) for t in (a, b))
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.numel() else 0.0


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
