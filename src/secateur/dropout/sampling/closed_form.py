"""Mean and variance under dropout in closed form, where the model allows it: without samples and their error."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.dropout.interception.followers import Follower, Unsuitable
from secateur.dropout.interception.handlers import Combine, DropoutCall
from secateur.dropout.interception.isolation import require_rest, undisturbed
from secateur.dropout.sampling.fingerprints import fingerprint, spec
from secateur.dropout.sampling.passes import Run, SamplingPlan
from secateur.errors import InputError, warn
from secateur.support import bits
from secateur.support.inputs import arguments

__all__ = ["Moments", "closed_form"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a model's output under its dropout, exact but for rounding.

    Attributes:
        mean: `[batch, ..., outputs]`; of usual dropout the output in `eval()`.
        variance: of the same shape.
    """

    mean: Tensor
    variance: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation, of the shape of the mean."""
        return self.variance.sqrt()


def closed_form(model: nn.Module, inputs: Any) -> Moments:
    """Compute mean and variance of the output where nothing but a Linear layer follows the only dropout.

    With `y = W (m * h) / (1 - p) + b` and independent m of Bernoulli(1 - p): `E y = W h + b`, and
    `Var y_i = p / (1 - p) sum_j W_ij^2 h_j^2` (as in Wang & Manning 2013, "Fast dropout training", section 2). Each
    output alone: their covariances are not computed. Also for alpha dropout.

    Args:
        model: in `eval()`; it runs once.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        StateError: the model is in training mode.
        InputError: no dropout, more than one, or something else than one Linear after it: take samples.

    >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)).eval()
    >>> x = torch.randn(2, 4)
    >>> found = closed_form(model, x)
    >>> torch.allclose(found.mean, model(x), atol=1e-6), found.std.shape
    (True, torch.Size([2, 3]))
    """
    run = Run(model, arguments(inputs), None, 0, shared=False)
    require_rest(model)
    with undisturbed():
        watcher, answer = _watched(run)
        for unreached in run.plan.found.unreached:
            warn(f"closed_form leaves noise out: {unreached}")
        if watcher.dropped is None:
            raise InputError(f"there is no closed form: {watcher.refusal}; {_REMEDY}")
        if watcher.refusal or watcher.linear is None or watcher.linear[1] is not answer:
            follows = watcher.refusal or "what follows the dropout is more than one Linear layer"
            raise InputError(f"there is no closed form: {follows}; {_REMEDY}")
        return watcher.moments(watcher.dropped, *watcher.linear)


_PLANS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, SamplingPlan]] = weakref.WeakKeyDictionary()


def _watched(run: Run) -> tuple[_Watcher, Tensor]:
    """Run a model, whose dropout calls are looked for once for a shape of inputs; the watcher, and the output."""
    key = fingerprint(run.model), spec(run.call)
    known, plan = _PLANS.get(run.model, (None, None))
    if plan is not None and known == key:
        run.plan = plan
        with suppress(Unsuitable):  # something has changed that the key does not tell
            watcher = _Watcher(plan.calls)
            return watcher, run.forward(watcher)[0]
    try:
        run.look()
    except InputError as error:
        raise InputError(f"there is no closed form: {error}; {_REMEDY}") from error
    _PLANS[run.model] = key, run.plan
    watcher = _Watcher(run.plan.calls)
    return watcher, run.forward(watcher)[0]


_REMEDY = "take samples: sc.dropout.sample(model, inputs)"


class _Watcher(Follower):
    """Leaves the dropout out, and watches what is done with what it would have dropped from."""

    def __init__(self, calls: Sequence[DropoutCall]) -> None:
        super().__init__(calls)
        self.dropped: Tensor | None = None
        self.linear: tuple[tuple[Any, ...], Tensor] | None = None
        """Of the layer that follows: weight and bias, and what it gives."""
        self.refusal = ""
        self._combine: Combine | None = None

    def put(self, call: DropoutCall, x: Tensor, shape: Sequence[int], combine: Combine, axis: int = 0) -> Tensor:
        if self.dropped is not None:
            self.refusal = self.refusal or f"there is another dropout after the first ({call.kind})"
        elif tuple(shape) != tuple(x.shape):
            self.refusal = f"{call.kind} drops several elements together"
        self.dropped, self._combine = x.view_as(x), combine
        self._rate = call.rate or 0.0
        return self.dropped

    def numbers(self, call: DropoutCall, like: Tensor, shape: Sequence[int], normal: bool) -> Tensor:
        self.refusal = self.refusal or f"{call.kind} is not noise on a tensor"
        return torch.full(tuple(shape), 0.0 if normal else 1 - 2**-24, device=like.device)

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if self.dropped is None or getattr(func, "__name__", "") in ("__get__", "dim", "size"):
            return result
        if self.linear is None and func == functional.linear and args[0] is self.dropped:
            self.linear = (*args[1:], *kwargs.values()), result
        elif not self.refusal:
            self.refusal = f"{getattr(func, '__name__', func)} follows the dropout"
        return result

    def moments(self, x: Tensor, layer: tuple[Any, ...], answer: Tensor) -> Moments:
        """Moments behind the layer: an element x becomes `a x + b` if it is kept, and always the same `d` if not."""
        assert self._combine is not None
        rate, (weight, *bias) = self._rate, layer
        weight = bits.plain(weight)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        b, a_and_b = self._combine(ends, torch.tensor(1.0)).tolist()  # a number above the rate keeps
        a, d = a_and_b - b, float(self._combine(ends, torch.tensor(-1.0))[0])
        mean = answer  # as dropout has it: b and d are 0, and a is 1 / (1 - rate)
        if b or d:
            mean = functional.linear((1 - rate) * (a * x + b) + rate * d, weight, *bias)
            x = x + (b - d) / a
        return Moments(mean, functional.linear(x.square(), weight.square()) * (a * a * rate * (1 - rate)))
