"""What all sparse layers share: they are the user's modules with another class, and can become plain again.

A swap changes `module.__class__` to a subclass and nothing else that a user sees: parameters, names, hooks and
`state_dict()` stay, and the packed weights are non-persistent buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from secateur.anatomy import Layer
from secateur.errors import StateError
from secateur.runtime import native, products
from secateur.runtime.weight_checks import Snapshot
from secateur.support import bits

SPARSE_ENOUGH = 0.3
"""Share of zeros from which a sparse kernel is worth a try."""

_METHODS = ("__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__", "__getattribute__", "__call__")
_autocast = torch._C._is_any_autocast_enabled
_modes = torch._C._len_torch_dispatch_stack  # FlopCounterMode and its like, which ctypes would hide the work from
_tracing = torch._C._is_tracing
_transformed = torch._C._functorch.peek_interpreter_stack
_function_modes = torch._C._len_torch_function_stack


class Swapped(nn.Module):
    """A module whose class was swapped for a subclass; survives deepcopy and pickle as such."""

    plain: ClassVar[type[nn.Module]] = nn.Module
    """The class that it had."""
    mixin: ClassVar[type[Swapped] | None] = None
    """For a class made by `swapped_class`, what it was made with."""

    def restore(self) -> None:
        """Become the plain module again."""
        self.__class__ = self.plain  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(max(protocol, 2))
        _, _, state, *rest = made
        return _blank, (self.mixin or type(self), self.plain), state, *rest


_made: dict[tuple[type[Swapped], type[nn.Module]], type[Swapped]] = {}


class Sparse(Swapped):
    """A layer that computes with packed weights for the row classes in `_choices`, else as the class it was."""

    device: ClassVar[str] = "cpu"
    """The type of the devices whose layers it takes."""
    serves: ClassVar[str] = "float32 on the CPU"
    """What its kernels compute, in words."""
    code_from: ClassVar[int | None] = 4
    """Row class from which on generated code may pay, as it takes 12 inputs or more at once; None: it never does."""

    _choices: int
    _place: str
    _form: str
    _values: torch.dtype
    """What packed values are rounded to."""
    _checked: bool
    """Whether a call with inputs that are not finite runs dense."""
    _trusted: bool
    """Whether calls do not look for edits of the weights that torch does not count."""
    _codes: dict[str, native.Code]
    """Code generated for packed matrices, by the name of the matrix."""
    _packed_from: Snapshot | None
    """What was packed; holds no tensor of the model, as torch.export would replace it. None where it has changed."""

    @classmethod
    def takes(cls, kind: type[nn.Module], layer: Layer) -> bool:
        """Whether it is for layers of this class, of which anatomy has this entry."""
        return kind is cls.plain

    @classmethod
    def suits(cls, tensor: Tensor) -> bool:
        """Whether a tensor is of a dtype and on a device that its kernels compute with."""
        return tensor.dtype is torch.float32 and tensor.is_cpu

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Why a plain module cannot become this, in a few words, or an empty string."""
        return ""

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        """Name, values [rows, columns] and groups of each matrix to pack."""
        raise NotImplementedError

    def sources(self) -> dict[str, Tensor | None]:
        """The parameters by name, among them those that are packed."""
        return self._parameters  # type: ignore[return-value]

    def watched(self) -> Sequence[str]:
        """Names of the parameters that are packed."""
        return ("weight",)

    def rows(self, *args: Any, **kwargs: Any) -> int:
        """How many rows a call has: what its choice of kernel goes by."""
        raise NotImplementedError

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """See a call of the example before anything is packed."""

    def prepare(self, place: str) -> None:
        """Start after the swap: dense for all inputs, nothing packed."""
        self._choices, self._place, self._form, self._values = 0, place, products.form(), torch.float32
        self._checked, self._trusted, self._packed_from, self._codes = False, False, Snapshot({}), {}

    def pack(self, values: torch.dtype = torch.float32) -> None:
        """Pack the weights as they are now, rounded to this dtype.

        Raises:
            InputError: a matrix is too large for the native library, or a weight for the dtype.
        """
        for name, matrix, groups in self.matrices():
            self.register_buffer(f"packed_{name}", products.pack(matrix, groups, values), persistent=False)
        self._form, self._values = products.form(), values
        self.stamp()

    def generate(self) -> None:
        """Make code for the packed matrices whose product can take it, if code can run here at all."""
        for name, *_ in self.matrices():
            packed = self._buffers.get(f"packed_{name}")
            if packed is not None and (code := self.code_for(name, packed)) is not None:
                self._codes[name] = code

    def code_for(self, name: str, packed: Tensor) -> native.Code | None:
        """The code of one of its packed matrices, if there can be some."""
        return native.generate(packed)

    @property
    def has_code(self) -> bool:
        """Whether code was generated for some of its products."""
        return bool(self._codes)

    def choose(self, choices: int, generated: int = 0) -> None:
        """Use a sparse kernel for these row classes, and for the latter of them generated code where there is some."""
        self._choices = choices | products.CHECKED if choices and self._checked else choices
        for code in self._codes.values():
            code.choices = generated

    def stamp(self) -> None:
        """Take the weights as they are now for those that were packed."""
        found = self.sources()
        weights = {name: weight for name in self.watched() if (weight := found[name]) is not None}
        self._packed_from = Snapshot(weights, self._trusted)

    def fresh(self) -> bool:
        """Whether each weight is the one that was packed."""
        return self._packed_from is not None and self._packed_from.same(self.sources())

    def restore(self) -> None:
        """Become the plain module again, without packed weights."""
        for name in [name for name in self._buffers if name.startswith("packed_")]:
            delattr(self, name)
        for name in (
            "_choices",
            "_place",
            "_form",
            "_values",
            "_checked",
            "_trusted",
            "_packed_from",
            "_codes",
            *self._extras(),
        ):
            del self.__dict__[name]
        super().restore()

    def _extras(self) -> tuple[str, ...]:
        """Further attributes that `restore` must delete."""
        return ()

    def _ready(self, *inputs: Tensor) -> bool:
        """Whether the sparse kernels can take these inputs; if not, the plain class does.

        Raises:
            StateError: gradients are asked for, or the weights are not those that were packed.
        """
        return self._takes_input(*inputs) and self.current()

    def _takes_input(self, *inputs: Tensor) -> bool:
        """Whether all inputs are for the sparse kernels; raises a StateError if gradients are asked for."""
        if torch.is_grad_enabled() and (self.training or self._differentiable(inputs)):
            raise self._no_gradient()
        if special():
            if _autocast():
                products.warn_once(
                    "autocast is on, so sparse layers run dense in its dtype. Switch it off for their speed."
                )
            return False
        for x in inputs:
            if type(x) is not Tensor or not self.suits(x) or x.is_neg() or (x.numel() and not x.data_ptr()):
                return False  # the last two have signs, or zeros, that are not in their memory
        return True

    def _differentiable(self, inputs: Sequence[Tensor]) -> bool:
        """Whether torch would have to record what is done with inputs, or with own parameters."""
        own: Any = self._parameters.values()
        return any(x.requires_grad for x in inputs) or any(one is not None and one.requires_grad for one in own)

    def current(self) -> bool:
        """Return True if the weights are those that were packed; raise a StateError if a change is found."""
        if self._packed_from is None or not self._packed_from.holds(self.sources()):
            self.require_fresh()
        return True

    def require_fresh(self) -> None:
        """Raise a StateError if a single weight is not the one that was packed."""
        if not self.fresh():
            raise StateError(
                f"the weights of {self._place or 'the model'} have changed since they were packed, so its results "
                "would be those of the old weights. Accelerate the new weights: "
                "fast = sc.accelerate(sc.dense(fast), example_inputs). What prunes a model and calls it on the way "
                "takes plain = sc.dense(fast)"
            )
        self.stamp()

    def _traceable(self, x: Tensor) -> bool:
        """Whether an operator of ours may stand for the layer in a graph."""
        return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def _no_gradient(self) -> StateError:
        return StateError(
            f"{self._place or 'the model'} is an accelerated layer, which is for inference and gives no gradients. "
            "For inference call fast.eval() and use torch.inference_mode(); "
            "to train, take the model you gave to accelerate, or sc.dense(fast)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, given, state, *rest = super().__reduce_ex__(protocol)
        return made, given, {**state, "_packed_from": self.fresh()}, *rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not self._packed_from:  # stale before
            self._packed_from = None
            return
        self._revive()

    def _revive(self) -> None:
        """Be ready again after a copy, or in another process, where the weights are those that were packed."""
        self._codes = {name: code for name, code in self._codes.items() if code is not None}  # where it cannot run
        packed = any(name.startswith("packed_") for name in self._buffers)
        if packed and self._form != products.form():  # from a machine with, or without, the native library
            self._codes = {}
            self.pack(self._values)
        self.stamp()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        fresh = self.fresh()
        packed = {name: one for name, one in self._buffers.items() if name.startswith("packed_") and one is not None}
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in packed.items():
            now = self._buffers[name]
            if now is not None and now.is_cpu and before.is_cpu and not torch.equal(now, before):
                self._buffers[name] = before  # `to_empty` makes all buffers anew, and these can be made by nobody else
        if fresh:
            self._moved()
        return result

    def _moved(self) -> None:
        """Go on after weights that were those that were packed went elsewhere, perhaps to another dtype and back."""
        if self.fresh():
            self.stamp()


KINDS: list[type[Sparse]] = []
"""The sparse classes, which are registered where they are written."""

_S = TypeVar("_S", bound=type[Sparse])


def sparse(mixin: _S) -> _S:
    """Register a class: layers that it `takes` are tried as such."""
    KINDS.append(mixin)
    return mixin


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Turn a plain module into a sparse one; `restore` turns it back."""
    module.__class__ = swapped_class(mixin, type(module))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has or, if it was swapped, had."""
    return module.plain if isinstance(module, Swapped) else type(module)


def as_usual(kind: type[nn.Module]) -> bool:
    """Whether modules of a class are copied, called and read as any others, so that it can do with another class."""
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _METHODS)


