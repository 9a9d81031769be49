"""What the tensors of a layer mean: which of its parameters are weights, and which dimensions are outputs and inputs.

One table, by type of layer. A new layer type is one entry in `_BY_TYPE` (a type of torch) or in `_BY_NAME` (a type of
another package, which is not imported for that); a subclass has the entry of the nearest class that has one. Fused
experts of a mixture are recognised by the shapes of their parameters, and a type without an entry by the sizes it has
as attributes: `in_features` and `out_features`, for example.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.support.bits import Indices

Family = Literal[
    "linear",  # [..., inputs] to [..., outputs], as nn.Linear
    "bilinear",
    "convolution",
    "transposed convolution",
    "recurrent",  # computes with a list of its weights, not with its attributes
    "cell",
    "attention",
    "embedding",
    "experts",  # matrices side by side, each for some of the tokens
    "custom",
]


@dataclass(frozen=True)
class Layout:
    """Where the outputs and the inputs of a weight stand.

    Attributes:
        dims: one letter for each dimension: "o" outputs, "i" inputs, "g" matrices that stand side by side (groups,
            experts), "k" a kernel's, as are all further ones. A Linear is "oi", fused experts [E, in, out] are "gio".
        groups: if not 0, the first dimension holds this many matrices one after another, and "g" stands for that
            split: a ConvTranspose2d [in, out / groups, height, width] is "gio" with its number of groups.

    >>> Layout("gio", groups=2).outputs_first(torch.zeros(6, 4, 3, 3)).shape
    torch.Size([8, 3, 3, 3])
    """

    dims: str = "oi"
    groups: int = 0

    @property
    def identity(self) -> bool:
        """Whether the tensor is stored with its outputs first, then its inputs."""
        return not self.groups and self.dims in ("oi"[: len(self.dims)], "o")

    def outputs_first(self, tensor: Tensor) -> Tensor:
        """Rearrange a tensor of the stored shape to [outputs, inputs, *kernel]; a view where torch can give one.

        The outputs of all groups or experts count one after another, those of the first group first.
        """
        if self.identity:
            return tensor
        split = self._split(tensor)
        order = self._order(split.ndim)
        lead = sum(self.dims.count(letter) for letter in "go")
        inputs = self.dims.count("i")
        moved = split.permute(order).flatten(0, lead - 1)
        return moved.flatten(1, inputs) if inputs > 1 else moved

    def output_dims(self, ndim: int) -> tuple[int, ...]:
        """The stored dimensions on whose indices it depends to which output a number belongs; all of them whole.

        So sums over the other dimensions, which stay there with size 1, are rearranged as the tensor is.
        """
        letters = self.dims.ljust(ndim + bool(self.groups), "k")[bool(self.groups) :]
        return tuple(d for d in range(ndim) if letters[d] in "go" or (self.groups and d == 0))

    def as_stored(self, rearranged: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `outputs_first` for a tensor that is stored with this shape."""
        if self.identity:
            return rearranged.view(tuple(shape))
        split = self._split(torch.empty(tuple(shape), device="meta"))
        order = self._order(split.ndim)
        moved = rearranged.reshape([split.shape[d] for d in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        return moved.permute(back).reshape(tuple(shape))

    def shape(self, stored: Sequence[int]) -> torch.Size:
        """The shape [outputs, inputs, *kernel] of a tensor that is stored with this one."""
        return self.outputs_first(torch.empty(tuple(stored), device="meta")).shape

    def indices(self, stored: Sequence[Indices], shape: Sequence[int]) -> list[Indices] | None:
        """Of each dimension of [outputs, inputs, *kernel] the indices that a part of a tensor holds, if it can be
        rearranged by itself.

        Args:
            stored: of each dimension, as stored, the indices that are here, ascending.
            shape: of the whole tensor, as stored.
        """
        if self.identity:
            return [*stored]
        if self.groups:
            if len(stored[0]) < shape[0]:
                return None
            each = shape[0] // max(self.groups, 1)
            stored, shape = [np.arange(self.groups), np.arange(each), *stored[1:]], [self.groups, each, *shape[1:]]
        order, lead = self._order(len(shape)), max(sum(self.dims.count(letter) for letter in "go"), 1)
        last = lead + max(self.dims.count("i"), 1)
        joined = [order[:lead], order[lead:last], *([d] for d in order[last:])]
        return [_joined([stored[d] for d in dims], [shape[d] for d in dims]) for dims in joined if dims]

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.groups, -1, *tensor.shape[1:]) if self.groups else tensor

    def _order(self, ndim: int) -> list[int]:
        letters = self.dims.ljust(ndim, "k")
        return sorted(range(ndim), key=lambda d: "goik".index(letters[d]))


def _joined(indices: Sequence[Indices], sizes: Sequence[int]) -> Indices:
    """The indices in one dimension in the place of several, of those that are here of each."""
    found = np.zeros(1, np.int64)
    for index, size in zip(indices, sizes, strict=True):
        found = (found[:, None] * size + index).reshape(-1)
    return found


@dataclass(frozen=True)
class Layer:
    """What is known of one type of layer.

    Attributes:
        family: what it computes with its weights.
        weights: the dimensions of its weights, as in `Layout.dims`, by a glob on their names in the module; "*io" has
            as many "g" in front as the tensor has dimensions more.
        groups: the attribute of the module that counts the groups along the first dimension of a weight "g...".
        kernel: dimensions of a convolution's kernel: the last ones of its input.
        gates: gates of a recurrent layer: each takes `hidden_size` rows of its weights.
        inner: submodules whose parameters the layer reads itself, without calling them.
        pooled: an embedding that gives one row for several words.
    """

    family: Family
    weights: Mapping[str, str] = field(default_factory=lambda: {"weight": "oi"})
    groups: str = ""
    kernel: int = 0
    gates: int = 1
    inner: tuple[str, ...] = ()
    pooled: bool = False

    def dims(self, attribute: str) -> str:
        """The dimensions of the weight of this name, or an empty string if it is no weight."""
        return next((dims for glob, dims in self.weights.items() if fnmatchcase(attribute, glob)), "")


def _recurrent(family: Family, gates: int) -> Layer:
    return Layer(family, {"weight*": "oi"}, gates=gates)


_BY_TYPE: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer("linear"),
    nn.Bilinear: Layer("bilinear", {"weight": "oii"}),
    nn.Conv1d: Layer("convolution", kernel=1),
    nn.Conv2d: Layer("convolution", kernel=2),
    nn.Conv3d: Layer("convolution", kernel=3),
    nn.ConvTranspose1d: Layer("transposed convolution", {"weight": "gio"}, groups="groups", kernel=1),
    nn.ConvTranspose2d: Layer("transposed convolution", {"weight": "gio"}, groups="groups", kernel=2),
    nn.ConvTranspose3d: Layer("transposed convolution", {"weight": "gio"}, groups="groups", kernel=3),
    nn.LSTM: _recurrent("recurrent", 4),
    nn.GRU: _recurrent("recurrent", 3),
    nn.RNN: _recurrent("recurrent", 1),
    nn.RNNBase: _recurrent("recurrent", 1),
    nn.LSTMCell: _recurrent("cell", 4),
    nn.GRUCell: _recurrent("cell", 3),
    nn.RNNCell: _recurrent("cell", 1),
    nn.RNNCellBase: _recurrent("cell", 1),
    nn.MultiheadAttention: Layer("attention", {"*weight": "oi"}, inner=("out_proj",)),
    nn.Embedding: Layer("embedding"),
    nn.EmbeddingBag: Layer("embedding", pooled=True),
}

