"""Following optimizers: those inside others, when one steps, what it holds, what it remembers of pruned weights."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from secateur.errors import InputError, InputTypeError, listed
from secateur.masks import Masks
from secateur.support import bits, checks

Before = Callable[[Optimizer, Any, Any], Any]
After = Callable[[Optimizer, Any, Any], None]

# ---- optimizers inside others ------------------------------------------------------------------------------------


def family(thing: object) -> list[Any]:
    """An optimizer, or what holds one, and every optimizer inside it, the outermost first.

    SAM, Lookahead and ZeRO-1 keep an optimizer in an attribute; those of accelerate and Lightning, a Trainer, and
    many others, in `.optimizer`.
    """
    found: list[Any] = []
    waiting = [thing]
    while waiting:
        one = waiting.pop(0)
        if not any(one is other for other in found):
            found.append(one)
            waiting += _inside(one)
    return [one for one in found if _steps(one)]


def _steps(thing: object) -> bool:
    return isinstance(thing, Optimizer) or (hasattr(thing, "param_groups") and hasattr(thing, "step"))


def _inside(thing: object) -> list[object]:
    held: list[object] = []
    for value in vars(thing).values() if _steps(thing) and hasattr(thing, "__dict__") else ():
        held += value if isinstance(value, (list, tuple)) else [value]
    wrapped = getattr(thing, "optimizer", None)
    return [value for value in held if _steps(value)] + ([wrapped] if wrapped is not None else [])


def takes_hooks(optimizer: object) -> bool:
    """Whether torch calls hooks around the steps of this optimizer (a wrapper may have none of its own)."""
    return isinstance(optimizer, Optimizer) and "_optimizer_step_post_hooks" in vars(optimizer)


def held(optimizers: Iterable[Any], scope: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors in scope that one of these optimizers steps."""
    ids: set[int] = set()
    for group in chain.from_iterable(one.param_groups for one in optimizers):
        ids.update(map(id, group["params"]))
    return {name for name, weight in scope.items() if id(weight) in ids}


