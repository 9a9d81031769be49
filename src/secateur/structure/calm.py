"""Running a model and leaving it as it was: modes, buffers, whatever its modules hold, and random numbers."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import InputError
from secateur.measurement.costs import devices
from secateur.structure.calls import in_place, key, tensors
from secateur.structure.meta import Mixed, empty


@contextlib.contextmanager
def calm(model: nn.Module, training: bool, mode: TorchFunctionMode | None = None) -> Iterator[None]:
    """Eval or training mode without gradients and autocast; then modules and random numbers are as before.

    Autocast rounds, so that nothing could be proven, and it remembers weights that are cut since.

    Args:
        model: that runs.
        training: in which mode.
        mode: that sees its calls. What the mode itself calls is not looked through for writes.

    Raises:
        InputError: a parameter is written into.
    """
    modules = list(model.modules())
    own = [dict(vars(m)) for m in modules]
    held: list[Any] = [v for known in own for v in known.values() if isinstance(v, _HOLDS)]
    inner = [(v, [*(v.items() if isinstance(v, dict) else v)] if v else ()) for v in held]
    values = [
        (t, t.clone()) for m in modules for t in (*m._buffers.values(), *vars(m).values()) if isinstance(t, Tensor)
    ]
    cuda = [device for device in devices(model) if device.type == "cuda"]
    numpy, python = np.random.get_state(), random.getstate()

    def back() -> None:
        np.random.set_state(numpy)
        random.setstate(python)
        for content, before in inner:
            if content or before:  # most are empty: hooks that no module has
                content.clear()
                (content.extend if isinstance(content, list | deque) else content.update)(before)
        for m, attributes in zip(modules, own, strict=True):
            vars(m).update(attributes)
            for new in vars(m).keys() - attributes.keys():
                del vars(m)[new]
        with torch.no_grad():
            for t, value in values:
                t.copy_(value)

    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), contextlib.ExitStack() as exact:
            for kind in {"cpu", *(device.type for device in devices(model))} - {"meta"}:
                exact.enter_context(torch.autocast(kind, enabled=False))
            torch.default_generator.manual_seed(0)
            for device in cuda:
                torch.cuda.default_generators[device.index or 0].manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            model.train(training)
            guard, none = _Unwritten(model), contextlib.nullcontext()
            with Mixed() if empty(model) else none, mode or none, guard:
                yield
    finally:
        try:
            back()
        except BaseException:  # interrupted: all of it once more
            back()
            raise


class _Unwritten(TorchFunctionMode):
    """Keeps calls from writing into parameters, whose memory may be that of the given model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {_memory(p): name for name, p in model.named_parameters()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("max_norm") is not None and len(args) > 1:  # embedding, embedding_bag
            args = (args[0], args[1].clone(), *args[2:])
        written = [*args, *kwargs.values()][:1] if _writes(func) else []
        for t in tensors([written, kwargs.get("out")]) if written or "out" in kwargs else ():
            if (owner := self._own.get(_memory(t))) is not None:
                raise InputError(
                    f"the forward writes into {owner}, with {key(func)}, and would change the given model: let it make "
                    "a new tensor of the weight, such as weight * 0.9"
                )
        return func(*args, **kwargs)


@functools.lru_cache(4096)
def _writes(func: Any) -> bool:
    name = key(func)
    return (in_place(func) and name not in _NO_NUMBERS) or name in ("__setitem", "set.data")


_HOLDS = (dict, list, set, deque)
_NO_NUMBERS = {"requires_grad", "share_memory", "detach"}


def _memory(t: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        try:
            return cast(int, t.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # it has none: sparse, or within vmap
            return id(t)
