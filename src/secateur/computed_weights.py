"""Weights as a model computes with them: from norms, parametrizations, masks, weight drops and adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from secateur import anatomy
from secateur.errors import InputError
from secateur.support import bits
from secateur.tying import distinct, identity


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor as the model computes with it, to be read only: all names of its parameters, and more.

    A weight that `torch.nn.utils.prune` masks is there under its own name, as is that of a quantized module of torch;
    quantized and sparse tensors are there as the numbers they stand for.

    Raises:
        InputError: one is lazy, or on the meta device and in no state_dict.
    """
    found = weights_by_name(model)
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for buffer, mask in module.named_buffers(recurse=False):
            name = buffer.removesuffix("_mask")
            if name != buffer and f"{dot}{name}_orig" in found:
                found[dot + name] = found.pop(f"{dot}{name}_orig").detach().masked_fill(mask == 0, 0)
        if type(module).__module__.startswith("torch.ao.nn.") and callable(getattr(module, "weight", None)):
            found[dot + "weight"] = module.weight()
    for name, tensor in found.items():
        require_values(name, tensor)
    return {name: bits.plain(tensor) for name, tensor in found.items()}


def weights_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, by all their names; for those on the meta device what the state_dict rebuilds, if it does."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict() if any(weight.is_meta for weight in found.values()) else {}
    rebuilt = {id(weight): state.get(name, weight) for name, weight in found.items() if weight.is_meta}
    return {name: rebuilt.get(id(weight), weight) for name, weight in found.items()}


def weights_as_used(model: nn.Module) -> dict[str, Tensor]:
    """Those of `effective` that are pruned by default, or would be if they were plain: to be read only.

    A weight that a norm or a parametrization computes is there under its own name, as the model computes it.
    """
    tensors, apart = effective(model), set_apart(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        for attribute, _, _ in computed(module, prefix):
            name = f"{prefix}.{attribute}".removeprefix(".")
            if name not in tensors and anatomy.is_weight(module, attribute):
                tensors[name] = _as_computed(module, attribute)
    places = {name: (modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in tensors}
    out = {
        identity(t) for name, t in tensors.items() if name in apart or anatomy.family(places[name][0]) == "embedding"
    }
    return {
        name: tensor
        for name, tensor in distinct(tensors).items()
        if tensor.ndim > 1 and identity(tensor) not in out
        if anatomy.is_weight(*user_of(*places[name])) or name not in parameters
    }


def _as_computed(module: nn.Module, attribute: str) -> Tensor:
    """What a norm or a parametrization computes of a weight; of a norm that is a hook, at the last forward."""
    with torch.no_grad():
        if parametrize.is_parametrized(module, attribute):
            steps: Any = copy.deepcopy(module.parametrizations[attribute])  # type: ignore[index]
            found: Tensor = steps.eval()()  # in training some change what they remember
            return found
        found = getattr(module, attribute)
        return found.detach()


def computed(module: nn.Module, place: str) -> Iterator[tuple[str, str, str]]:
    """Name each weight of a module that is computed from others, what computes it, and how to make it plain."""
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            if "weight" in name or anatomy.is_weight(module, name):
                remedy = f"parametrize.remove_parametrizations({place}, {name!r})"
                yield name, "a parametrization (weight_norm and its like)", remedy
    for attribute in own_names(module):
        for norm, ending in (("weight_norm", "_g"), ("spectral_norm", "_orig")):
            if "weight" in attribute and attribute.endswith(ending):
                name = attribute.removesuffix(ending)
                yield name, norm, f"remove_{norm}({place}, {name!r})"


def why_computed(model: nn.Module, name: str) -> str:
    """What computes a weight that is no longer a Parameter, and how to make it one again; or an empty string."""
    path, _, attribute = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    if module is None or f"{attribute}_mask" in module._buffers:
        return ""
    for weight, norm, remedy in computed(module, expression(path)):
        if weight == attribute:
            return f"{name} is computed by {norm}, so that it has no zeros of its own: call torch.nn.utils.{remedy}"
    return ""


_THROUGH = "base_model", "model", "lora_model", "base_layer", "modules_to_save"  # to the layers of a model under PEFT


def set_apart(model: nn.Module) -> dict[str, str]:
    """Why some parameters are not weights of the model, whatever their modules: adapters, and what they replace."""
    roots: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        above, _, leaf = prefix.rpartition(".")
        if above in roots:
            roots[prefix] = roots[above]
        elif leaf.startswith("lora_"):
            roots[prefix] = "an adapter"
        peft = any(package(kind) == "peft" for kind in type(module).__mro__)
        for child, _ in module._modules.items() if peft else ():
            if child not in _THROUGH:
                roots[dot + child] = "replaced by its adapter" if child == "original_module" else "an adapter"
        for attribute, _ in module._parameters.items():  # of a scripted module no dict
            if prefix in roots:
                reasons[dot + attribute] = roots[prefix]
            elif peft or attribute.startswith("lora_"):
                reasons[dot + attribute] = "an adapter"
            elif attribute.endswith("_raw"):
                for place, owner in ((prefix, module), *((dot + n, m) for n, m in module.named_children())):
                    used = f"{place}.{attribute[:-4]}".removeprefix(".")
                    if anatomy.is_weight(owner, attribute[:-4]):
                        reasons[used] = f"computed from {dot}{attribute}"
    return reasons


def user_of(module: nn.Module, attribute: str) -> tuple[nn.Module, str]:
    """The layer that computes with a parameter, and the name there: a weight drop keeps `weight_raw` outside it."""
    if attribute.endswith("_raw"):
        for owner in (module, *module.children()):
            if anatomy.is_weight(owner, attribute[:-4]):
                return owner, attribute[:-4]
    return module, attribute


def require_values(name: str, tensor: Tensor) -> None:
    """See that a tensor holds numbers.

    Raises:
        InputError: it is lazy, or on the meta device.
    """
    if is_lazy(tensor):
        raise InputError(f"{name} is lazy: run one batch through the model first, so that its shape is known")
    if tensor.is_meta:
        raise InputError(bits.valueless(name, tensor))


def own_names(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers of a module itself, which in one of torch.jit are in no dict."""
    own = *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
    return [name for name, _ in own]


def expression(path: str) -> str:
    """How one writes a submodule of `model` in Python: "layers.0.fc" is `model.layers[0].fc`."""
    return "".join(["model", *(f"[{part}]" if part.isdecimal() else f".{part}" for part in path.split(".") if part)])


def package(kind: type) -> str:
    """The package that a class comes from."""
    return kind.__module__.partition(".")[0]