def trained(scope: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors in scope that are not frozen."""
    return {name for name, weight in scope.items() if weight.requires_grad}


def resolve(given: Sequence[object], scope: Mapping[str, Tensor]) -> list[Any]:
    """Find the optimizers given and those inside them; see that all together they hold what is trained.

    Raises:
        InputTypeError: no torch optimizer, and none inside.
        InputError: trainable weights in scope that none of them holds.
    """
    every: dict[int, Any] = {}
    for thing in given:
        found = family(thing)
        every |= {id(one): one for one in found}
        if not any(takes_hooks(one) for one in found):
            raise InputTypeError(
                f"{type(thing).__name__} is not a torch.optim.Optimizer that takes step hooks, and holds none in "
                ".optimizer: give the optimizer it wraps. A Trainer makes its own late: call attach() without "
                "arguments, which follows any optimizer. Else call pruner.step() after each step"
            )
    missing = trained(scope) - held(every.values(), scope)
    if given and missing:
        raise InputError(
            f"{listed(sorted(missing))} is in scope and trainable, but in "
            "none of these optimizers: give every optimizer of the model in one call, made from the parameters that "
            "the model has now; freeze it with requires_grad_(False); leave it out of the scope; or, where an "
            "optimizer keeps copies of the weights (fp32 master weights), call pruner.step() after each step instead"
        )
    return list(every.values())


# ---- steps -------------------------------------------------------------------------------------------------------


class Hooks:
    """Calls `before` and `after` around each step of some optimizers, or, with none, of every optimizer of the process.

    A wrapper that is no torch optimizer (it takes no hooks) may move weights after the step of the optimizer inside it:
    `settle` is called after its own step.
    """

    def __init__(
        self, optimizers: Sequence[Any], owner: object, before: Before, after: After, settle: Callable[[], None]
    ) -> None:
        first, last = _eager(before), _eager(after)
        last.owner = owner
        self._handles: list[RemovableHandle] = []
        self._wrapped: list[tuple[Any, Any]] = []
        if not optimizers:
            self._handles = [
                torch_optimizer.register_optimizer_step_pre_hook(first),
                torch_optimizer.register_optimizer_step_post_hook(last),
            ]
        for one in optimizers:
            if takes_hooks(one):
                self._handles += [one.register_step_pre_hook(first), one.register_step_post_hook(last)]
            else:
                self._wrap(one, _eager(settle))

    def _wrap(self, wrapper: Any, settle: Callable[[], None]) -> None:
        step = wrapper.step

        @functools.wraps(step)  # with the marks that a scheduler of learning rates looks for
        def settled(*args: Any, **kwargs: Any) -> Any:
            out = step(*args, **kwargs)
            settle()
            return out

        self._wrapped.append((wrapper, vars(wrapper).get("step")))
        wrapper.step = settled

    @property
    def wraps(self) -> bool:
        """Whether a wrapper is among them, which may move weights after the step inside it."""
        return bool(self._wrapped)

    def remove(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        for wrapper, own in self._wrapped:
            if own is None:
                del wrapper.step
            else:
                wrapper.step = own


def _eager(function: Callable[..., Any]) -> Any:
    """The same function, never compiled; a call in eager mode costs no more for that."""
    disable: Callable[[Any], Any] = torch.compiler.disable
    disabled = disable(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call


def owners(optimizer: object) -> list[Any]:
    """Whose `Hooks` follow this optimizer, those that follow every optimizer included."""
    own = vars(optimizer)["_optimizer_step_post_hooks"].values() if takes_hooks(optimizer) else ()
    everywhere = torch_optimizer._global_optimizer_post_hooks.values()
    return [hook.owner for hook in chain(own, everywhere) if hasattr(hook, "owner")]


def enclosing(optimizer: Optimizer) -> list[Optimizer]:
    """Optimizers in whose step that of `optimizer` runs, as SAM, Lookahead and ZeRO-1 have it; for use in a hook.

    Read off the call stack: nothing has to be put right when a step ends in an error.
    """
    found: list[Any] = []
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer":
            found.append(frame.f_locals.get("self"))
        frame = frame.f_back
    if found and found[0] is optimizer:  # the step that calls the hook
        del found[0]
    return [one for one in found if one is not None]


def overflown(optimizer: Optimizer) -> bool:
    """Whether this step is skipped, as GradScaler tells an optimizer that unscales by itself (a fused one)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def scale(optimizer: Optimizer) -> float:
    """What the gradients are multiplied by, as GradScaler tells an optimizer that unscales by itself (a fused one)."""
    found = getattr(optimizer, "grad_scale", None)
    return 1.0 if found is None else float(found)


def closure_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The closure given to a step, from what a hook is told; args[0] is the optimizer."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def after_backward(
    call: Callable[[], object], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any] | None:
    """Call a function when a step about to be made has its gradients: now, or each time its closure has made them.

    Returns:
        What a hook before the step returns: None, or its arguments with another closure.
    """
    closure = closure_of(args, kwargs)
    if closure is None:
        call()
        return None

    def watched() -> Any:
        loss = closure()
        call()
        return loss

    return (args[0], watched, *args[2:]), {key: value for key, value in kwargs.items() if key != "closure"}


