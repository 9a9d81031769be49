"""Dropout calls, wherever they are written: how they are seen in a model that stays in `eval()`, and what they do.

A `TorchFunctionMode` sees each torch function that the model calls. Those that would drop something, were the model in
training, are met by a handler: `Lister` writes them down, `Sampler` gives them the noise of a sample.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.dropout import noise
from secateur.dropout.noise import SAMPLING, mask_of
from secateur.dropout.prefix import Boundary, Prefix, Unsuitable
from secateur.dropout.recurrences import Recurrence
from secateur.dropout.ways import Alone, Combine, Folded, Mapped, Noise


@dataclass(frozen=True)
class Call:
    """One dropout call of a model.

    Attributes:
        path: the module in whose code it stands, "" for the model itself.
        kind: what it is: "dropout", "alpha_dropout", "lstm", "attention" ...
        rate: fraction that is dropped, or None where no one rate says it.
        shape: of the tensor that it acts on, for the inputs given.
        line: of the code that calls it.
        seen: the rate that the call itself shows in `eval()`.
        repeats: along each dimension, how many elements of the batch there are: `shared=True` gives them one mask.
    """

    path: str
    kind: str
    rate: float | None
    shape: torch.Size
    line: int = 0
    seen: float | None = None
    repeats: tuple[int, ...] = ()

    @property
    def site(self) -> tuple[str, int, str]:
        """Where in the code it is."""
        return self.path, self.line, self.kind


class Handler(TorchFunctionMode):
    """What a model's torch functions go through."""

    def __init__(self) -> None:
        super().__init__()
        self.outer: tuple[str, bool] | None = None
        """Name and `training` of the Python function of torch that is being looked into."""
        self.direct = False
        """Calls without noise are made at once, not by `plain`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        handle = _HANDLED.get(func)
        if handle is not None:
            return handle(self, func, args, kwargs or {})
        if self.direct:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self.plain(func, args, kwargs or {})

    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> Call | None:
        """Take note of a dropout call; the call with its rate, or None to leave it alone."""
        raise NotImplementedError

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that has no noise in it."""
        return func(*args, **kwargs)

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        """Run a recurrent layer that has no noise in it."""
        return recurrence.result

    def put(self, call: Call, x: Tensor, shape: Sequence[int], combine: Combine, axis: int = 0) -> Tensor:
        """Put noise into a tensor whose batch lies along `axis`; `shape` is that of the random numbers."""
        raise NotImplementedError

    def numbers(self, call: Call, like: Tensor, shape: Sequence[int], normal: bool) -> Tensor:
        """Give random numbers themselves."""
        raise NotImplementedError

    def write(self, x: Tensor, result: Tensor) -> Tensor:
        """Give what a call with `inplace=True` gives."""
        return result

    def within(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, training: bool) -> Any:
        """Run a function of torch that is written in Python so that what it calls is seen too."""
        before, self.outer = self.outer, (name, training)
        try:
            with self:
                return _transparent(func)(*args, **kwargs)
        finally:
            self.outer = before


class Lister(Handler):
    """Writes the dropout calls of a model down, and leaves them out.

    Args:
        names: the name of each module, by its id.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.calls: list[tuple[Call, bool]] = []
        """Each with whether the call itself asks for noise."""
        self.random: list[Call] = []
        """Calls of random functions that are no dropout."""
        self.moved = False
        """The run has drawn from a global generator."""
        self._names = names

    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> None:
        path, line = _where(self._names)
        rate = None if rate is None else float(rate)
        self.calls.append((Call(path, kind, rate, torch.Size(shape), line, rate), training))

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _RANDOM or (func == functional.rrelu and kwargs.get("training")):
            path, line = _where(self._names)
            self.random.append(Call(path, func.__name__, None, torch.Size(), line))
        return func(*args, **kwargs)


class Follower(Handler):
    """Meets the dropout calls of a model as they were listed.

    Args:
        calls: in order; what is off in training has a rate of 0.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self._calls, self._next = calls, 0

    def meet(self, kind: str, rate: float | None, training: bool, shape: Sequence[int]) -> Call | None:
        if self._next == len(self._calls) or self._calls[self._next].kind != kind:
            raise Unsuitable("the model makes other dropout calls from one pass to the next")
        call = self._calls[self._next]
        self._next += 1
        if call.seen is not None and rate is not None and float(rate) != call.seen:
            raise Unsuitable(f"the rate of {kind} in {call.path or 'the model'} is not what it was")
        return None if call.rate == 0 else call


