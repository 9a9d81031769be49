"""Make plain what was pruned with torch.nn.utils.prune, or masked by a parametrization."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from secateur import anatomy
from secateur.errors import InputError, InputTypeError, MaskError
from secateur.masks import Masks
from secateur.scope import unwrap
from secateur.support import checks

_ORIG, _MASK = "_orig", "_mask"

_PARAMETRIZED = re.compile(r"(.*\.|)parametrizations\.([^.]+)\.original")


@dataclass(frozen=True)
class _Pruned:
    """A parameter under a mask; until it is restored, `holder` (a module) has it under the name `key`."""

    module: nn.Module
    leaf: str
    holder: nn.Module
    key: str
    kept: Tensor

    @property
    def original(self) -> nn.Parameter:
        return cast(nn.Parameter, self.holder._parameters[self.key])

    def restore(self) -> None:
        """Give the module its own parameter back, in its place; the weights are not zeroed yet."""
        original, parameters = self.original, self.module._parameters
        if self.holder is self.module:
            for key, _ in _hooks(self.module):
                del self.module._forward_pre_hooks[key]
            del parameters[self.key], self.module._buffers[self.leaf + _MASK]
        else:
            parametrize.remove_parametrizations(self.module, self.leaf, leave_parametrized=False)
        setattr(self.module, self.leaf, original)  # drops the masked product; an RNN updates _flat_weights
        for name in _in_place(list(parameters), self.leaf):
            parameters[name] = parameters.pop(name)


def from_torch_prune(model: nn.Module) -> Masks:
    """Make a model plain that was pruned by `torch.nn.utils.prune`, in place, and return its masks.

    As `prune.remove` on every pruned tensor, and more: what was pruned is +0.0 even if it held inf or NaN,
    and the parameters stand where a fresh module has them, in `_flat_weights` of an RNN too. The Parameter
    objects stay, so an optimizer still holds them; other hooks stay. Masks that are parametrizations (as in
    `torch.ao.pruning`) go too. The place of a parameter is that of its name in torch.nn (weight, bias, weight_hh_l0,
    ...); any other name stays where torch moved it, behind the rest.

    Args:
        model: a model with tensors pruned by `torch.nn.utils.prune`, anywhere in it.

    Returns:
        The masks by parameter name, a tied parameter under its first.

    Raises:
        InputTypeError: not a module (for a state_dict: `plain_state_dict`).
        InputError: nothing in it is pruned that way, or a tied parameter has different masks in different places.
        MaskError: a mask that is missing, of another shape, or not of zeros and ones. Nothing was changed.

    >>> from torch.nn.utils import prune
    >>> layer = torch.nn.Linear(4, 2)
    >>> _ = prune.l1_unstructured(layer, "weight", 6)
    >>> from_torch_prune(layer)
    Masks(1 tensor, 6 of 8 weights pruned)
    >>> list(layer.state_dict())
    ['weight', 'bias']
    """
    if isinstance(model, Mapping):
        raise InputTypeError("from_torch_prune makes a live model plain: for a state_dict use plain_state_dict")
    model = unwrap(model)
    found = {name: pruned for path, module in model.named_modules() for name, pruned in _find(path, module)}
    if not found:
        raise InputError("nothing in this model is pruned with torch.nn.utils.prune: use it as it is")
    _check_tied(model, found)
    firsts = {id(pruned.original): name for name, pruned in reversed(list(found.items()))}
    masks = Masks({name: pruned.kept for name, pruned in found.items() if firsts[id(pruned.original)] == name})
    for pruned in found.values():
        pruned.restore()
    for module in {pruned.module for pruned in found.values()}:
        if anatomy.family(module) == "recurrent":
            cast(nn.RNNBase, module).flatten_parameters()  # one chunk of memory, as cuDNN wants it; nothing on a CPU
    masks.apply(model)
    return masks


def plain_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict of the plain model: names restored in their place, what was pruned +0.0.

    Args:
        state_dict: of a model pruned by `torch.nn.utils.prune` (`weight_orig`, `weight_mask`) or by masks
            as parametrizations (`parametrizations.weight.original`, `parametrizations.weight.0.mask`); it is
            not changed, and shares the tensors that were not pruned.

    Raises:
        InputError: nothing in it is pruned that way.
        MaskError: a mask without its weights, of another shape, or not of zeros and ones.

    >>> pruned = {"bias": torch.ones(1), "weight_orig": torch.ones(3), "weight_mask": torch.tensor([1, 0, 1])}
    >>> plain_state_dict(pruned)
    {'weight': tensor([1., 0., 1.]), 'bias': tensor([1.])}
    """
    pairs = _pairs(state_dict)
    plain_names = {original: name for name, (original, _) in pairs.items()}
    dropped = {mask for _, masks in pairs.values() for mask in masks}
    names = [plain_names.get(key, key) for key in state_dict if key not in dropped]
    for name in pairs:
        names = _in_place(names, name)
    kept = masks_of(state_dict)
    return {
        name: state_dict[pairs[name][0]].detach().masked_fill(~kept[name], 0) if name in pairs else state_dict[name]
        for name in names
    }


def masks_of(state_dict: Mapping[str, Tensor]) -> Masks:
    """Return the masks in a state_dict of `torch.nn.utils.prune`, by the names of the plain model.

    Raises:
        InputError, MaskError: as `plain_state_dict`.
    """
    pairs = _pairs(state_dict)
    return Masks({n: _kept(n, state_dict[o], [state_dict[m] for m in masks]) for n, (o, masks) in pairs.items()})


