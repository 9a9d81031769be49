"""A rate for each layer: concrete dropout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import anatomy
from secateur.dropout import noise
from secateur.dropout.learned import base
from secateur.dropout.learned.base import LearnedRates, Place
from secateur.errors import InputError, StateError, warn
from secateur.scope import Member, unwrap
from secateur.sparsity import fraction, half_up
from secateur.support import checks

TEMPERATURE = 0.1


def concrete(
    model: nn.Module,
    *,
    n_data: float,
    length_scale: float = 1e-4,
    rate: float = 0.1,
    scope: Mapping[str, nn.Parameter] | None = None,
) -> ConcreteRates:
    """Learn the dropout rate of each layer's input by gradient: concrete dropout.

    The input of each Linear and convolution is dropped, elements of a Linear's, whole channels of a convolution's, by
    a relaxed Bernoulli mask (temperature 0.1), in training and under `secateur.dropout.sample`. In `eval()` the model
    computes with its plain weights: what is kept is divided by 1 - p.

    Args:
        model: stays itself; carries forward hooks until `finish(model)` or `rates.remove()`.
        n_data: number of training examples, N.
        length_scale: l of the prior of weights, N(0, 1 / l^2).
        rate: where each rate begins, 0 < rate < 1.
        scope: the layers, by their weights, from `sc.weights(model, ...)`; by default each Linear and convolution. A
            warning names other weights that the model has, those of an LSTM for example: no rate is learned for them.

    Returns:
        What is learned: `Adam([*model.parameters(), *rates.parameters()])`. Its `rates` are the p of each layer, its
        `freeze()` ends the learning and leaves ordinary dropout. Its `penalty` is, summed over layers of K inputs,
        `(l^2 / 2 * |W|^2 / (1 - p) - K H(p)) / N` with H(p) = -p log p - (1 - p) log(1 - p) and the bias in |W|^2, as
        in the authors' code. It is made for a loss that is the mean negative log-likelihood in nats: a cross entropy,
        or `0.5 * (precision * error^2 + log variance)`. The authors leave out this 0.5, and so have twice the penalty.

    Raises:
        InputError, InputTypeError: a value that cannot be used; tied, lazy or computed weights; no such layer.
        StateError: learned rates are there already. In each case the model is as it was.

    Source: Gal, Hron & Kendall 2017, "Concrete Dropout", eq. 3 to 5.

    >>> from secateur.dropout.learned import penalty
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> rates = concrete(model, n_data=1000)
    >>> optimizer = torch.optim.Adam([*model.parameters(), *rates.parameters()], lr=0.01)
    >>> loss = model(torch.ones(4, 8)).square().mean() + penalty(model)
    >>> loss.backward()
    >>> optimizer.step()
    >>> list(rates.rates), all(0.09 < p < 0.11 for p in rates.rates.values())
    (['0', '2'], True)
    """
    length = base.require_positive(length_scale, "length_scale", "the l of the prior N(0, 1 / l^2), such as 1e-4")
    start = base.require_positive(rate, "rate", "the rate with which to begin, such as 0.1")
    if start >= 1:
        raise InputError(f"rate is {rate}: give a rate with which to begin, above 0 and below 1, such as 0.1")
    rates = ConcreteRates(n_data, length)
    chosen = base.choose(model, scope)
    members = _layers(chosen, anatomy.readers(unwrap(model)), named=scope is not None)
    base.require_free(model, {m.name: (m.module, m.module, m.attribute) for m in members})
    for member in members:
        rates.learn(base.layer_name(member), torch.full((), start, **base.learnable(member.parameter)).logit())
    rates.left = [member for member in chosen if member not in members]
    if rates.left:
        names = [member.name for member in rates.left]
        warn(
            f"concrete learns no rate for {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}: "
            "it is for Linear and convolutions. to_scores ranks these by size, at the mean of the rates; "
            "recurrent(model, ...) drops inside LSTM, GRU and RNN. To choose the layers yourself: "
            f"scope=sc.weights(model, only={[member.name for member in members[:3]]})"
        )
    rates.attach(_Input(rates, base.layer_name(member), member) for member in members)
    return rates


class ConcreteRates(LearnedRates):
    """A logit of a rate for each layer; made by `concrete`."""

    def __init__(self, n_data: float, length_scale: float) -> None:
        super().__init__(n_data)
        self.length_scale = length_scale
        self.frozen: dict[str, float] | None = None
        self.register_load_state_dict_post_hook(_read_again)  # type: ignore[no-untyped-call]

    @property
    def rates(self) -> dict[str, float]:
        """The dropout rate of each layer's input."""
        return {place.name: float(self.value(place.name).detach().double().sigmoid()) for place in self.places}

    def freeze(self) -> None:
        """End the learning: from now on this is ordinary dropout at the rates learned.

        Raises:
            StateError: frozen already.
        """
        if self.frozen is not None:
            raise StateError("these rates are frozen already: read rates.rates, or take them off with rates.remove()")
        self.require_finite()
        self.frozen = self.rates
        for value in self.values.values():
            value.requires_grad_(False)

    def penalty(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        if self.frozen is not None:
            return total
        for place in self._inputs():
            logit = self.value(place.name)
            squares: Tensor = sum((p.square().sum() for p in place.parameters()), total)
            # 1 / (1 - p) = 1 + exp(logit)
            prior = 0.5 * self.length_scale**2 * squares * (1 + logit.exp())
            total = total + prior - place.inputs * entropy(logit)
        return total / self.n_data

    @torch.no_grad()
    def scores(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for place in self._inputs():
            yield place.member.parameter, _scores(place.member.parameter, self.value(place.name))

    @torch.no_grad()
    def scores_of_left(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        logit = torch.stack([self.value(place.name) for place in self.places]).mean()
        for member in self.left:
            yield member.parameter, _scores(member.parameter, logit)

    @torch.no_grad()
    def masks(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for place in self._inputs():
            weight = place.member.parameter
            kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
            count = half_up(fraction(self.rates[place.name]) * weight.numel())
            kept[weight.detach().abs().flatten().argsort(stable=True)[:count]] = False
            yield weight, kept.view(weight.shape)

    def _inputs(self) -> Iterator[_Input]:
        for place in self.places:
            assert isinstance(place, _Input)
            yield place


def entropy(logit: Tensor) -> Tensor:
    """Entropy in nats of a Bernoulli variable, from the logit of its probability."""
    return F.softplus(logit) - logit.sigmoid() * logit


def _scores(weight: Tensor, logit: Tensor) -> Tensor:
    """Sizes in units of the typical one, and of the noise of a rate."""
    return base.relative_size(weight) * (-0.5 * logit.to(weight.device)).exp()  # sqrt((1 - p) / p)


class _Input(Place):
    """A layer whose input is dropped at a learned rate."""

    def __init__(self, rates: LearnedRates, name: str, member: Member) -> None:
        super().__init__(rates, name, member.module)
        self.member = member

    @property
    def inputs(self) -> int:
        """K: the inputs that are dropped one by one, features or channels."""
        layout = self.member.layout
        groups = 1 if layout.groups else getattr(self.host, "groups", 1)  # of a convolution, whose inputs they share
        place = layout.dims.removeprefix("g" if layout.groups else "").index("i")
        return int(self.member.parameter.shape[place] * groups)

    def parameters(self) -> list[Tensor]:
        """The weight and the bias."""
        bias = self.host._parameters.get("bias")
        return [self.member.parameter] if bias is None else [self.member.parameter, bias]

    def attach(self) -> None:
        self.handles = [self.host.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not noise.active(module.training):
            return None
        dropped = self._drop(base.first(args, kwargs), module.training)
        if args:
            return (dropped, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): dropped}

    def _drop(self, x: Tensor, training: bool) -> Tensor:
        shape = x.shape
        layer = anatomy.known(type(self.host))
        if layer is not None and layer.kernel:
            shape = torch.Size((*x.shape[: -layer.kernel], *[1] * layer.kernel))
        assert isinstance(self.owner, ConcreteRates)
        if self.owner.frozen is not None:
            return noise.drop(x, self.owner.frozen[self.name], training=training, kind="concrete", shape=shape)
        logit = self.owner.value(self.name)
        numbers = noise.uniform(x, shape, kind="concrete").to(logit.dtype)
        kept = torch.sigmoid((-logit - numbers.logit(eps=1e-7)) / TEMPERATURE)
        return x * (kept * (1 + logit.exp())).to(x.dtype)


def _layers(members: list[Member], users: Mapping[int, nn.Module], *, named: bool) -> list[Member]:
    """Choose the weights of layers that have one input; others are an error if they were asked for by name."""
    fit = [m for m in members if _has_one_input(m) and users[id(m.module)] is m.module]
    others = [m for m in members if m not in fit]
    if others and (named or not fit):
        names = ", ".join(m.name for m in others[:3])
        raise InputError(
            f"{names}: {checks.kind(others[0].module)} has no single input for a learned rate; concrete "
            "dropout is for Linear and convolutions: name those, scope=sc.weights(model, only=[...])"
        )
    return fit


def _has_one_input(member: Member) -> bool:
    layer = anatomy.known(type(member.module))
    if layer is None or layer.family not in ("linear", "convolution", "transposed convolution"):
        return False
    return member.attribute == "weight" and member.parameter.ndim == layer.kernel + 2


def _read_again(rates: ConcreteRates, missing: object) -> None:
    """After `load_state_dict`: what is frozen has the rates that were loaded."""
    if rates.frozen is not None:
        rates.frozen = rates.rates