class Sampler(Follower):
    """Gives the dropout calls of a model the noise of a sample, or of several.

    Args:
        way: how samples are taken.
        calls: the dropout calls.
        prefix: record what comes before the first dropout and stop there; or, if it is closed, play it.
        shared: one mask for the whole batch.
    """

    def __init__(self, way: Alone, calls: Sequence[Call], *, prefix: Prefix | None = None, shared: bool = False):
        super().__init__(calls)
        self._way, self._prefix, self._shared = way, prefix, shared
        self._begun = False
        self.direct = prefix is None

    def plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._begun or self._prefix is None:
            return self._way.plain(func, args, kwargs)
        return self._prefix.run(func, args, kwargs)

    def step(self, recurrence: Recurrence) -> tuple[Tensor, ...]:
        if self._begun or self._prefix is None:
            return self._way.step(recurrence)
        result: tuple[Tensor, ...] = self._prefix.run(_result, (recurrence,), {})
        return result

    def put(self, call: Call, x: Tensor, shape: Sequence[int], combine: Combine, axis: int = 0) -> Tensor:
        self._begin()
        return self._way.put(self._noise(call, x.shape, shape, combine), x, axis)

    def numbers(self, call: Call, like: Tensor, shape: Sequence[int], normal: bool) -> Tensor:
        self._begin()
        wanted = self._noise(call, torch.Size(shape), shape, _second)
        return self._way.numbers(replace(wanted, normal=normal), like.device)

    def write(self, x: Tensor, result: Tensor) -> Tensor:
        return x.copy_(result) if self._way.exact else result

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self.direct = not isinstance(self._way, (Folded, Mapped))
        if self._prefix is not None and not self._prefix.closed:
            self._prefix.close()
            raise Boundary
        if self._prefix is not None:
            self._prefix.finish()

    def _noise(self, call: Call, now: torch.Size, shape: Sequence[int], combine: Combine) -> Noise:
        """What a call asks for, in one sample: `now` may have samples folded into it."""
        if not self._shared and not isinstance(self._way, Folded):
            return Noise(shape, combine, now)
        if len(now) != len(call.shape):
            raise Unsuitable(f"{call.kind} of another shape than in the first pass")
        skipped = len(call.shape) - len(shape)
        own = [
            before if size == there else size
            for size, there, before in zip(shape, now[skipped:], call.shape[skipped:], strict=True)
        ]
        repeats: tuple[int, ...] = ()
        if self._shared:
            repeats = tuple(n if size % n == 0 else 1 for size, n in zip(own, call.repeats[skipped:], strict=True))
            own = [size // n for size, n in zip(own, repeats, strict=True)]
        return Noise(own, combine, call.shape, repeats if any(n > 1 for n in repeats) else ())


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Let a model run under a handler."""
    token = SAMPLING.set(True)
    try:
        with handler:
            yield
    finally:
        SAMPLING.reset(token)


def _where(names: Mapping[int, str]) -> tuple[str, int]:
    """The module of the model whose code is running, and its line: the first argument of a function on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        first = frame.f_code.co_varnames[:1]
        if frame.f_code.co_argcount and first:
            owner = frame.f_locals.get(first[0])
            if isinstance(owner, nn.Module) and id(owner) in names:
                return names[id(owner)], frame.f_lineno
        frame = frame.f_back
    return "", 0


@cache
def _transparent(function: FunctionType) -> FunctionType:
    """The same function, but it does not ask for a handler itself: the handler is asked by what it calls."""
    no = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _no)
    twin = FunctionType(function.__code__, {**function.__globals__, **no}, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _no(*_: Any) -> bool:
    return False


def _result(recurrence: Recurrence) -> tuple[Tensor, ...]:
    return recurrence.result


def _second(x: Tensor, numbers: Tensor) -> Tensor:
    return numbers


# What each of the functions does ----------------------------------------------------------------------------

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


@dataclass(frozen=True)
class _Kind:
    """A function `(input, p, training, inplace)` that drops something.

    Attributes:
        name: what `find` calls it.
        features: it drops whole channels: one number for each of the first two dimensions.
        combine: `combine(x, numbers, rate=)`.
        inplace: it writes into its input.
    """

    name: str
    features: bool
    combine: Callable[..., Tensor]
    inplace: bool = False

    def __call__(self, handler: Handler, func: Any, args: _Args, kwargs: _Kwargs) -> Tensor:
        x, rate, training, inplace = _dropout_arguments(*args, **kwargs)
        name, training = handler.outer or (self.name, training)
        call = handler.meet(name, rate, training, x.shape)
        if call is None:
            return x
        shape = (*x.shape[:2], *(1,) * (x.ndim - 2)) if self.features else x.shape
        result = handler.put(call, x, shape, partial(self.combine, rate=call.rate or 0.0))
        return handler.write(x, result) if inplace or self.inplace else result


def _dropout_arguments(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **more: Any
) -> tuple[Tensor, float, bool, bool]:
    return input, p, more.get("train", training), inplace


def _scale(x: Tensor, numbers: Tensor, rate: float) -> Tensor:
    return x * mask_of(numbers, rate, x.dtype)


def _saturate(x: Tensor, numbers: Tensor, rate: float) -> Tensor:
    """Alpha dropout (Klambauer et al. 2017): what is dropped takes SELU's lowest value, mean and variance stay."""
    lowest = -1.7580993408473766
    scale = 1 / math.sqrt((1 - rate) * (1 + rate * lowest**2))
    return torch.where(numbers >= rate, x, lowest) * scale - lowest * scale * rate


@dataclass(frozen=True)
class _Channels:
    """A function that drops whole channels, as `torch.feature_dropout` does with inputs of `ndim` dimensions."""

    kind: _Kind
    ndim: int

    def __call__(self, handler: Handler, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        if args[0].ndim == self.ndim:
            return self.kind(handler, func, args, kwargs)
        return _python(self.kind.name, handler, func, args, kwargs)  # it warns, or takes them for something else


def _python(name: str, handler: Handler, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """A Python function that calls others: with `training=True`, or it would call them with a rate of 0."""
    training = bool(kwargs.get("training"))
    return handler.within(func, args, {**kwargs, "training": True}, name, training)


def _attention(handler: Handler, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    query, key, value, mask, rate, causal, scale, grouped = _attention_arguments(*args, **kwargs)
    name, training = handler.outer or ("attention", rate > 0)
    call = handler.meet(name, rate, training, (*query.shape[:-1], key.shape[-2]))
    if call is None:
        names = {"attn_mask": mask, "is_causal": causal, "scale": scale, "enable_gqa": grouped}
        return handler.plain(func, (query, key, value), names)
    with handler:  # as the documentation of scaled_dot_product_attention writes it out
        if grouped:
            heads = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(heads, -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        share = scores.softmax(-1)
        if mask is not None:  # a query that may attend to nothing gets nothing
            share = share.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
        share = handler.put(call, share, share.shape, partial(_scale, rate=call.rate or 0.0))
        return share @ value


def _attention_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


def _recurrent(handler: Handler, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """Dropout on the outputs of all layers but the last, as the recurrent layers of torch have it."""
    recurrence = Recurrence.of(_RECURRENT[func], args)
    directions = 2 if recurrence.bidirectional else 1
    shape = *recurrence.x.shape[:-1], recurrence.states[0].shape[-1] * directions
    met = [
        handler.meet(recurrence.func.__name__, recurrence.rate, recurrence.training, shape)
        for _ in range(recurrence.layers - 1)
    ]
    calls = [call for call in met if call is not None]
    if not calls:
        return handler.step(recurrence)

    def between(x: Tensor, axis: int) -> Tensor:
        call = calls.pop(0)
        return handler.put(call, x, x.shape, partial(_scale, rate=call.rate or 0.0), axis)

    return recurrence.with_noise(handler.step, between)


def _own_drop(handler: Handler, func: Any, args: _Args, kwargs: _Kwargs) -> Tensor:
    x: Tensor = args[0]
    rate: float = args[1]
    call = handler.meet(kwargs["kind"], rate, kwargs["training"], x.shape)
    if call is None:
        return x
    shape = x.shape if kwargs["shape"] is None else kwargs["shape"]
    return handler.put(call, x, shape, partial(_scale, rate=call.rate or 0.0))


def _own_numbers(handler: Handler, func: Any, args: _Args, kwargs: _Kwargs) -> Tensor:
    like, shape = args
    normal = func is noise.normal
    call = handler.meet(kwargs["kind"], kwargs.get("rate"), True, shape)
    if call is not None:
        return handler.numbers(call, like, shape, normal)
    return torch.full(tuple(shape), 0.0 if normal else 1 - 2**-24, device=like.device)  # nothing dropped, nothing added


def _native(handler: Handler, func: Any, args: _Args, kwargs: _Kwargs) -> tuple[Tensor, Tensor]:
    x = args[0]
    found = _HANDLED[torch.dropout](handler, func, args, kwargs)
    return found, torch.ones_like(x, dtype=torch.bool) if found is x else found != 0


_aten = torch.ops.aten
_RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm: torch.lstm,
    torch.gru: torch.gru,
    torch.rnn_tanh: torch.rnn_tanh,
    torch.rnn_relu: torch.rnn_relu,
}
_HANDLED: dict[Any, Callable[..., Any]] = {
    functional.dropout: _Kind("dropout", False, _scale),
    functional.alpha_dropout: _Kind("alpha_dropout", False, _saturate),
    functional.feature_alpha_dropout: _Kind("feature_alpha_dropout", True, _saturate),
    functional.dropout1d: _Channels(_Kind("dropout1d", True, _scale), 3),
    functional.dropout2d: _Channels(_Kind("dropout2d", True, _scale), 4),
    functional.dropout3d: _Channels(_Kind("dropout3d", True, _scale), 5),
    functional.multi_head_attention_forward: partial(_python, "attention"),
    functional.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.native_dropout, _aten.native_dropout, _aten.native_dropout.default), _native),
    noise.drop: _own_drop,
    noise.uniform: _own_numbers,
    noise.normal: _own_numbers,
    **dict.fromkeys(_RECURRENT, _recurrent),
}
for _name, _features, _combine in (
    ("dropout", False, _scale),
    ("feature_dropout", True, _scale),
    ("alpha_dropout", False, _saturate),
    ("feature_alpha_dropout", True, _saturate),
):
    for _function in (getattr(torch, _name), getattr(_aten, _name), getattr(_aten, _name).default):
        _HANDLED[_function] = _Kind(_name, _features, _combine)
    for _function in (getattr(torch, _name + "_"), getattr(_aten, _name + "_"), getattr(_aten, _name + "_").default):
        _HANDLED[_function] = _Kind(_name, _features, _combine, inplace=True)

_RANDOM = {
    torch.bernoulli, torch.binomial, torch.multinomial, torch.normal, torch.poisson, torch.rand, torch.rand_like,
    torch.randint, torch.randint_like, torch.randn, torch.randn_like, torch.randperm, torch._sample_dirichlet,
    torch._standard_gamma, Tensor.bernoulli, Tensor.bernoulli_, Tensor.cauchy_, Tensor.exponential_,
    Tensor.geometric_, Tensor.log_normal_, Tensor.multinomial, Tensor.normal_, Tensor.random_, Tensor.uniform_,
    functional.gumbel_softmax,
}  # fmt: skip