_BY_NAME: dict[str, Layer] = {  # package and class, wherever in the package it is written; or the whole path
    "transformers.Conv1D": Layer("linear", {"weight": "io"}),
    "transformers.DbrxExpertGLU": Layer("experts", {"w1": "oi", "v1": "oi", "w2": "gio"}, groups="moe_num_experts"),
    "transformers.CsmCodebooksHead": Layer("experts", {"weight": "gio"}),
    "transformers.GroupedLinearLayer": Layer("experts", {"weight": "gio"}),
    "transformers.MoshiFlexibleLinear": Layer("experts", {"weight": "goi"}),
    "transformers.KyutaiSpeechToTextFlexibleLinear": Layer("experts", {"weight": "goi"}),
    "transformers.ZambaMambaMixer": Layer("custom", {"*_proj_weight": "goi"}),
    "transformers.XLNetRelativeAttention": Layer("custom", {"[qkvr]": "ioo", "o": "oii"}),
    "torch_geometric.Linear": Layer("linear"),
    "torch_geometric.nn.conv.dna_conv.Linear": Layer("experts", {"weight": "gio"}),
    "torch_geometric.HeteroLinear": Layer("experts", {"weight": "gio"}),
    "torch_geometric.RGCNConv": Layer("custom", {"weight": "*io", "root": "io"}),
    "torch_geometric.RGATConv": Layer("custom", {"weight": "*io"}),
    "torch_geometric.GatedGraphConv": Layer("custom", {"weight": "gio"}),
    "torch_geometric.GCN2Conv": Layer("custom", {"weight[12]": "io"}),
    "torch_geometric.ARMAConv": Layer("custom", {"*weight": "*io"}),
    "torch_geometric.SplineConv": Layer("custom", {"weight": "kio"}),
    "torch_geometric.GMMConv": Layer("custom", {"g": "io"}),
}


