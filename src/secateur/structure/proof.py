"""The proof: the small model computes what the original does with the same units masked, call by call in step.

A unit that is gone does not count in a statistic over units (norms, means), a masked one would. So those calls of the
masked original run on the kept units only, cut out and put back.

The result of each call is compared, beside the outputs: what a branch computes wrongly shows there, though a factor of
almost zero behind it (LayerScale, a last norm that begins at zero) hides it from the outputs.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.structure.calls import Call, Run, key, replaced, results, tensors
from secateur.structure.constants import constant, varied
from secateur.structure.cut import twin
from secateur.structure.groups import Axis
from secateur.structure.remains import Remains
from secateur.structure.scales import Fold, apply
from secateur.structure.traces import HIDING, Print, Trace, dropping_nothing, fingerprint, prints_apart
from secateur.support.inputs import Arguments

_log = logging.getLogger(__name__)

_STATISTICS = """layer_norm rms_norm group_norm instance_norm mean var std var_mean std_mean normalize norm weight_norm
softmax log_softmax"""
_OVER_KEPT = frozenset(_STATISTICS.split())
_STEP = 1e-3  # a call whose result differs by more, relative to its length, is wrong; rounding stays far below
_EXACT = 1e-4  # what float32 rounds, at most
_HALF = 0.03  # what bfloat16 rounds, at most, where a model runs in nothing else
_ROUNDED = 1e-2  # what differs by less may be rounding: double precision tells

_DRAWING = """bernoulli rand_like randn_like rand randn normal uniform exponential multinomial rrelu gumbel_softmax
randint feature_dropout fractional_max_pool2d fractional_max_pool3d"""
DRAWS = frozenset(_DRAWING.split())
"""Functions that draw numbers, other than dropout."""
_INPUTS = ("given", "mixed")
_VIEWS = ("get.data", "get.T", "get.mT", "get.H", "get.mH")


def repeats(run: Run) -> bool:
    """Whether a forward draws the same numbers for the small model: none for units. Dropout is left out of a proof."""
    return not any(c.name in DRAWS and any(fields for _, fields in (*c.ins, *c.outs)) for c in run.calls)


class _Masked(Trace):
    """The original with units masked, its parameters one at a time, as a call reads them."""

    def __init__(self, remains: Remains, gone: Mapping[int, list[tuple[int, Tensor]]]) -> None:
        """Follow a run; `gone`: of parameters, by id, the dimensions with positions that go, and 1 for what stays."""
        super().__init__(remains.run)
        self._remains, self._gone = remains, gone
        self._plain = {F.linear: self._linear, torch.addmm: self._addmm, F.embedding: self._embedding}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = key(func)
        args, given = dropping_nothing(name, args, kwargs or {})
        plain = self._plain.get(func, func)
        if plain is func and (not name.startswith("get.") or name in _VIEWS):
            masked = {id(t): self._mask(t) for t in tensors((args, given)) if id(t) in self._gone}
            if masked:
                args, given = replaced((args, given), lambda t: masked.get(id(t), t))
        call = self.calls[self.at] if self.ahead(name) else None
        train = name == "batch_norm" and True in (args[5:6] or [given.get("training")])
        if self._gone and call is not None and (name in _OVER_KEPT or train) and any(fields for _, fields in call.ins):
            return self._over_kept(call, func, args, given)
        out = plain(*args, **given)
        outs = results(name, args, out)
        if outs and self.ahead(name):
            known = self._remains.outs[self.at]
            self.note((fingerprint(left.cut(t)) for t, left in zip(outs, known, strict=False)), (args, given))
        return out

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) not in self._gone or weight.ndim < 2:
            return F.linear(self._mask(input), self._mask(weight), bias if bias is None else self._mask(bias))
        out = self._product(F.linear, input, weight, 1)
        return out if bias is None else out + self._mask(bias).to(out.dtype)

    def _addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        if id(mat2) not in self._gone or (beta, alpha) != (1, 1):
            return torch.addmm(*map(self._mask, (input, mat1, mat2)), beta=beta, alpha=alpha)
        return self._product(torch.mm, mat1, mat2, 0) + self._mask(input)

    def _product(self, multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, read: int) -> Tensor:
        """Zeros in what is read and given, in place of zero columns and rows: large weights are not copied."""
        x = self._mask(x)
        out = self._zero(multiply(self._zero(x, weight, read), weight), weight, 1 - read)
        finite = bool(out.sum().isfinite())  # infinite times zero is no number
        return out if finite else multiply(x, self._mask(weight))

    def _embedding(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("max_norm") is not None or any(dim == 0 for dim, _ in self._gone.get(id(weight), ())):
            return F.embedding(input, self._mask(weight), *args, **kwargs)
        out = self._zero(F.embedding(input, weight, *args, **kwargs), weight, 1)
        return out if bool(out.sum().isfinite()) else F.embedding(input, self._mask(weight), *args, **kwargs)

    def _zero(self, t: Tensor, weight: Tensor, dim: int) -> Tensor:
        """Zeros along the last dimension of a tensor where positions of a weight go, if all else is finite."""
        for own, stays in self._gone.get(id(weight), ()):
            t = t * stays.to(t) if own == dim else t
        return t

    def _mask(self, t: Tensor) -> Tensor:
        for dim, stays in self._gone.get(id(t), ()):
            t, stays = t.detach(), stays.to(t).reshape([-1 if d == dim else 1 for d in range(t.ndim)])
            zeros = t * stays  # many times faster than to fill
            t = zeros if bool(zeros.sum().isfinite()) else t.masked_fill(stays == 0, 0)
        return t

    def _over_kept(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = iter(self._remains.ins(call))
        small: dict[int, Tensor] = {}

        def shrink(t: Tensor) -> Tensor:
            if id(t) not in small:
                small[id(t)] = next(known).box(t)
            return small[id(t)]

        args, kwargs = replaced((args, kwargs), shrink)
        if call.name in ("layer_norm", "rms_norm"):
            args = (args[0], tuple(args[0].shape[-len(args[1]) :]), *args[2:])
        if call.name == "group_norm" and args[1] == call.ins[0][0][1]:
            args = (args[0], args[0].shape[1], *args[2:])
        outs = iter(zip(call.outs, self._remains.outs[self.at], strict=True))

        def grow(t: Tensor) -> Tensor:
            (shape, _), left = next(outs)
            for d, line in enumerate(left.lines):
                if line is not None:
                    full = t.new_zeros([*t.shape[:d], shape[d], *t.shape[d + 1 :]])
                    t = full.index_copy_(d, line.to(t.device), t)
            return t

        found = func(*args, **kwargs)
        self.note(map(fingerprint, tensors(found)), (args, kwargs))
        return replaced(found, grow)


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


class Proof:
    """The masked original, beside which small models run.

    Attributes:
        kept: for each label, whether it stays.
    """

    def __init__(self, original: nn.Module, remains: Sequence[Remains], axes: Sequence[Axis] = ()) -> None:
        """Let the original run as small models do.

        Args:
            original: the model, uncut.
            remains: of each run of the capture.
            axes: of the model's tensors; none where the original is to compute as it is, with nothing masked.
        """
        self._original, self._remains, self._axes, self.kept = original, remains, axes, remains[0].kept
        self._limit = tolerance(original)
        self._dtype: torch.dtype | None = None  # of the floats that go in, where it is another than theirs
        self._settled = frozenset[str]()
        self._stirred: Proof | None = None
        self._gone: dict[int, list[tuple[int, Tensor]]] = {}
        named = dict(original.named_parameters())
        for axis in axes:
            stays = self.kept[torch.from_numpy(axis.labels)]
            if axis.name in named and not bool(stays.all()):
                p = named[axis.name]
                self._gone.setdefault(id(p), []).append((axis.dim, stays.to(p)))
        self._traces: dict[tuple[int, str], Trace] = {}

    def fails(
        self, small: nn.Module, known: Sequence[Trace | None], folds: Sequence[Fold] = ()
    ) -> tuple[Call, str, float | None] | None:
        """Compare with a small model: on the examples, and on fresh inputs with other numbers in constant tensors.

        A model of half precision is compared in float32, where it runs.

        Args:
            small: the cut model.
            known: what is known of it on the examples, for each run.
            folds: what was multiplied in it; the results of the calls in between differ.

        Returns None, or the first call that differs, how, and by what factor.
        """
        if self._limit > _EXACT:
            exact = self._in(torch.float32)
            exact._limit = max(_EXACT, self._limit / 8 if folds or not self._axes else 0)  # weights that were rounded
            try:
                return exact._fails(copy.deepcopy(small).float(), [None] * len(known), folds)
            except Exception as error:
                _log.info("no proof in float32: %s", error)
        return self._fails(small, known, folds)

    def _fails(
        self, small: nn.Module, known: Sequence[Trace | None], folds: Sequence[Fold]
    ) -> tuple[Call, str, float | None] | None:
        between = frozenset().union(*(fold.between for fold in folds))
        self._settled = frozenset(fold.call for fold in folds)
        for at, (remains, trace) in enumerate(zip(self._remains, known, strict=True)):
            run = remains.run
            if run.training and not repeats(run):
                continue
            found, proof, other = self.difference(small, at, trace, between), self, small
            if found is None:
                return run.calls[-1], "the masked original makes other calls than the smaller model", None
            for stir in (True, False) if not found.call and not run.training else ():
                try:
                    proof, other = self._stir(small, folds) if stir else (self, small)
                    again = proof.difference(other, at, None, between, "other" if stir else "mixed")
                except Exception as error:
                    _log.info("no proof on fresh inputs: %s", error)
                    continue
                if again is not None:
                    found = again
                    break
            if found.call and not proof._rounding(other, at, found, between):
                worst, call, factor = found
                return found.call, f"differs from the masked original by {worst:.1e}, first after {call}", factor
        return None

    def _in(self, dtype: torch.dtype) -> Proof:
        exact = Proof(copy.deepcopy(self._original).to(dtype), self._remains, self._axes)
        exact._dtype, exact._settled = dtype, self._settled
        return exact

    def _stir(self, small: nn.Module, folds: Sequence[Fold]) -> tuple[Proof, nn.Module]:
        """Both models with other numbers in parameters that have one number only, which may hide what is wrong.

        So begin gates, low ranks, last layers and norms; each model shares the memory of all else with the given one.
        """
        if not self._axes:
            return self, small  # what is dead is dead by its zeros
        generator = torch.Generator().manual_seed(0)
        model, cut = twin(self._original), twin(small)
        ours, theirs, own = (dict(one.named_parameters()) for one in (model, cut, self._original))
        stirred = set()
        for name, p in ours.items():
            if not p.is_floating_point() or not constant(p):
                continue
            full = part = varied(p.detach(), generator)
            for dim, stays in self._gone.get(id(own[name]), ()):
                part = part.index_select(dim, stays.nonzero().flatten())
            if name in theirs and theirs[name].shape == part.shape:
                p.data, theirs[name].data = full, part
                stirred.add(name)
        apply(cut, [one for fold in folds for one in fold.scaled if one.name in stirred])
        if self._stirred is None:
            self._stirred = Proof(model, self._remains, self._axes)
            self._stirred._dtype = self._dtype
        self._stirred._settled = self._settled
        return self._stirred, cut

    def _rounding(self, small: nn.Module, at: int, found: Difference, between: frozenset[str]) -> bool:
        """Whether nothing differs any more where both compute in double precision."""
        if found.worst > _ROUNDED or self._limit > _EXACT:
            return False
        try:
            exact, twice = self._in(torch.float64), copy.deepcopy(small).double()
            again = [exact.difference(twice, at, None, between, how) for how in _INPUTS]
        except Exception as error:
            _log.info("no proof in double precision: %s", error)
            return False
        return all(one is not None and not one.call for one in again)

    def difference(
        self,
        small: nn.Module,
        at: int = 0,
        known: Trace | None = None,
        between: frozenset[str] = frozenset(),
        how: str = "given",
    ) -> Difference | None:
        """How much a small model differs in one run, with its own arguments ("given"), or with fresh ones: see `fresh`.

        Returns None if the forward makes other calls than the run did.
        """
        run = self._remains[at].run
        arguments = run.arguments if how == "given" else fresh(run.arguments, other=how == "other")
        arguments = arguments if self._dtype is None else _in(arguments, self._dtype)
        got = known or Trace(run).of(small, arguments)
        if (at, how) not in self._traces:
            self._traces[at, how] = _Masked(self._remains[at], self._gone).of(self._original, arguments)
        want = self._traces[at, how]
        if not want.at == got.at == len(run.calls):
            return None
        return apart(want, got, self._limit, between, self._settled)


def apart(
    want: Trace, got: Trace, limit: float, between: frozenset[str] = frozenset(), settled: frozenset[str] = frozenset()
) -> Difference:
    """The difference between two traces that made all calls of the same run.

    Args:
        want: what is right.
        got: what is compared with it.
        limit: what rounding explains.
        between: see `Proof.fails`.
        settled: calls that may see another scale, because their operands are multiplied.
    """
    outs = zip(want.out, got.out, strict=True)
    worst = max((distance(a, b) for a, b in outs), default=0.0)
    for at, (call, a, b) in enumerate(zip(want.calls, want.prints, got.prints, strict=True)):
        if call.elastic or (between and str(call) in between):
            continue
        taken = [i for i in range(len(a)) if i in call.used or len(a) == 1]  # weights of attention often are not
        off = max((prints_apart(a[i], b[i]) for i in taken), default=0.0)
        if off > max(_STEP, limit):
            return Difference(max(worst, off), call, _factor(a, b))
        if call.name in HIDING and str(call) not in settled:
            for x, y in zip(want.numbers[at], got.numbers[at], strict=False):
                if not math.isclose(x, y, rel_tol=_STEP):
                    scale = call.name == "scaled_dot_product_attention" and y
                    return Difference(max(worst, abs(x - y) / abs(x or y)), call, x / y if scale else None)
    return Difference(worst, want.calls[-1] if worst > limit else None)


def _factor(a: Sequence[Print], b: Sequence[Print]) -> float | None:
    """The number that makes b of a, if there is one."""
    if len(a) != 1 or len(b) != 1 or a[0][0] != b[0][0] or not b[0][1]:
        return None
    factor = a[0][1] / b[0][1]
    return factor if prints_apart(a[0], (b[0][0], *(n * factor for n in b[0][1:]))) < _STEP else None


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number of `a`; infinite where others are finite."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    if not a.is_floating_point():
        return float(not torch.equal(a, b))
    a, b = (t.double().nan_to_num(posinf=0, neginf=0) for t in (a, b))
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.numel() else 0.0


def _in(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    args, kwargs = tree_map(
        lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tuple(arguments)
    )
    return args, kwargs


def tolerance(model: nn.Module) -> float:
    """The largest difference that rounding explains, for the least exact type among the parameters."""
    eps = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    return max([_EXACT, *(min(16 * one, _HALF) for one in eps if one > 1e-6)])


def fresh(arguments: Arguments, seed: int = 0, other: bool = False) -> Arguments:
    """Other arguments of the same kind: floats are drawn anew, integers change places among themselves.

    Where all numbers of a tensor are the same, they stay, or with `other` become different ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def new(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.is_complex() or t.numel() < 2:
            return t
        same = other and constant(t)
        if not t.is_floating_point():
            found = t.flatten()[torch.randperm(t.numel(), generator=generator).to(t.device)].reshape(t.shape)
            if same and t.dtype != torch.bool:
                step = torch.randint(2, t.shape, generator=generator).to(t)
                found = found + (step if int(t.flatten()[0]) == 0 else -step)
            return found
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        return (noise * (1 if same else t.double().std()) + t.double().mean()).to(t.dtype)

    args, kwargs = arguments
    return tree_map(new, args), tree_map(new, kwargs)
