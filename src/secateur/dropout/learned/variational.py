"""A rate for each weight: sparse variational dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import anatomy
from secateur.dropout import noise
from secateur.dropout.learned import base
from secateur.dropout.learned.base import LearnedRates, Place, SubstitutePlace
from secateur.dropout.substitution import Stand
from secateur.errors import InputError
from secateur.scope import Member, unwrap
from secateur.support import checks

THRESHOLD = 3.0
"""Weights of a higher log alpha are pruned: noise of 20 times the weight's square, a dropout rate above 0.95."""
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
_TINY = 1e-8


def variational(
    model: nn.Module,
    *,
    n_data: float,
    warmup: int,
    log_sigma2: float = -10.0,
    scope: Mapping[str, nn.Parameter] | None = None,
) -> LearnedRates:
    """Learn how much noise each weight tolerates, to prune those that tolerate most: sparse variational dropout.

    Each weight is normal, with itself as the mean and its own learned log sigma^2. Linear and Conv1d to 3d draw the
    noise of their outputs (the local reparametrization); every other module draws weights once a forward, a recurrent
    one for all its time steps. In `eval()` the model computes with its plain weights.

    Args:
        model: stays itself; carries forward hooks until `finish(model)` or `rates.remove()`.
        n_data: number of training examples.
        warmup: training calls of `penalty` during which the KL term grows linearly from 0 to its full size. With
            0 many models lose all weights before they have learned anything; a third of the steps is a fair start.
        log_sigma2: where it begins, log of a variance of weights.
        scope: which tensors, from `sc.weights(model, ...)`; by default all its weight matrices.

    Returns:
        What is learned: `Adam([*model.parameters(), *rates.parameters()])`. Its `penalty` is KL / n_data, for a loss
        that is the mean negative log-likelihood in nats, such as a cross entropy. Its `rates` are the fractions of each
        tensor above the threshold, log alpha > 3.

    Raises:
        InputError, InputTypeError: a value that cannot be used; tied, lazy or computed weights; nothing to learn.
        StateError: learned rates are there already. In each case the model is as it was.

    Sources: Molchanov, Ashukha & Vetrov 2017, "Variational Dropout Sparsifies Deep Neural Networks", eq. 14 and section
    4.3; Chirkova, Lobacheva & Vetrov 2018, "Bayesian Compression for Natural Language Processing", for recurrent ones.

    >>> from secateur.dropout.learned import finish, penalty
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> rates = variational(model, n_data=1000, warmup=100)
    >>> optimizer = torch.optim.Adam([*model.parameters(), *rates.parameters()])
    >>> loss = model(torch.ones(4, 8)).square().mean() + penalty(model)
    >>> loss.backward()
    >>> optimizer.step()
    >>> finish(model)
    Masks(2 tensors, 0 of 160 weights pruned)
    """
    checks.whole("warmup", warmup, 0, "a number of steps, such as a third of the training")
    checks.number("log_sigma2", log_sigma2, "the log of a small variance, such as -10.0")
    if not math.isfinite(log_sigma2):
        raise InputError(f"log_sigma2 is {log_sigma2}: give the log of a small variance, such as -10.0")
    rates = VariationalRates(n_data, warmup)
    members = base.choose(model, scope)
    users = anatomy.readers(unwrap(model))
    held = {m.name: (users[id(m.module)], m.module, m.attribute) for m in members}
    base.require_free(model, held)
    for member in members:
        weight = member.parameter
        rates.learn(member.name, torch.full(weight.shape, float(log_sigma2), **base.learnable(weight)))
    together: dict[int, list[Member]] = {}
    for member in members:
        together.setdefault(id(users[id(member.module)]), []).append(member)
    rates.attach(_place(rates, users[id(found[0].module)], found) for found in together.values())
    return rates


