"""Sparse layers whose dense weight may be given back: what was packed rebuilds it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import StateError
from secateur.runtime.swapping import Sparse

__all__: list[str] = []  # reached through secateur.accelerate alone


class Releasable(Sparse):
    """A layer that packs its parameter `weight` and no other.

    Released, the parameter keeps its name, shape and dtype, on the meta device, which has no values.
    """

    weight: Any
    _released: bool

    def prepare(self, place: str) -> None:
        super().prepare(place)
        self._released = False

    def rebuilt(self) -> Tensor:
        """The weight as it was packed, in float32."""
        raise NotImplementedError

    def release(self) -> bool:
        """Give the memory of the weight back; False, and nothing done, if what was packed has not each bit of it.

        So it is if values were rounded, or if there is a negative zero among them.
        """
        self._released = torch.equal(self.rebuilt().view(torch.int32), self.weight.detach().view(torch.int32))
        if self._released:
            self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
            self.stamp()
        return self._released

    def restore(self) -> None:
        if self._released:
            self.weight = nn.Parameter(self.rebuilt().to(self.weight.dtype), requires_grad=False)
        super().restore()

    def _extras(self) -> tuple[str, ...]:
        return ("_released",)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._released:
            destination[f"{prefix}weight"] = self.rebuilt().to(self.weight.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.refuse(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def refuse(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raise a StateError if a state dict has a value for a weight that was released."""
        if self._released and f"{prefix}weight" in state_dict:
            raise StateError(
                f"the dense weights of {self._place or 'the model'} were released, so there is nothing to load into. "
                "Load into plain = sc.dense(fast), then sc.accelerate(plain, example_inputs, keep_dense=False)"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if not self._released:
            return super()._apply(fn, recurse)

        def moved(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return fn(tensor)
            like = fn(torch.empty(0, dtype=tensor.dtype))
            return tensor.to(like.dtype) if like.is_cpu else fn(self.rebuilt().to(tensor.dtype))

        fresh = self.fresh()
        result = super()._apply(moved, recurse)
        self._released = self.weight.is_meta
        if fresh:
            self.stamp()
        return result


def guard_loading(model: nn.Module) -> None:
    """Have a model refuse to load into weights that were released before anything of it is loaded."""
    model.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]


def unguard_loading(model: nn.Module) -> None:
    """Take that back."""
    hooks: dict[int, Any] = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook.hook is _refuse]:
        del hooks[key]


def _refuse(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, Releasable):
            layer.refuse(state_dict, f"{prefix}{name}{name and '.'}")
