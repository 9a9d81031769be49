"""A gate for each unit, channel or head: hard concrete gates, which learn L0 sparsity of structure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur import anatomy
from secateur.dropout import noise
from secateur.dropout.learned import base
from secateur.dropout.learned.base import LearnedRates, SubstitutePlace
from secateur.dropout.substitution import Stand
from secateur.errors import InputError
from secateur.scope import Member, unwrap

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature of the gates, and the ends to which they are stretched before they are cut to [0, 1]."""


def hard_concrete(
    model: nn.Module,
    *,
    n_data: float,
    strength: float = 1.0,
    rate: float = 0.1,
    scope: Mapping[str, nn.Parameter] | None = None,
) -> HardConcreteRates:
    """Learn which units, channels and heads a model needs: L0 regularisation with hard concrete gates.

    One gate for each output of a Linear, output channel of a Conv1d to 3d, hidden unit of an RNN, LSTM, GRU or one of
    their cells, and head of a MultiheadAttention. It multiplies the parameters of its unit: rows of the weights and
    biases (all gates of a recurrent unit, which then is 0 at every step if it begins there), of a head only those of
    its values, so that attention scores stay what they are. In training gates are drawn; in `eval()` they have their
    deterministic value, which `finish(model)` folds into the weights.

    Args:
        model: stays itself; carries forward hooks until `finish(model)`. `rates.remove()` leaves it ungated.
        n_data: number of training examples.
        strength: price of a weight, in nats of the log-likelihood of the whole data (lambda times N of the paper).
        rate: probability of a gate to be off at the beginning, roughly: log alpha = log((1 - rate) / rate).
        scope: the modules, by their weights, from `sc.weights(model, ...)`: any tensor of a recurrent layer or of an
            attention stands for the whole. By default all but the last one, if that is a Linear or convolution: its
            outputs are the model's, and each is needed.

    Returns:
        What is learned: `Adam([*model.parameters(), *rates.parameters()])`; gates need a higher learning rate, such as
        ten times that of the weights. Its `penalty` is `strength / n_data` times the expected number of parameters that
        are not zero, for a loss that is the mean negative log-likelihood. Its `rates` are the fractions of gates at 0.

    Raises:
        InputError, InputTypeError: a value that cannot be used; tied, lazy or computed weights; nothing to gate.
        StateError: learned rates are there already. In each case the model is as it was.

    Sources: Louizos, Welling & Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization", eq. 10 to 13
    (temperature 2/3, ends -0.1 and 1.1); Voita et al. 2019, "Analyzing Multi-Head Self-Attention", for heads.

    >>> from secateur.dropout.learned import finish, penalty
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> rates = hard_concrete(model, n_data=1000)
    >>> optimizer = torch.optim.Adam([*model.parameters(), *rates.parameters()])
    >>> loss = model(torch.ones(4, 8)).square().mean() + penalty(model)
    >>> loss.backward()
    >>> optimizer.step()
    >>> rates.rates, finish(model).pruned
    ({'0': 0.0}, 0)
    """
    price = base.require_positive(strength, "strength", "the price of a weight in nats of the whole data, such as 1.0")
    start = base.require_positive(rate, "rate", "the probability of a gate to be off at the beginning, such as 0.1")
    if start >= 1:
        raise InputError(f"rate is {rate}: give a probability with which to begin, above 0 and below 1, such as 0.1")
    rates = HardConcreteRates(n_data, price)
    members = base.choose(model, scope)
    found = _gated(rates, members, anatomy.readers(unwrap(model)), named=scope is not None)
    held = {f"{g.name}: {r.attribute}": (g.host, r.module, r.attribute) for g in found for r in g.rows}
    base.require_free(model, held)
    for place in found:
        row = place.rows[0].parameter
        rates.learn(place.name, torch.full((place.units,), math.log((1 - start) / start), **base.learnable(row)))
    rates.attach(found)
    gated = {id(rows.parameter) for place in found for rows in place.rows}
    rates.left = [m for m in members if id(m.parameter) not in gated]
    return rates