def of(module: nn.Module) -> Layer | None:
    """What is known of a module: by its type, or by its parameters; or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return _BY_TYPE.get(getattr(nn, str(module.original_name), nn.Module))
    return known(type(module)) or _experts(module) or _sized(module)


def known(kind: type[nn.Module]) -> Layer | None:
    """What is known of a type: the entry of the nearest of its classes that has one, or None."""
    return entry(kind)[1]


def family(module: nn.Module) -> Family | None:
    """The family of a module, as its type says, or None."""
    layer = known(type(module))
    return None if layer is None else layer.family


def is_weight(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter is a weight that is pruned by default, as far as its module is concerned."""
    layer = of(module)
    return layer is not None and layer.family != "embedding" and bool(layer.dims(attribute))


def entry(kind: type[nn.Module]) -> tuple[type[nn.Module], Layer | None]:
    """The nearest of the classes of a type that has an entry, and the entry; `nn.Module` and None if none has."""
    for one in kind.__mro__:
        package = one.__module__.partition(".")[0]
        names = f"{one.__module__}.{one.__name__}", f"{package}.{one.__name__}"
        found = _BY_TYPE.get(one) or next((_BY_NAME[name] for name in names if name in _BY_NAME), None)
        if found is not None:
            return one, found
    return nn.Module, None


def layout(module: nn.Module, attribute: str, parameter: Tensor) -> Layout:
    """Where the outputs and inputs of a parameter stand; of one that is unknown, outputs are taken to come first."""
    layer = of(module)
    dims = layer.dims(attribute) if layer is not None else ""
    count = layer.groups if layer is not None and dims.startswith("g") else ""
    if not is_lazy(parameter):
        if dims.startswith("*"):
            dims = dims[1:].rjust(parameter.ndim, "g")
        if parameter.ndim < max(len(dims) - bool(count), 2):
            return Layout("oi"[: parameter.ndim])
    return Layout(dims or "oi", int(getattr(module, count, 1)) if count else 0)