def trains_nothing(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a step about to be made is an optimizer's first, at a learning rate of 0 and with gradients of zeros.

    `torch.distributed.checkpoint` makes the state of a fresh optimizer by such a step.
    """
    groups = optimizer.param_groups
    if optimizer.state or closure_of(args, kwargs) is not None or any(float(g.get("lr", 0.0)) for g in groups):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return not any(bool((g._values() if g.is_sparse else g).any()) for g in gradients)


def moves_outside_step(optimizer: object) -> list[str]:
    """The methods by which an optimizer may move weights between its steps.

    Those of torch and of bitsandbytes never do. Others with public methods of their own may: `eval()` of schedule-free
    ones puts an average in place of the weights. A wrapper that keeps no state of its own passes such calls on, as that
    of accelerate does: what counts is the optimizer inside it.
    """
    kind, inside = type(optimizer), getattr(optimizer, "optimizer", None)
    if inside is not None and getattr(optimizer, "state", None) is getattr(inside, "state", inside):
        return []
    own = [one for one in kind.__mro__ if not one.__module__.startswith(("torch.", "bitsandbytes."))]
    names = dict.fromkeys(name for one in own for name in vars(one) if not name.startswith("_"))
    return [name for name in names if not hasattr(Optimizer, name) and callable(getattr(kind, name))]


# ---- what optimizers remember ------------------------------------------------------------------------------------


def forget(optimizers: Iterable[Any], scope: Mapping[str, Tensor], masks: Masks, zero: bits.Zeroer) -> None:
    """Set what optimizers remember of pruned weights (momentum, Adam's moments) to zero.

    Codes of low-bit optimizers become those of the value zero.

    Raises:
        InputError: a memory in a code that cannot be set to zero by value; nothing was changed.
    """
    for write in forgetting(optimizers, scope, masks, zero):
        write()


def forgetting(
    optimizers: Iterable[Any], scope: Mapping[str, Tensor], masks: Masks, zero: bits.Zeroer
) -> list[Callable[[], object]]:
    """What `forget` would do, checked and not yet done."""
    seen: set[int] = set()
    writes: list[Callable[[], object]] = []
    for optimizer in optimizers:
        memory = getattr(optimizer, "state", {})
        for name, weight in ((name, weight) for name, weight in scope.items() if name in masks):
            for key, tensor, beside in _remembered(memory.get(weight)):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    write = _zeroing(f"{key} of {name}", tensor, beside, masks.shape(name), masks.packed(name), zero)
                    writes += [write] if write else []
    return writes


def _remembered(state: object) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """The tensors that an optimizer keeps for one weight, each with its key and with what stands beside it."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield str(key), value, state
            else:
                yield from _remembered(value)


def _zeroing(
    what: str, tensor: Tensor, beside: Mapping[str, Any], shape: torch.Size, kept: Tensor, zero: bits.Zeroer
) -> Callable[[], object] | None:
    """How one memory of a weight is zeroed where the weight is pruned; None if it is not one number a weight."""
    each = [n for n in tensor.shape if n != 1] in ([n for n in shape if n != 1], [shape.numel()])
    tensor = bits.local(tensor) if bits.is_sharded(tensor) else tensor
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_quantized and tensor.layout is torch.strided
    if plain and (tensor.is_floating_point() or tensor.is_complex()):
        return (lambda: zero(tensor, kept)) if each else None
    if plain and (tensor.dtype == torch.bool or tensor.numel() < shape.numel() / 8):
        return None  # a mask, a counter, something of each block
    if each:
        pruned = ~bits.unpack(kept.to(tensor.device), shape.numel()).view(tensor.shape)
        if not plain:
            zeroed = _zeroed(tensor, pruned)
            if zeroed is not None:
                return lambda: tensor.copy_(zeroed)
        elif (code := _code_of_zero(tensor, beside)) is not None:
            return lambda: tensor.masked_fill_(pruned, code)
    raise InputError(
        f"the optimizer keeps {what} as {checks.kind(tensor)} of {tensor.dtype} and shape {tuple(tensor.shape)}, "
        "in an encoding whose zero is not known: prune with an optimizer that keeps its state in floating point, or "
        "make a new optimizer after the pruning"
    )


def _code_of_zero(codes: Tensor, beside: Mapping[str, Any]) -> int | None:
    """The integer that stands for zero: found in the table kept beside the codes (bitsandbytes keeps state1 and qmap1);
    without a table it is 0 where integers have a sign and nothing shifts them."""
    tables = {
        str(key): value
        for key, value in beside.items()
        if isinstance(value, Tensor) and value.is_floating_point() and ("map" in str(key) or "code" in str(key))
    }
    if tables:
        mine = next(str(key) for key, value in beside.items() if value is codes)
        table = tables.get(mine.replace("state", "qmap"), next(iter(tables.values())) if len(tables) == 1 else None)
        places = [] if table is None else (table.flatten() == 0).nonzero().flatten().tolist()
        return int(places[0]) if places else None
    shifted = any("zero" in str(key) or "offset" in str(key) for key in beside)
    return None if shifted or not codes.dtype.is_signed else 0


def _zeroed(tensor: Tensor, pruned: Tensor) -> Tensor | None:
    """A copy of a tensor of another kind, such as one quantized in blocks, that reads zero at `pruned`, if it can."""
    try:
        copied = _copied(tensor)
        copied.copy_(tensor.dequantize().masked_fill(pruned, 0))
        return copied if not bool(copied.dequantize()[pruned].any()) else None
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return None


def _copied(tensor: Tensor) -> Tensor:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.clone()
    names, context = tensor.__tensor_flatten__()  # clone() is often not written for them
    inside = {name: getattr(tensor, name).clone() for name in names}
    return type(tensor).__tensor_unflatten__(inside, context, tensor.shape, tensor.stride())