class VariationalRates(LearnedRates):
    """A log sigma^2 for each weight; made by `variational`."""

    steps: Tensor

    def __init__(self, n_data: float, warmup: int) -> None:
        super().__init__(n_data)
        self.warmup = warmup
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def rates(self) -> dict[str, float]:
        """For each tensor the fraction of its weights with log alpha above the threshold."""
        found = {}
        for member in self.members():
            found[member.name] = float((self.log_alpha(member) > THRESHOLD).double().mean())
        return found

    def members(self) -> Iterator[Member]:
        """Every tensor, in the model's order within its module."""
        for place in self.places:
            assert isinstance(place, (_Local, _Perturbed))
            yield from place.members

    def log_alpha(self, member: Member) -> Tensor:
        """log sigma^2 - log w^2, of the weight's shape, within [-8, 8]."""
        return log_alpha(member.parameter, self.value(member.name))

    def penalty(self) -> Tensor:
        total = torch.stack([kl(self.log_alpha(member)).sum() for member in self.members()]).sum() / self.n_data
        share = (self.steps.to(total.device) / self.warmup).clamp(max=1.0) if self.warmup else 1.0
        if self.training_now:
            self.steps += 1
        return total * share

    @torch.no_grad()
    def scores(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for member in self.members():
            weight, noisy = member.parameter, self.value(member.name)
            yield weight, 2 * weight.abs().to(noisy.dtype).clamp(min=1e-30).log() - noisy

    @torch.no_grad()
    def masks(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for member in self.members():
            yield member.parameter, self.log_alpha(member) <= THRESHOLD


def log_alpha(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """Log of the noise's variance over the weight's square, within [-8, 8], beyond which nothing changes."""
    return (log_sigma2 - (weight.square().to(log_sigma2.dtype) + _TINY).log()).clamp(-8, 8)


def kl(log_alpha: Tensor) -> Tensor:
    """KL divergence of a weight from the log-uniform prior, up to a constant: 0 at log alpha = inf.

    Molchanov et al. 2017, eq. 14, within about 0.01 of the integral.

    >>> kl(torch.tensor([-4.0, 0.0, 4.0]))
    tensor([2.6342, 0.4312, 0.0093])
    """
    return _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


class _Local(Place):
    """A layer whose outputs get the noise of their sums of weights."""

    def __init__(self, rates: LearnedRates, name: str, host: nn.Module, members: Sequence[Member]) -> None:
        super().__init__(rates, name, host)
        self.members = members

    def attach(self) -> None:
        self.handles = [self.host.register_forward_hook(self.after, with_kwargs=True)]

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if not noise.active(module.training):
            return None
        squares = base.first(args, kwargs).square()
        variance = self.owner.value(self.members[0].name).exp().to(squares.dtype)
        if anatomy.family(module) == "linear":
            spread = F.linear(squares, variance)
        else:
            spread = module._conv_forward(squares, variance, None)  # type: ignore[operator]
        numbers = noise.normal(output, output.shape, kind="variational").to(output.dtype)
        return output + (spread + _TINY).sqrt() * numbers


class _Perturbed(SubstitutePlace):
    """A module that computes with weights drawn anew at each forward."""

    def __init__(self, rates: LearnedRates, name: str, host: nn.Module, members: Sequence[Member]) -> None:
        super().__init__(rates, name, host)
        self.members = members

    def wanted(self, training: bool) -> bool:
        return noise.active(training)

    def stands(self) -> list[Stand]:
        return [(member.parameter, self._draw(member)) for member in self.members]

    def _draw(self, member: Member) -> Tensor:
        weight = member.parameter
        deviation = (0.5 * self.owner.value(member.name)).exp().to(weight.dtype)
        return weight + deviation * noise.normal(weight, weight.shape, kind="variational").to(weight.dtype)


def _place(rates: LearnedRates, host: nn.Module, members: Sequence[Member]) -> Place:
    name = base.layer_name(members[0])
    plain = anatomy.family(host) in ("linear", "convolution") and not anatomy.has_own_forward(host)
    alone = len(members) == 1 and members[0].module is host and members[0].attribute == "weight"
    local = plain and alone and members[0].layout.identity
    return (_Local if local else _Perturbed)(rates, name, host, members)
