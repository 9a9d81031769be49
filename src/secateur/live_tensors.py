"""The tensors in scope as they are now: whether the model still uses them, and zeros that no mask holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from secateur import sharding
from secateur.computed_weights import computed, expression, weights_as_used
from secateur.errors import StateError, listed, warn
from secateur.masks import Masks, check
from secateur.scope import Member, Scope, require_prunable, resharded
from secateur.support import bits
from secateur.tying import holders, identity

_MANY = 0.01
"""Share of the weights in scope: more zeros than that are not there by chance."""


def here(scope: Scope) -> dict[str, nn.Parameter]:
    """The Parameters of the layers in scope; one that is computed now is left out."""
    return {
        name: parameter
        for name, member in scope.members.items()
        if (parameter := _own(member.module, member.attribute)) is not None
    }


def troubles(model: nn.Module, scope: Scope, masks: Masks) -> Iterator[str]:
    """Tell of each tensor in scope that the model no longer uses as it did, and what to do; no weight is read.

    A layer was replaced or removed, a weight is computed from others now, a tie was cut. A renewed Parameter of the
    same layer is fine, and so is a layer that was wrapped or moved.

    Raises:
        InputError, InputTypeError: a weight that was sharded, quantized or moved to the meta device.
        StateError: one of another shape than its mask.
    """
    yield from _gone(resharded(model), scope)
    for name, weight in here(scope).items():
        if bits.is_sharded(weight) != masks.is_spread(name):
            what = "sharded" if bits.is_sharded(weight) else "made whole"
            raise StateError(
                f"{name} was {what} since the Pruner was made: make the Pruner, and the optimizer, of the model as it "
                "is now; masks of before can be given to it"
            )
        if not masks.lies_as(name, sharding.layout(weight)):
            raise StateError(
                f"{name} is spread over the processes in another way than when the Pruner was made: make the Pruner, "
                "and the optimizer, of the model as it is now"
            )
        if weight.shape != masks.shape(name):
            raise StateError(
                f"{name} has shape {tuple(weight.shape)} now, and its mask {tuple(masks.shape(name))}: make "
                "a new Pruner, and a new optimizer, when the model is whole"
            )


@dataclass(frozen=True)
class Ways:
    """How a model came to its tensors in scope when `troubles` told of none: as long as it stands so, there are none.

    For a look at each step of an optimizer, where `troubles` would take too long.
    """

    modules: Collection[tuple[nn.Module, str, nn.Module]]
    """In which module, under which name, which module; each after the one it is in."""
    parameters: Collection[tuple[nn.Module, str, nn.Parameter, torch.Size]]

    def stand(self) -> bool:
        """Whether each module and Parameter is where it was, and each Parameter plain or sharded, and of its shape."""
        return all(module._modules.get(name) is inside for module, name, inside in self.modules) and all(
            module._parameters.get(name) is parameter
            and (type(parameter) is nn.Parameter or bits.is_sharded(parameter))
            and parameter.shape == shape
            for module, name, parameter, shape in self.parameters
        )


def ways(model: nn.Module, scope: Scope) -> Ways | None:
    """How a model comes to its tensors in scope now; None if not by modules in modules to such Parameters."""
    modules: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    parameters: dict[tuple[int, str], tuple[nn.Module, str, nn.Parameter, torch.Size]] = {}
    for name, parameter in here(scope).items():
        member = scope.members[name]
        parameters[id(member.module), member.attribute] = member.module, member.attribute, parameter, parameter.shape
        for other in (name, *member.aliases):
            *path, attribute = other.split(".")
            module = model
            for part in path:
                inside = module._modules.get(part) if type(module._modules) is dict else None
                if inside is None:
                    return None
                modules[id(module), part] = module, part, inside
                module = inside
            parameters[id(module), attribute] = module, attribute, parameter, parameter.shape
    found = Ways([*modules.values()], [*parameters.values()])
    return found if found.stand() else None


def _gone(model: nn.Module, scope: Scope) -> Iterator[str]:
    for name, member in scope.members.items():
        parameter = _own(member.module, member.attribute)
        there = _at(model, name) is parameter
        if parameter is None or not (there or _elsewhere(model, member, parameter)):
            yield _why_gone(name, member)
            continue
        if type(parameter) is not nn.Parameter:
            require_prunable(member)
        for other in member.aliases if there else (name, *member.aliases):
            found = _at(model, other)
            if found is not None and found is not parameter and identity(found) != identity(parameter):
                yield (
                    f"{other} was one Parameter with {name} when the Pruner was made, and is another now "
                    "(load_state_dict(assign=True) unties): tie them again, or make a new Pruner"
                )


def _at(model: nn.Module, name: str) -> nn.Parameter | None:
    layer, _, attribute = name.rpartition(".")
    try:
        return _own(model.get_submodule(layer), attribute)
    except AttributeError:
        return None


def _own(module: nn.Module, attribute: str) -> nn.Parameter | None:
    """A parameter that a module itself has under a name; one of torch.jit keeps them in no dict."""
    try:
        return module._parameters[attribute]
    except KeyError:
        return None


def _elsewhere(model: nn.Module, member: Member, parameter: nn.Parameter) -> bool:
    """Whether a layer that was wrapped or moved still uses this Parameter as it did."""
    return any(
        module._parameters[attribute] is parameter
        and attribute == member.attribute
        and not isinstance(module, parametrize.ParametrizationList)
        for found in holders(model)
        for _, module, attribute in found
    )


def _why_gone(name: str, member: Member) -> str:
    layer, _, _ = name.rpartition(".")
    place = expression(layer)
    since = "since the Pruner was made, so its zeros would not last"
    if f"{member.attribute}_mask" in member.module._buffers:
        return (
            f"{name} is computed by torch.nn.utils.prune {since}: call torch.nn.utils.prune.remove({place}, "
            f"{member.attribute!r}), then make a new Pruner"
        )
    for weight, norm, remedy in computed(member.module, place):
        if weight == member.attribute:
            return (
                f"{name} is computed by {norm} {since}: call torch.nn.utils.{remedy}, then make a new Pruner; or leave "
                f"it out: sc.weights(model, skip=[{layer or name!r}])"
            )
    return (
        f"{name} is no longer the model's: its {type(member.module).__name__} was replaced or removed since the Pruner "
        "was made; make a new Pruner, and a new optimizer, when the model is whole"
    )


def newcomers(model: nn.Module, scope: Scope) -> dict[str, int]:
    """Weights that would be pruned by default, but came into the model after the scope was made; and their sizes."""
    known = {id(parameter) for parameter in scope.values()}
    names = {*scope.left_out, *(name for m in scope.members.values() for name in (m.name, *m.aliases))}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    looked_at = {id(module) for module in scope.modules}  # what was left out then may have been wrapped since
    return {
        name: tensor.numel()
        for name, tensor in weights_as_used(model).items()
        if name not in names and name in parameters and id(parameters[name]) not in known
        if id(model.get_submodule(name.rpartition(".")[0])) not in looked_at
    }


def warn_of_newcomers(model: nn.Module, scope: Scope) -> None:
    """Warn of `newcomers`, if there are any."""
    new = newcomers(model, scope)
    if new:
        warn(
            f"{listed([*new])} came into the model after the Pruner was made, so that these {sum(new.values()):,} "
            "weights were not pruned: make the Pruner when the model is whole"
        )


def loose_zeros(scope: Scope, masks: Masks, names: Iterable[str]) -> int:
    """Count the weights that are zero though the masks keep them, once the others are zero.

    Tensors that are all zeros are taken as initialised so.
    """
    pruned, zeros = masks.counts(), {}
    for name in names:
        member = scope.members[name]
        weight, place = bits.local(member.parameter), sharding.place_of(name, member.parameter)
        row = sharding.protected(member, place)
        padding = weight.reshape(-1)[row.start : row.stop]
        zeros[name] = weight.numel() - len(padding) - int(weight.count_nonzero()) + int(padding.count_nonzero())
        zeros[name] += bits.alive(weight, masks.packed(name).to(weight.device)) if pruned[name] else 0
    found = sharding.total({name: scope[name] for name in zeros}, zeros)
    free = {name: scope.members[name].free for name in found}
    total = sum(count - pruned[name] for name, count in found.items() if count < free[name])
    return total if total > _MANY * scope.size else 0


def warn_of_others(scope: Scope, masks: Masks) -> None:
    """Warn of weights that are not those of the saved state of a Pruner: most of what it prunes is not zero."""
    found = sum(check(scope, masks).values())
    if 2 * found > masks.pruned:
        warn(
            f"{found:,} of the {masks.pruned:,} weights that the loaded pruner prunes are not zero: the model has "
            "other weights than when it was saved; load the state of the model too, before the next step"
        )


def warn_of_loose(loose: int, scope: Scope) -> None:
    """Warn of zeros that a Pruner does not hold, before it makes its first step, if they are many."""
    if loose > _MANY * scope.size:
        warn(
            f"{loose:,} of {scope.size:,} weights in scope are zero and not held by this pruner: "
            "they grow back. If they were pruned: to go on with that run, load the state of its pruner "
            "(pruner.load_state_dict); to hold these zeros, use sc.Pruner(model, masks) with "
            "masks = sc.Masks.from_zeros(sc.weights(model)); to prune on from there, give a schedule that begins "
            "at their share or above"
        )
