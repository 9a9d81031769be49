"""What each dropout function of torch, and of this library, does under a handler: which call it is, and its noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.dropout import noise
from secateur.dropout.interception.handlers import Handler
from secateur.dropout.interception.recurrent_calls import Recurrence
from secateur.dropout.noise import mask_of

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
    """A function of torch that is written in Python, and calls others, which are seen too.

    With `training=True`, or it would call them with a rate of 0.
    """
    before, handler.outer = handler.outer, (name, bool(kwargs.get("training")))
    try:
        with handler:
            return _transparent(func)(*args, **{**kwargs, "training": True})
    finally:
        handler.outer = before


@cache
def _transparent(function: FunctionType) -> FunctionType:
    """The same function without its own call of the handler: the functions that it calls still call the handler."""
    no = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _no)
    twin = FunctionType(function.__code__, {**function.__globals__, **no}, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _no(*_: Any) -> bool:
    return False


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
    recurrence = Recurrence.of(func, args)
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
    found = HANDLED[torch.dropout](handler, func, args, kwargs)
    return found, torch.ones_like(x, dtype=torch.bool) if found is x else found != 0


_aten = torch.ops.aten
HANDLED: dict[Any, Callable[..., Any]] = {
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
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
}
for _name, _features, _combine in (
    ("dropout", False, _scale),
    ("feature_dropout", True, _scale),
    ("alpha_dropout", False, _saturate),
    ("feature_alpha_dropout", True, _saturate),
):
    for _function in (getattr(torch, _name), getattr(_aten, _name), getattr(_aten, _name).default):
        HANDLED[_function] = _Kind(_name, _features, _combine)
    for _function in (getattr(torch, _name + "_"), getattr(_aten, _name + "_"), getattr(_aten, _name + "_").default):
        HANDLED[_function] = _Kind(_name, _features, _combine, inplace=True)


class Dispatcher(Handler):
    """A handler that is asked by the functions of the table."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        handle = HANDLED.get(func)
        if handle is not None:
            return handle(self, func, args, kwargs or {})
        if self.direct:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self.plain(func, args, kwargs or {})