class HardConcreteRates(LearnedRates):
    """A log alpha for each gate; made by `hard_concrete`."""

    def __init__(self, n_data: float, strength: float) -> None:
        super().__init__(n_data)
        self.strength = strength

    @property
    def rates(self) -> dict[str, float]:
        """For each layer the fraction of its gates that are 0 in `eval()`."""
        return {place.name: float((settled(self.value(place.name)) == 0).double().mean()) for place in self.places}

    def penalty(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        for place in self._gated():
            total = total + place.size * probability(self.value(place.name)).sum()
        return self.strength * total / self.n_data

    @torch.no_grad()
    def scores(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for place in self._gated():
            log_alpha = self.value(place.name)
            for rows in place.rows:
                if "bias" not in rows.attribute:
                    yield rows.parameter, rows.spread(log_alpha).expand(rows.parameter.shape)

    @torch.no_grad()
    def masks(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for place in self._gated():
            open_ = settled(self.value(place.name)) != 0
            for rows in place.rows:
                yield rows.parameter, rows.spread(open_).expand(rows.parameter.shape)

    @torch.no_grad()
    def fold(self) -> None:
        for place in self._gated():
            gates = settled(self.value(place.name))
            for rows in place.rows:
                if rows.scaled:
                    rows.parameter.copy_(rows.times(gates))

    def _gated(self) -> Iterator[_Gated]:
        for place in self.places:
            assert isinstance(place, _Gated)
            yield place


def drawn(log_alpha: Tensor, numbers: Tensor) -> Tensor:
    """Gates from uniform numbers: eq. 10."""
    return _stretched(torch.sigmoid((numbers.logit(eps=1e-7) + log_alpha) / BETA))


def settled(log_alpha: Tensor) -> Tensor:
    """Gates without noise, as in `eval()`: eq. 13."""
    return _stretched(torch.sigmoid(log_alpha))


def probability(log_alpha: Tensor) -> Tensor:
    """Probability that a drawn gate is not 0: eq. 12.

    >>> probability(torch.tensor([-5.0, 0.0]))
    tensor([0.0323, 0.8318])
    """
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def _stretched(s: Tensor) -> Tensor:
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@dataclass(frozen=True)
class _Rows:
    """Which part of a parameter belongs to which gate: `width` rows for each gate, repeated `copies` times."""

    module: nn.Module
    attribute: str
    copies: int = 1
    width: int = 1
    scaled: int = 1
    """How many of the copies the gate multiplies, the last ones; the others go when it is 0."""
    dim: int = 0

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def spread(self, gates: Tensor) -> Tensor:
        """One number for each row, in a shape that broadcasts to the parameter's."""
        return self._fit(gates.repeat_interleave(self.width).repeat(self.copies))

    def times(self, gates: Tensor) -> Tensor:
        """The parameter as the gates make it."""
        block = gates.repeat_interleave(self.width) if self.width > 1 else gates
        if self.copies > 1:
            block = torch.cat([torch.ones_like(block)] * (self.copies - self.scaled) + [block] * self.scaled)
        return self.parameter * self._fit(block).to(self.parameter.dtype)

    def _fit(self, numbers: Tensor) -> Tensor:
        return numbers.view([-1 if d == self.dim else 1 for d in range(self.parameter.ndim)])


class _Gated(SubstitutePlace):
    """A module, or one layer of a recurrent one, whose units have gates."""

    def __init__(self, rates: LearnedRates, name: str, host: nn.Module, rows: Sequence[_Rows], units: int) -> None:
        super().__init__(rates, name, host)
        self.rows = rows
        self.units = units

    @property
    def size(self) -> float:
        """Number of parameters that belong to a gate."""
        return sum(rows.parameter.numel() for rows in self.rows) / self.units

    def stands(self) -> list[Stand]:
        log_alpha = self.owner.value(self.name)
        if noise.active(self.host.training):
            gates = drawn(log_alpha, noise.uniform(log_alpha, log_alpha.shape, kind="hard_concrete"))
        else:
            gates = settled(log_alpha)
        return [(rows.parameter, rows.times(gates)) for rows in self.rows if rows.scaled]


def _gated(rates: LearnedRates, members: list[Member], users: Mapping[int, nn.Module], *, named: bool) -> list[_Gated]:
    found: dict[str, _Gated] = {}
    others = []
    for member in members:
        place = _place(rates, member, users[id(member.module)])
        if place is None:
            others.append(member)
        else:
            found.setdefault(place.name, place)
    last = list(found)[-1:]
    if not named and last and _plain(found[last[0]].host):
        del found[last[0]]
    if named and others:
        raise InputError(
            f"{', '.join(m.name for m in others[:3])}: gates are for units of Linear, Conv1d to 3d, RNN, LSTM and GRU, "
            f"and for heads of MultiheadAttention, not for {type(others[0].module).__name__}: leave it out, "
            f"scope=sc.weights(model, skip=[{others[0].name!r}])"
        )
    if not found:
        raise InputError(
            "nothing to gate: by default the last layer has no gates, because its outputs are the model's; "
            "name the layers, scope=sc.weights(model, only=[...])"
        )
    return list(found.values())


def _place(rates: LearnedRates, member: Member, host: nn.Module) -> _Gated | None:
    """The gates to which a tensor belongs, if there are any."""
    name, module = base.layer_name(member), member.module
    if anatomy.family(host) == "attention":
        name = name if module is host else name.rpartition(".")[0]
        return _Gated(rates, name, host, _head(host), host.num_heads)  # type: ignore[arg-type]
    if _plain(module):
        rows = [_Rows(module, attribute) for attribute in ("weight", "bias")]
        return _Gated(rates, name, host, _present(rows), member.parameter.shape[0])
    layer = anatomy.known(type(module))
    if layer is not None and layer.family in ("recurrent", "cell"):
        units, copies = int(module.hidden_size), layer.gates  # type: ignore[arg-type]
        ending = member.attribute.removeprefix("weight_").removeprefix("ih").removeprefix("hh").removeprefix("hr")
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        rows = [_Rows(module, kind + ending, copies=copies, scaled=copies) for kind in kinds]
        return _Gated(rates, f"{name}.{ending.strip('_')}".strip("."), host, _present(rows), units)
    return None


def _plain(module: nn.Module) -> bool:
    """Whether it is a Linear or a convolution that stores its outputs first."""
    layer = anatomy.known(type(module))
    stored = {"weight": "oi"}
    return layer is not None and layer.family in ("linear", "convolution") and layer.weights == stored


def _head(module: nn.MultiheadAttention) -> list[_Rows]:
    width = module.head_dim
    joint = [_Rows(module, kind, copies=3, width=width) for kind in ("in_proj_weight", "in_proj_bias")]
    apart = [_Rows(module, f"{k}_proj_weight", width=width, scaled=int(k == "v")) for k in "qkv"]
    added = [_Rows(module, f"bias_{k}", width=width, scaled=int(k == "v"), dim=2) for k in "kv"]
    return _present([*joint, *apart, *added])


def _present(rows: Sequence[_Rows]) -> list[_Rows]:
    return [row for row in rows if row.module._parameters.get(row.attribute) is not None]
