"""Other tensors in the place of the weights of a module for one forward; only the thread that runs it sees them.

Nothing is put into the module: a `TorchFunctionMode`, which acts on one thread only, passes the other tensors to the
functions that the forward calls. So the same module may run elsewhere at the same time, and `state_dict()` is its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

Stand = tuple[Any, Any]
"""A tensor of a module, or its list of them, and what stands in for it."""


def begin(host: nn.Module, stands: Iterable[Stand]) -> None:
    """Let `host` compute with other tensors; to be called by a forward pre-hook of it, which `end` follows."""
    sweep()
    frame = None if torch.compiler.is_compiling() else sys._getframe(2)  # dynamo knows no frames
    _Substitution(host, stands, frame).__enter__()  # type: ignore[no-untyped-call]


def end(host: nn.Module, *_: Any) -> None:
    """End what `begin` began, if it did; a forward hook, to be called after an error too."""
    mode = _top()
    if isinstance(mode, _Substitution) and mode.host is host:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def sweep() -> None:
    """Take off what an interruption that no hook sees (a KeyboardInterrupt) has left on this thread."""
    while isinstance(mode := _top(), _Substitution) and not mode.running:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _top() -> TorchFunctionMode | None:
    """The mode of this thread that sees torch functions first."""
    found: TorchFunctionMode | None = _get_current_function_mode()  # type: ignore[no-untyped-call]
    return found


class _Substitution(TorchFunctionMode):
    """Gives torch functions other tensors than they are called with.

    Args:
        host: the module that runs.
        stands: what is given for what.
        frame: of the call of `host`. Once it has ended, by whatever, nothing is substituted any more.
    """

    def __init__(self, host: nn.Module, stands: Iterable[Stand], frame: Any) -> None:
        super().__init__()
        self.host = host
        self._stands = list(stands)  # holds what the ids are of
        self._new = {id(old): new for old, new in self._stands}
        self._frame = frame

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (self._meets(args) or (kwargs and self._meets(kwargs.values()))) and self.running:
            return func(*self._put(args), **{name: self._put(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)

    @property
    def running(self) -> bool:
        """Whether the call of the module is on the stack of this thread."""
        if self._frame is None:
            return True
        frame: Any = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def _meets(self, things: Iterable[Any]) -> bool:
        for x in things:  # noqa: SIM110, as each function of a forward comes by, and any() takes longer
            if id(x) in self._new or (type(x) in (list, tuple) and self._meets(x)):
                return True
        return False

    def _put(self, x: Any) -> Any:
        if id(x) in self._new:
            return self._new[id(x)]
        return type(x)(map(self._put, x)) if type(x) in (list, tuple) else x
