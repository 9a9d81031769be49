"""Sparse layers whose dense weight may be given back: what was packed rebuilds it, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import StateError
from secateur.runtime.swapping import Sparse
from secateur.runtime.weight_checks import Snapshot

__all__: list[str] = []  # reached through secateur.accelerate alone


class Released(nn.Parameter):
    """A weight that has a shape, strides and a dtype, on the meta device, but no values: whoever wants some is refused.

    Torch itself would compute with it and with plain tensors, and give memory that nobody has written.
    """

    place: str
    """Of the layer, for messages."""
    remedy: ClassVar[str] = "it was released (keep_dense=False). Use plain = sc.dense(fast), which has all weights"
    """What to do, for errors of others (`bits.valueless`)."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, place: str) -> Released:
        make: Any = Tensor._make_wrapper_subclass
        with torch.inference_mode(False):  # a tensor that was made in it cannot be given by `detach`
            made: Released = make(cls, shape, strides=stride, dtype=dtype, device="meta")
        made.place = place
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse each operation but `detach`, which `.data` is, too: what these give must not be written to either."""
        one = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        if func is torch.ops.aten.detach.default:
            return one.with_dtype(one.dtype)
        raise one._refusal(str(func))

    def with_dtype(self, dtype: torch.dtype) -> Released:
        """The same of another dtype."""
        return Released(self.shape, self.stride(), dtype, self.place)

    @functools.cached_property
    def turned(self) -> Released:
        """The transposed one, which a user's `weight.t()` is refused; kept, as calls need it."""
        return Released(self.shape[::-1], self.stride()[::-1], self.dtype, self.place)

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as torch does without a word of why."""
        raise self._refusal("numpy")

    def tolist(self) -> Any:
        """Refuse, as torch does without a word of why."""
        raise self._refusal("tolist")

    def __deepcopy__(self, memo: dict[int, Any]) -> Released:
        return memo.setdefault(id(self), self.with_dtype(self.dtype))  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Released, (tuple(self.shape), self.stride(), self.dtype, self.place)

    def _refusal(self, what: str) -> StateError:
        return StateError(
            f"the dense weights of {self.place or 'the model'} were released, so there is nothing for {what} to read "
            "or to write. Use plain = sc.dense(fast), which has them, and accelerate that with keep_dense=True if its "
            "forward reads them, or with keep_dense=False again after you have changed them"
        )


class Releasable(Sparse):
    """A layer that packs its parameter `weight` and no other.

    Released, the parameter keeps its name, shape and dtype, but has no values.
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
            self.weight = Released(self.weight.shape, self.weight.stride(), self.weight.dtype, self._place)
            self.stamp()
        return self._released

    def restore(self) -> None:
        if isinstance(self.weight, Released):  # not if somebody has put another in its place
            self.weight = nn.Parameter(self.rebuilt().to(self.weight.dtype), requires_grad=False)
        super().restore()

    def _extras(self) -> tuple[str, ...]:
        return ("_released",)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, Released):
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

        left: list[Tensor] = []

        def moved(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, Released):
                return fn(tensor)
            like = fn(torch.empty(0, dtype=tensor.dtype))
            if like.is_cpu:
                return tensor.with_dtype(like.dtype)
            left.append(self.rebuilt())
            return fn(left[0].to(tensor.dtype))

        fresh = self.fresh()
        result = super()._apply(moved, recurse)
        self._released = not left
        if fresh:  # weights that went elsewhere are compared with these when they come back
            self._packed_from = Snapshot({"weight": left[0] if left else self.weight}, self._trusted)
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
