"""What the three methods share: values that are learned beside a model, and the hooks that apply them to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.dropout.substitution import Stand, begin, end
from secateur.errors import InputError, StateError
from secateur.scope import Member, resolve, unwrap
from secateur.support import checks


class LearnedRates(nn.Module):
    """What is learned about a model, beside it: give its parameters to the optimizer, save its state_dict.

    Made by `concrete`, `variational` or `hard_concrete`, which hook it to the model; the model's parameters, names and
    types stay what they are. A deepcopy of the model has its own copy: see `attached`.

    Args:
        n_data: training examples (the N of the papers).
    """

    def __init__(self, n_data: float) -> None:
        super().__init__()
        self.n_data = require_positive(n_data, "n_data", "the number of training examples, len(dataset)")
        self.values = nn.ParameterDict()
        self.places: list[Place] = []
        self.left: list[Member] = []
        """Weights of the default scope about which nothing is learned."""

    @property
    def rates(self) -> dict[str, float]:
        """For each layer or tensor the fraction that the method would now drop."""
        raise NotImplementedError

    def value(self, name: str) -> Tensor:
        """What is learned under a name of the model."""
        found: Tensor = self.values[_key(name)]
        return found

    def learn(self, name: str, start: Tensor) -> None:
        """Begin to learn something, from `start`."""
        self.values[_key(name)] = nn.Parameter(start)

    def attach(self, places: Iterable[Place]) -> None:
        """Hook every place to its module."""
        self.places = list(places)
        for place in self.places:
            place.attach()

    def remove(self) -> None:
        """Take the hooks off: the model is plain, its weights as they are; what was learned stays here.

        Raises:
            StateError: they are off already.
        """
        if not any(place.handles for place in self.places):
            raise StateError(
                "these learned rates were removed already, so remove() must not be called again: attach new ones, "
                "with secateur.dropout.learned.variational, for example"
            )
        for place in self.places:
            place.detach()

    def penalty(self) -> Tensor:
        """What is to be added to the mean loss: a scalar."""
        raise NotImplementedError

    def scores(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight with its scores, of its shape; low ones go first."""
        raise NotImplementedError

    @torch.no_grad()
    def scores_of_left(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Scores of the weights about which nothing is learned: above all others, by size."""
        highest = max(float(scores.max()) for _, scores in self.scores())
        for member in self.left:
            yield member.parameter, highest + relative_size(member.parameter)

    def masks(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with what the method itself keeps of it: bool, of its shape."""
        raise NotImplementedError

    def fold(self) -> None:
        """Write into the weights what the model in `eval()` does with them, where that is more than a mask."""

    @property
    def training_now(self) -> bool:
        """Whether the model is in training mode."""
        return any(place.host.training for place in self.places)

    @property
    def device(self) -> torch.device:
        """Where the values live."""
        return next(self.values.parameters()).device

    def require_finite(self) -> None:
        """Refuse values that have diverged.

        Raises:
            InputError: NaN or inf among the values.
        """
        for key, value in self.values.items():
            if not bool(torch.isfinite(value).all()):
                raise InputError(
                    f"what was learned for {key.replace('/', '.')} has NaN or inf in it, so it can rank nothing: "
                    "train again with a lower learning rate, or from an earlier state_dict"
                )


class Place:
    """One module with learned rates: its hooks are methods of this object, so that pickle and deepcopy copy it too."""

    def __init__(self, rates: LearnedRates, name: str, host: nn.Module) -> None:
        self.owner = rates
        self.name = name
        self.host = host
        self.handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks."""
        raise NotImplementedError

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class SubstitutePlace(Place):
    """A module that computes with other tensors than its parameters."""

    def attach(self) -> None:
        self.handles = [
            self.host.register_forward_pre_hook(self.before),
            self.host.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: Any) -> None:
        """Let other tensors stand for the parameters."""
        if self.wanted(module.training):
            begin(module, self.stands())

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """End it, also after an error."""
        end(module)

    def wanted(self, training: bool) -> bool:
        """Whether anything stands in now."""
        return True

    def stands(self) -> list[Stand]:
        """Compute what stands for which parameter."""
        raise NotImplementedError


def attached(model: nn.Module) -> list[LearnedRates]:
    """Find the learned rates on a model, its own ones after a deepcopy or `torch.load`.

    >>> import copy
    >>> from secateur.dropout.learned import concrete
    >>> model = nn.Linear(4, 3)
    >>> rates = concrete(model, n_data=100)
    >>> attached(model) == [rates], attached(copy.deepcopy(model)) == [rates]
    (True, False)
    """
    found: dict[int, LearnedRates] = {}
    for module in unwrap(model).modules():
        for place in places_on(module):
            found[id(place.owner)] = place.owner
    return list(found.values())


def places_on(module: nn.Module) -> list[Place]:
    """Find the places whose hooks a module carries."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, Place)]


def choose(model: nn.Module, scope: Mapping[str, nn.Parameter] | None) -> list[Member]:
    """Find the weights that a user means: those of the scope, or all of `sc.weights(model)`.

    Raises:
        InputTypeError, InputError: no scope, one of another model, complex weights, or as `sc.weights`.
    """
    chosen = resolve(model, scope)
    for name, parameter in chosen.items():
        if parameter.is_complex():
            raise InputError(f"{name} is complex: leave it out, scope=sc.weights(model, skip=[{name!r}])")
    return list(chosen.members.values())


def require_free(model: nn.Module, held: Mapping[str, tuple[nn.Module, nn.Module, str]]) -> None:
    """See that no rates are there already, and that no other module uses the same parameters.

    Args:
        model: the whole of it.
        held: for each tensor, by name, the module to be hooked, the module that holds it, and its attribute there.

    Raises:
        StateError: a module that has learned rates. InputError: tied parameters.
    """
    holders: dict[int, set[tuple[int, str]]] = {}
    for module in unwrap(model).modules():
        for attribute, parameter in module._parameters.items():
            holders.setdefault(id(parameter), set()).add((id(module), attribute))
    for name, (host, module, attribute) in held.items():
        if places_on(host):
            raise StateError(
                f"the module of {name} has learned rates already: call remove() on them first "
                "(secateur.dropout.learned.attached(model) finds them), or leave it out of the scope"
            )
        if len(holders[id(module._parameters[attribute])]) > 1:
            raise InputError(
                f"{name} is tied to a parameter of another module, to which the learned rates would not apply: "
                f"untie them, or leave it out, scope=sc.weights(model, skip=[{name!r}])"
            )


def layer_name(member: Member) -> str:
    """Name the module of a tensor as the model does; "" is the model itself."""
    return member.name.rpartition(".")[0]


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Find the input of a layer, however it was given."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def require_positive(given: float, name: str, what: str) -> float:
    """Return a number above 0 as a float.

    Raises:
        InputTypeError: no number; InputError: not above 0, or not finite.
    """
    checks.number(name, given, what)
    if not 0 < given < float("inf"):
        raise InputError(f"{name} is {given}: give {what}, above 0")
    return float(given)


def relative_size(weight: Tensor) -> Tensor:
    """Sizes of weights in units of the typical one: abs(w) / rms(W), never less precise than float32."""
    size = weight.detach().abs().to(learnable(weight)["dtype"])
    return size / size.square().mean().sqrt().clamp(min=1e-30)


def learnable(weight: Tensor) -> dict[str, Any]:
    """Device and dtype of what is learned about a weight: never less than float32."""
    return {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}


def _key(name: str) -> str:
    return name.replace(".", "/") or "model"  # a ParameterDict takes neither dots nor an empty name
