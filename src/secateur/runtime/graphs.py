"""A module's forward as a graph, by torch.fx: what it does step by step, for modules that hold sparse convolutions.

A trace must have no effect on the module, must come out the same twice, and must depend only on what is watched or
cannot change. What cannot be traced so is left alone.
"""

from __future__ import annotations

import copy
import operator
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.runtime.attributes import Attributes, followed, inside, is_leaf
from secateur.runtime.chains import Fused
from secateur.runtime.forwards import Refused, Watch
from secateur.runtime.weight_checks import version

__all__: list[str] = []  # reached through secateur.accelerate alone

_AGREES = 1e-3  # of the largest value: rounding is a thousand times less, another function is more
_ONE_AT_A_TIME = threading.Lock()  # torch.fx replaces methods of nn.Module while it traces
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


def trace(module: nn.Module) -> fx.Graph | None:
    """The graph of `forward(x)` of a module in evaluation mode.

    A copy is traced: what the forward sets has to be undone, and with it would be what another thread sets meanwhile.

    Returns:
        None if the forward cannot be traced, has an effect on the module or on random numbers, or depends on something
        that is neither watched nor of a kind that cannot change.

    Raises:
        ValueError: the module has too many attributes, or cannot be copied.
    """
    copied = _copied(module)
    for one in (*module.modules(), *copied.modules()):
        if isinstance(one, Fused):
            one.steps()  # which it notes, and would otherwise while it is traced
    module = copied
    before, numbers = Attributes(module), _Numbers()
    held = [(tensor, version(tensor), tensor.detach().clone()) for tensor in before.tensors()]
    watch = Watch(inside(module))
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = _Tracer(module, watch).trace(module)
        except Exception:  # whatever the code of a user raises when it is given no tensor
            graph = None
    written = [(tensor, value) for tensor, number, value in held if version(tensor) != number]
    if before.same(module) and numbers.same() and not written:
        return None if watch.refused else graph
    before.put_back()  # what the copy shares: of classes and functions
    numbers.put_back()
    for tensor, value in written:
        tensor.detach().copy_(value)
    return None


def _copied(module: nn.Module) -> nn.Module:
    """A copy of a module and of those inside, with the same leaves and tensors."""
    same: list[Any] = [*Attributes(module).tensors()]
    for one in inside(module):
        same += [*one._parameters.values(), *one._buffers.values()]
        same += [child for child in one._modules.values() if child is not None and is_leaf(child, followed(module))]
    try:
        return copy.deepcopy(module, {id(one): one for one in same if one is not None})
    except Exception as error:  # of a user's code, or as another thread adds attributes
        raise ValueError("the module cannot be copied") from error


def fingerprint(graph: fx.Graph) -> str:
    """All that a graph does, in words: equal for equal graphs, in any process."""
    return "\n".join(f"{n.name} {n.op} {_name(n.target)} {_spelled(n.args)} {_spelled(n.kwargs)}" for n in graph.nodes)


def agree(one: Any, other: Any) -> bool:
    """Whether two results are of the same function, up to rounding."""
    if not isinstance(one, Tensor):
        return type(one) is type(other) and (one is other or bool(one == other))
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype is not other.dtype:
        return False
    if not one.is_floating_point():
        return one.equal(other)
    most = one.abs().nan_to_num(0, 0, 0).amax().item() if one.numel() else 0.0
    return torch.allclose(one, other, rtol=_AGREES, atol=_AGREES * most, equal_nan=True)


class _Numbers:
    """The states of the generators of random numbers."""

    def __init__(self) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._numpy: Any = np.random.get_state()

    def same(self) -> bool:
        kind, words, *rest = self._numpy
        now, new_words, *new_rest = np.random.get_state()
        numpy = kind == now and np.array_equal(words, new_words) and rest == new_rest
        return numpy and self._python == random.getstate() and self._torch.equal(torch.get_rng_state())

    def put_back(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)


class _Wordless:
    """Has no words: by them a value that is not known yet would be told from others."""

    def __repr__(self) -> str:
        raise Refused

    def __format__(self, spec: str) -> str:
        raise Refused


class _Proxy(_Wordless, fx.Proxy):
    """Stands for a value while the forward runs."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)


class _Attribute(_Wordless, fx.proxy.Attribute):
    """Stands for an attribute of such a value."""


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _one in _IN_PLACE:  # which torch.fx takes for `a = a + b`: then another name for the same tensor is not changed
    setattr(_Proxy, f"__{_one}__", _in_place(_one))


class _Tracer(fx.Tracer):
    """Traces a call with one positional argument, on this thread alone."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, watch: Watch) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._top, self._watch = module, watch

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m, followed(self._top))

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        self._watch.step()
        return super().create_proxy(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        def watched(*args: Any) -> Any:
            with self._watch:
                return root_fn(*args)

        return watched, [self._top, self.create_proxy("placeholder", "x", (), {})]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:  # another model, in use meanwhile
            return forward(*args, **kwargs)
        self._watch.enter(m)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def _spelled(value: Any) -> str:
    """Arguments in words, without the addresses of objects."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_spelled(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_spelled, value)) + ")"
    return _name(value) if callable(value) else repr(value)
