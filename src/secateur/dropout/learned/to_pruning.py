"""From learned rates to pruning: penalty, scores, masks, and a plain model at the end."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.dropout.learned.base import LearnedRates, attached
from secateur.dropout.learned.concrete import ConcreteRates
from secateur.errors import StateError
from secateur.masks import Masks
from secateur.scope import unwrap


def penalty(model: nn.Module) -> Tensor:
    """Sum the penalties of the learned rates of a model, to be added to the mean loss, in nats for each example.

    Call it once a step: in training mode it counts its calls, for the warm-up of `variational`.

    Returns:
        A scalar.

    Raises:
        StateError: no learned rates on this model, or none that is still learned.

    >>> from secateur.dropout.learned import concrete
    >>> model = nn.Linear(4, 3)
    >>> rates = concrete(model, n_data=1000)
    >>> penalty(model).shape
    torch.Size([])
    """
    learning = [rates for rates in _required(model) if not (isinstance(rates, ConcreteRates) and rates.frozen)]
    if not learning:
        raise StateError("the rates of this model are frozen and have no penalty: leave the penalty out of the loss")
    return torch.stack([rates.penalty() for rates in learning]).sum()


def to_scores(model: nn.Module) -> dict[str, Tensor]:
    """Give what was learned as pruning scores, by the names of the weights; the lowest go first.

    - `variational`: -log alpha, how far a weight stands out of its noise.
    - `hard_concrete`: log alpha of its gate, for each weight of a unit (biases are left out): whole units go.
    - `concrete`: abs(w) / rms(W) * sqrt((1 - p) / p), the magnitude in units of the layer's typical one and of the
      noise that the layer bears (dropout at rate p is noise of variance p / (1 - p)). So rates share out a global
      budget among layers, whatever the scale of each, and magnitude ranks within one.

    `sc.prune(model, 0.9, score=...)` takes these scores as they are, because weights that a method leaves out by
    default have scores too. `concrete` learns no rate for LSTM, GRU, RNN and attention: their scores use the mean rate
    of the other layers (the mean of the logits). `hard_concrete` leaves out the last layer: its weights have scores
    above all gates, by size, and so go last. Weights outside a scope that you gave have no scores: prune with that
    scope.

    Scores of different methods on one model cannot be compared: prune each with a scope of its own.

    Raises:
        StateError: no learned rates on this model. InputError: NaN or inf in what was learned.

    >>> import secateur as sc
    >>> from secateur.dropout.learned import variational
    >>> model = nn.Linear(10, 10)
    >>> rates = variational(model, n_data=1000, warmup=0)
    >>> scores = to_scores(model)
    >>> sc.prune(model, 0.9, score=scores, scope=sc.weights(model, only=list(scores))).pruned
    90
    """
    found = _checked(model)
    # what one method leaves out another may have learned
    return _named(model, [*(rates.scores_of_left() for rates in found), *(rates.scores() for rates in found)])


def to_masks(model: nn.Module) -> Masks:
    """Give the masks of each method's own threshold; the model is only read.

    - `variational`: weights of log alpha > 3 are pruned.
    - `hard_concrete`: units whose gate is 0, with their biases.
    - `concrete`: in each layer a fraction p of the weights, the smallest, to the nearest whole number.

    Raises:
        StateError: no learned rates on this model. InputError: NaN or inf in what was learned.

    >>> from secateur.dropout.learned import concrete
    >>> model = nn.Linear(10, 10)
    >>> rates = concrete(model, n_data=1000, rate=0.25)
    >>> to_masks(model)
    Masks(1 tensor, 25 of 100 weights pruned)
    """
    return Masks(_named(model, (rates.masks() for rates in _checked(model))))


def finish(model: nn.Module) -> Masks:
    """End the learning with a plain, pruned model: fold gates into the weights, apply `to_masks`, take all hooks off.

    Returns:
        The masks; give them to `sc.remask`, or prune on with `to_scores`, called before.

    Raises:
        StateError: no learned rates on this model. InputError: NaN or inf in what was learned. The model is as it was.

    >>> from secateur.dropout.learned import concrete
    >>> model = nn.Linear(10, 10)
    >>> rates = concrete(model, n_data=1000, rate=0.25)
    >>> finish(model), int((model.weight == 0).sum())
    (Masks(1 tensor, 25 of 100 weights pruned), 25)
    """
    masks = to_masks(model)
    for rates in attached(model):
        rates.fold()
        rates.remove()
    masks.apply(model)
    return masks


def _required(model: nn.Module) -> list[LearnedRates]:
    found = attached(model)
    if not found:
        raise StateError(
            "no learned rates are on this model: begin with secateur.dropout.learned.variational(model, n_data=..., "
            "warmup=...), concrete or hard_concrete, and call this before finish() or remove()"
        )
    return found


def _checked(model: nn.Module) -> list[LearnedRates]:
    found = _required(model)
    for rates in found:
        rates.require_finite()
    return found


def _named(model: nn.Module, found: Iterable[Iterable[tuple[nn.Parameter, Tensor]]]) -> dict[str, Tensor]:
    """By the model's own names, in its own order."""
    by_id = {id(parameter): value for pairs in found for parameter, value in pairs}
    return {name: by_id[id(p)] for name, p in unwrap(model).named_parameters() if id(p) in by_id}