def _find(path: str, module: nn.Module) -> Iterable[tuple[str, _Pruned]]:
    """The pruned parameters of one module, by full plain name."""
    if isinstance(module, torch.jit.ScriptModule):
        if any(name.endswith(_MASK) for name, _ in module.named_buffers(recurse=False)):
            raise InputError(
                f"{path or 'the model'} is of torch.jit, which cannot be changed: make the model plain before torch.jit"
            )
        return
    prefix = f"{path}." if path else ""
    pairs = [n.removesuffix(_ORIG) for n in module._parameters if n.endswith(_ORIG)]
    pairs = [leaf for leaf in pairs if leaf + _MASK in module._buffers]
    for leaf in dict.fromkeys([*pairs, *(hook._tensor_name for _, hook in _hooks(module))]):
        original, mask = module._parameters.get(leaf + _ORIG), module._buffers.get(leaf + _MASK)
        if original is None or mask is None:
            raise MaskError(_orphan(prefix + leaf))
        yield (
            prefix + leaf,
            _Pruned(module, leaf, module, leaf + _ORIG, _kept(prefix + leaf, original, [mask])),
        )
    lists: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    for leaf, chain in lists.items():
        masks = [mask for step in chain if isinstance(mask := getattr(step, "mask", None), Tensor)]
        if masks and chain.is_tensor and isinstance(chain.original, nn.Parameter):
            kept = _kept(prefix + leaf, chain.original, masks)
            _check_only_masked(prefix + leaf, chain, kept)
            yield prefix + leaf, _Pruned(module, leaf, chain, "original", kept)


def _hooks(module: nn.Module) -> list[tuple[int, Any]]:
    return [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, BasePruningMethod)]


def _kept(name: str, original: Tensor, masks: Iterable[Tensor]) -> Tensor:
    for mask in masks:
        if mask.shape != original.shape:
            raise MaskError(
                f"{name}: its mask has shape {tuple(mask.shape)}, its weights {tuple(original.shape)}: "
                "they are of different models; save both again from one model"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise MaskError(f"{name}: its mask holds more than zeros and ones, so it scales: use torch's prune.remove")
    return reduce(torch.logical_and, [mask.detach().to(original.device) != 0 for mask in masks])


def _check_only_masked(name: str, chain: Any, kept: Tensor) -> None:
    with torch.no_grad():
        now, masked = chain().masked_fill(~kept, 0), chain.original.masked_fill(~kept, 0)
    if not bool(((now == masked) | (masked != masked)).all()):
        raise MaskError(
            f"{name}: its parametrizations do more than mask: use torch's parametrize.remove_parametrizations"
        )


def _check_tied(model: nn.Module, found: Mapping[str, _Pruned]) -> None:
    """One plain tensor cannot be masked in one place and not, or otherwise, in another."""
    places = {(id(p.holder), p.key): p for p in found.values()}
    firsts = {id(p.original): (name, p) for name, p in reversed(list(found.items()))}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            name, first = firsts.get(id(parameter), ("", None))
            here = places.get((id(module), key))
            if first and not (here and torch.equal(here.kept, first.kept)):
                raise InputError(
                    f"{name} is tied to {path}.{key}, which does not have the same mask, so no plain model "
                    "computes the same: prune both with one mask, or untie them (give one a clone)"
                )


def _pairs(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[str, list[str]]]:
    """For each plain name the key of its weights and the keys of its masks."""
    if not isinstance(state_dict, Mapping):
        raise InputTypeError(
            f"expected a state_dict, got {type(state_dict).__name__}: for a model use from_torch_prune"
        )
    pairs: dict[str, tuple[str, list[str]]] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise checks.wrong("a name in state_dict", key, "names of tensors")
        if key.endswith((_ORIG, _MASK)) and not isinstance(value, Tensor):
            raise checks.wrong(key, value, "a state_dict, whose weights and masks are tensors")
        stem = key.removesuffix(_ORIG)
        if stem != key and stem + _MASK in state_dict:
            pairs[stem] = key, [stem + _MASK]
        elif match := _PARAMETRIZED.fullmatch(key):
            inside = key.removesuffix("original")
            others = sorted(k for k in state_dict if k.startswith(inside) and k != key)
            masks = [f"{inside}{i}.mask" for i in range(len(others))]
            if others and set(others) == set(masks):
                pairs[match[1] + match[2]] = key, masks
        elif key.endswith(_MASK) and _is_orphan(key.removesuffix(_MASK), state_dict):
            raise MaskError(_orphan(key.removesuffix(_MASK)))
    if not pairs:
        raise InputError(
            "nothing in this state_dict is pruned with torch.nn.utils.prune (no names X_orig and X_mask): "
            "load it as it is, or give the state_dict inside the checkpoint"
        )
    return pairs


def _is_orphan(name: str, state_dict: Mapping[str, Tensor]) -> bool:
    """Tell `weight_mask` without weights from `causal_mask`, a buffer like any other."""
    return anatomy.rank(name.rpartition(".")[2]) is not None and not {name, name + _ORIG} & state_dict.keys()


def _orphan(name: str) -> str:
    return f"{name}: either {name}{_ORIG} or {name}{_MASK} is missing: save both from the pruned model"


def _in_place(names: list[str], restored: str) -> list[str]:
    """Move `restored` before the first name of its module that torch.nn registers later; else leave it."""
    module, _, leaf = restored.rpartition(".")
    rank = anatomy.rank(leaf)
    to = at = names.index(restored)
    for index, name in reversed(list(enumerate(names[:at]))):
        other_module, _, other = name.rpartition(".")
        if other_module == module and rank and (anatomy.rank(other) or rank) > rank:
            to = index
    return [*names[:to], restored, *names[to:at], *names[at + 1 :]]
