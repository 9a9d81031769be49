"""Sparse Linear layers that one native call computes: where their tensors are, and whether all is as it was."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from secateur.runtime import activations, native
from secateur.runtime.layouts import readable
from secateur.runtime.linears import SparseLinear
from secateur.runtime.weight_checks import Watch, pointers, seen_to_differ, version

__all__: list[str] = []  # reached through secateur.accelerate alone


class PackedLayers:
    """Layers that one native call computes, perhaps with other modules between them.

    Args:
        modules: all of them, in their order, the first one a SparseLinear.
        choices: bit b tells whether row class b is one call.
    """

    plain: ClassVar[Any]
    """A class whose forward calls the layers one by one."""
    widths: tuple[int, ...]
    """Features that go in and come out, in words of the plan."""
    has_code: ClassVar[bool] = False
    """Its code is that of its layers, which was chosen before."""

    def __init__(self, modules: Sequence[Any], choices: int) -> None:
        self._choices = choices
        self.agrees = True
        """Whether the module that it stands in gave the same for all examples."""
        own = [module for module in modules if isinstance(module, nn.Module)]
        self._own = [module.__dict__ for module in own]
        self._settings = [(m.__dict__, name, value) for m in own for name, value in activations.settings(m).items()]
        kinds: set[type[nn.Module]] = {*map(type, own)}
        self._forwards = [(kind, kind.forward) for kind in kinds]
        self.layers = [module for module in modules if isinstance(module, SparseLinear)]
        self._shapes = [layer.weight.shape for layer in self.layers]
        """Of the weights: what is made room for goes by these, and none that is packed has others."""
        self._pointers = ctypes.c_void_p * len(self.layers)
        self._blobs = self._biases = self._pointers()
        self._codes: list[native.Code | None] = []
        self._known: list[tuple[Any, ...]] = []
        self._tensors: list[Tensor] = []
        self._addresses = [0]  # which no tensors have, so the first call renews all
        self._read: list[Tensor] = []
        self._laid_out: tuple[list[int], list[tuple[int, ...]]] = ([], [])
        self._watches: list[Watch] = []
        self._watched: tuple[Any, Any] = (None, None)

    def __call__(self, x: Tensor) -> Any:
        return self.forward(x)

    def forward(self, x: Tensor) -> Any:
        """What the layers give, in one call or in several."""
        raise NotImplementedError

    def choose(self, choices: int, generated: int = 0) -> None:
        """Run as one native call for these row classes."""
        self._choices = choices

    def rows(self, x: Tensor) -> int:
        """The rows of its first layer."""
        return self.layers[0].rows(x)

    def observe(self, x: Tensor) -> None:
        """Nothing to learn from an example."""

    def _ready(self, x: Tensor) -> bool:
        """Whether the modules may be passed over; raises a StateError as their own `_ready` does."""
        if disturbed(self._own):
            return False
        for own, name, value in self._settings:
            if own.get(name) != value:
                return False
        for kind, forward in self._forwards:  # which may be replaced for all, as an activation's
            if kind.forward is not forward:
                return False
        if not self.layers[0]._takes_input(x):
            return False
        if not self._in_place() and not self._renew():
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._read):
            return False  # the layers say what is wrong
        if seen_to_differ(self._watches, self._watched):
            for layer in self.layers:  # to say which it is
                layer.require_fresh()
        return True

    def _in_place(self) -> bool:
        """Whether all tensors are where they were, and none was written to as far as torch counts."""
        try:
            for parameters, buffers, weight, number, bias, packed in self._known:
                if (
                    parameters["weight"] is not weight
                    or weight._version != number
                    or parameters["bias"] is not bias
                    or buffers["packed_weight"] is not packed
                ):
                    return False
        except (KeyError, RuntimeError):  # parameters gone, or made in inference mode
            return False
        return [*map(Tensor.data_ptr, self._tensors)] == self._addresses and _layout(self._read) == self._laid_out

    def _renew(self) -> bool:
        """Take the addresses of all tensors as they are now, and tell whether all can be read by these.

        Raises:
            StateError: weights have changed.
        """
        known: list[tuple[Any, ...]] = []
        for layer in self.layers:
            layer.current()
            weight = layer.weight
            known.append((layer._parameters, layer._buffers, weight, version(weight), layer.bias, layer.packed_weight))
        weights, biases = [one[2] for one in known], [one[4] for one in known]
        if [weight.shape for weight in weights] != self._shapes:
            return False
        if not all(readable(bias, shape[0]) for bias, shape in zip(biases, self._shapes, strict=True)):
            return False
        self._blobs = self._pointers(*(packed.data_ptr() for *_, packed in known))
        self._biases = self._pointers(*(None if bias is None else bias.data_ptr() for bias in biases))
        self._tensors = [tensor for _, _, weight, _, *rest in known for tensor in (weight, *rest) if tensor is not None]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._read = [tensor for tensor in (*weights, *biases) if tensor is not None]
        self._laid_out = _layout(self._read)
        watched = [layer for layer in self.layers if layer._packed_from is not None and layer._packed_from.watches]
        self._watches = [layer._packed_from.watches[0] for layer in watched]  # type: ignore[union-attr]
        addresses = [layer.weight.data_ptr() for layer in watched]
        self._watched = pointers(addresses), pointers([one.address for one in self._watches])
        self._known = known
        self._codes = [layer._codes.get("weight") for layer in self.layers]  # kept, as it is called by its address
        self._laid()
        return True

    def _laid(self) -> None:
        """Lay out what depends on the addresses of tensors and codes."""


def _layout(tensors: list[Tensor]) -> tuple[list[int], list[tuple[int, ...]]]:
    return [*map(Tensor.numel, tensors)], [*map(Tensor.stride, tensors)]


def disturbed(modules: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some modules, given by their attributes, are in training, or have hooks or a forward of their own."""
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    for own in modules:
        if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return True
    return False