def readers(model: nn.Module) -> dict[int, nn.Module]:
    """For each module, by id, the one whose forward uses its parameters: an attention reads its out_proj itself."""
    found = {id(module): module for module in model.modules()}
    for module in model.modules():
        layer = known(type(module))
        found.update({id(module._modules[name]): module for name in (layer.inner if layer is not None else ())})
    return found


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a layer changes what it remembers of its inputs when it runs in training: a normalisation."""
    return isinstance(module, nn.modules.batchnorm._NormBase)


def has_own_forward(module: nn.Module) -> bool:
    """Whether its class computes otherwise than the layer it is derived from: it may not use the weight as it is."""
    kind, layer = entry(type(module))
    return layer is not None and any(
        getattr(type(module), name, None) is not getattr(kind, name, None) for name in ("forward", "_conv_forward")
    )


_IN_ORDER = (
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("weight_ih", "weight_hh", "weight", "bias_ih", "bias_hh", "weight_hr"),
    *("in_proj_bias", "bias", "bias_k", "bias_v"),
)
_NAMES = re.compile(rf"({'|'.join(_IN_ORDER)})(?:_l(\d+)(_reverse)?)?")


def rank(attribute: str) -> tuple[int, bool, int] | None:
    """Where a parameter of this name stands among those of its layer in torch.nn; None if they have none of it.

    >>> rank("weight") < rank("bias"), rank("weight_hh_l0_reverse") < rank("weight_ih_l1"), rank("weight_orig")
    (True, True, None)
    """
    match = _NAMES.fullmatch(attribute)
    return (int(match[2] or 0), bool(match[3]), _IN_ORDER.index(match[1])) if match else None


_UP, _DOWN = ("gate_up_proj", "up_proj", "gate_proj", "w1", "w13"), ("down_proj", "w2")


def _experts(module: nn.Module) -> Layer | None:
    """The experts of a mixture in one tensor [E, out, in] or [E, in, out]: a flag or their shapes tell which."""
    stacks = {name: p for name, p in _shaped(module) if p.ndim == 3}
    up = next((stacks[name] for name in _UP if name in stacks), None)
    down = next((stacks[name] for name in _DOWN if name in stacks), None)
    if up is None or down is None:
        return None
    turned = getattr(module, "is_transposed", None)  # transformers says so where it is
    if turned is None:  # gate and up side by side are wider than down, so that only one of the two fits
        turned = up.shape[1] == down.shape[2] and up.shape[2] != down.shape[1]
    return Layer("experts", dict.fromkeys(stacks, "gio" if turned else "goi"))


_SIZES = tuple((f"in_{kind}", f"out_{kind}") for kind in ("features", "channels", "dim")) + tuple(
    (f"input_{kind}", f"output_{kind}") for kind in ("size", "dim")
)


def _sized(module: nn.Module) -> Layer | None:
    """A type that has its sizes as attributes: its `weight` is a matrix of these sizes, or several side by side."""
    weight = dict(_shaped(module)).get("weight")
    if weight is None or weight.ndim not in (2, 3):
        return None
    for sizes in _SIZES:
        inputs, outputs = (getattr(module, name, None) for name in sizes)
        if sorted(weight.shape[-2:]) == sorted(n for n in (inputs, outputs) if isinstance(n, int)):
            return Layer("custom", {"weight": "*oi" if weight.shape[-1] == inputs else "*io"})
    return None


def _shaped(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None and not is_lazy(parameter):
            yield name, parameter


def sizes(module: nn.Module, whole_heads: bool = True) -> dict[str, object]:
    """The attributes of one of torch's layers that repeat sizes of its tensors, as the tensors say now.

    Args:
        module: whose tensors may have been cut since it was made.
        whole_heads: of an attention: whether heads went, and not parts of each.

    >>> layer = nn.Linear(4, 2)
    >>> layer.weight = nn.Parameter(torch.zeros(2, 3))
    >>> sizes(layer)
    {'out_features': 2, 'in_features': 3}
    """
    weight = module._parameters.get("weight")
    shape = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent_sizes(module)
    if isinstance(module, nn.MultiheadAttention):
        return _attention_sizes(module, whole_heads)
    if not shape:
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {**_convolution_sizes(module, shape[0], shape[1]), "kernel_size": shape[2:]}
    if isinstance(module, nn.GroupNorm):
        groups = shape[0] if module.num_groups == module.num_channels else module.num_groups
        return {"num_groups": groups, "num_channels": shape[0]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"embedding_dim": shape[1]}
    if isinstance(module, nn.Bilinear):
        return {"out_features": shape[0], "in1_features": shape[1], "in2_features": shape[2]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    return {}


def _convolution_sizes(module: nn.modules.conv._ConvNd, rows: int, columns: int) -> dict[str, object]:
    groups = module.groups
    if groups > 1 and columns == 1:  # depthwise: groups go with their channels
        old = module.in_channels if module.transposed else module.out_channels
        groups = rows // max(1, old // groups)
    inner, outer = (rows, columns * groups) if module.transposed else (columns * groups, rows)
    return {"groups": groups, "in_channels": inner, "out_channels": outer}


def _recurrent_sizes(module: nn.RNNBase | nn.RNNCellBase) -> dict[str, object]:
    shape = {name: tuple(p.shape) for name, p in _shaped(module)}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": shape["weight_ih"][1], "hidden_size": shape["weight_hh"][1]}
    layer = known(type(module))
    found: dict[str, object] = {
        "input_size": shape["weight_ih_l0"][1],
        "hidden_size": shape["weight_hh_l0"][0] // (layer.gates if layer is not None else 1),
    }
    return {**found, "proj_size": shape["weight_hr_l0"][0]} if module.proj_size else found


def _attention_sizes(module: nn.MultiheadAttention, whole_heads: bool) -> dict[str, object]:
    query = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
    outer, inner = query.shape[1], module.out_proj.weight.shape[1]
    heads = module.num_heads
    if whole_heads and inner % module.head_dim == 0:
        heads = inner // module.head_dim
    sides = {"kdim": outer, "vdim": outer}
    if not module._qkv_same_embed_dim:
        sides = {"kdim": module.k_proj_weight.shape[1], "vdim": module.v_proj_weight.shape[1]}
    return {"embed_dim": outer, "num_heads": heads, "head_dim": inner // heads, **sides}