def read_from_instances(kind: type[nn.Module], names: Iterable[str]) -> bool:
    """Whether attributes of these names are what a module itself holds: its class has none, and no way of its own."""
    usual = kind.__getattr__ is nn.Module.__getattr__ and kind.__getattribute__ is object.__getattribute__
    return usual and not any(hasattr(kind, name) for name in names)


def held_at(module: nn.Module, path: str) -> nn.Module | None:
    """The module of this name within another one, whatever a class has under such names; None if there is none."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def swapped_class(mixin: type[Swapped], plain: type[nn.Module]) -> type[Swapped]:
    """A subclass of `plain` that behaves as `mixin`: the latter itself for the class it was written for."""
    if mixin.plain is plain:
        return mixin
    if (made := _made.get((mixin, plain))) is not None:
        return made
    names = {"plain": plain, "mixin": mixin, "__module__": mixin.__module__, "__doc__": mixin.__doc__}
    return _made.setdefault((mixin, plain), type(f"Sparse{plain.__name__}", (mixin, plain), names))


def zero_share(weight: Tensor) -> float:
    """Share of a tensor that is zero; 0 of an empty one."""
    nonzeros = bits.plain(weight).bool().count_nonzero()  # of bytes: of floats it would take twice as long
    return 1 - int(nonzeros) / max(weight.numel(), 1)


def worth_packing(weight: Tensor) -> bool:
    """Whether a matrix has zeros enough to be tried."""
    return zero_share(weight) >= SPARSE_ENOUGH


def _blank(mixin: type[Swapped], plain: type[nn.Module]) -> Swapped:
    made = swapped_class(mixin, plain)
    return made.__new__(made)


def special() -> bool:
    """Whether something is on under which layers run dense.

    That is autocast, a trace, a mode that must see their work, or tensors that may be more than their values: of
    torch.func, or with tangents.
    """
    if _autocast() or _modes() or _tracing() or _transformed() is not None or forward_ad._current_level >= 0:
        return True
    return bool(_function_modes() and _watched_over())


def _watched_over() -> bool:
    """Whether a mode on this thread must see torch's functions: sampled dropout, or a weight with noise.

    The mode of a default device sees them too, but changes nothing here.
    """
    return not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
