"""Smaller tensors in place of the old ones: parameters, buffers, gradients, and what an optimizer remembers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur import optimizers
from secateur.errors import InputError, StateError
from secateur.masks import Masks
from secateur.structure.blocks import Renaming
from secateur.structure.remains import pick
from secateur.support import checks

Kept = dict[str, dict[int, list[int]]]
"""For each tensor by name, for each dimension that is cut, the positions that stay."""

_SAME = Renaming(())


def sliced(tensor: Tensor, dims: Mapping[int, list[int]]) -> Tensor:
    """A tensor without the positions that go."""
    for d, kept in dims.items():
        tensor = pick(tensor, d, torch.tensor(kept))
    return tensor.contiguous()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def twin(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters share their memory with the model's, until they are cut.

    Raises:
        InputError: it cannot be copied.
    """
    memo: dict[int, object] = {}
    for p in model.parameters():
        if type(p) is nn.Parameter:
            shared = nn.Parameter(p.data, p.requires_grad)
            vars(shared).update(copy.deepcopy(vars(p)))
            memo[id(p)] = shared
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"the model cannot be copied ({type(error).__name__}: {error}): change what it holds until "
            "copy.deepcopy(model) runs"
        ) from error


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy in which the masked weights are zero; it shares the memory of the other tensors with the model.

    Raises:
        UnknownNameError, MaskError: the masks are for another model.
    """
    masks.writable(model)
    copied = twin(model)
    for t in masks.match(copied).values():
        t.data = t.data.clone()
    masks.apply(copied)
    return copied


def cut(
    model: nn.Module, kept: Kept, shifts: Mapping[str, Sequence[float]] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Cut parameters and buffers in place: they stay the same objects, so ties hold. Returns what `undo` needs.

    Args:
        model: to be cut.
        kept: the positions that stay.
        shifts: what is added to tensors before, number by number.
    """
    named = named_tensors(model)
    done = list({id(named[name]): (named[name], named[name].data) for name in [*(shifts or ()), *kept]}.values())
    try:
        for name, shift in {id(named[name]): (name, shift) for name, shift in (shifts or {}).items()}.values():
            named[name].data = shifted(named[name].data, shift)
        for name, dims in {id(named[name]): (name, dims) for name, dims in kept.items()}.values():
            named[name].data = sliced(named[name].data, dims)
    except BaseException:
        undo(done)
        raise
    return done


def shifted(tensor: Tensor, shift: Sequence[float]) -> Tensor:
    """A tensor to which something is added, number by number."""
    more = torch.tensor(shift, dtype=torch.float64, device=tensor.device)
    return (tensor.double() + more).to(tensor.dtype)


def undo(done: list[tuple[Tensor, Tensor]]) -> None:
    """Give the tensors their old contents back."""
    for t, data in reversed(done):
        t.data = data


def own_memory(model: nn.Module, small: nn.Module, kept: Kept, renaming: Renaming = _SAME) -> None:
    """Give the small model memory of its own, and the gradients of the model, cut."""
    old = named_tensors(model)
    for name, t in small.named_parameters():
        source = old[renaming.before(name)]
        if t.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            t.data = t.data.clone()
        if source.grad is not None:
            t.grad = sliced(source.grad, kept.get(name, {})).clone()


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer trains this model, and that no pruner follows it any more.

    Raises:
        InputTypeError: it is no optimizer. InputError: it holds a parameter that is none of the model's, or keeps some
            beside its groups too.
        StateError: a Pruner is attached to it.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise checks.wrong("optimizer", optimizer, "the torch.optim.Optimizer that trains this model")
    if optimizers.owners(optimizer):
        raise StateError("a Pruner follows the optimizer, whose weights get other shapes: call its finish() first")
    own = {id(p) for p in model.parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in own:
                raise InputError(
                    f"group {i} of the optimizer holds a parameter {tuple(p.shape)} that is none of the model's: "
                    "give the optimizer that trains this model"
                )
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state"):
            held = [*value, *value.values()] if isinstance(value, dict) else tree_leaves(value)
            if not own.isdisjoint(map(id, held)):
                raise InputError(
                    f"{type(optimizer).__name__} keeps parameters in {name} too, and would train the old ones: shrink "
                    "without optimizer=, and make a new one for the small model"
                )


def follow(
    model: nn.Module, small: nn.Module, kept: Kept, optimizer: torch.optim.Optimizer, renaming: Renaming = _SAME
) -> None:
    """Let an optimizer of the model train the small one: its parameters, and what it remembers of them, cut.

    Parameters of blocks that went leave their groups; a group that is empty then stays, because schedulers count them.

    Raises:
        InputError: it remembers something of a parameter that is cut which is not one number a weight; the optimizer
            is as it was.
    """
    new: Mapping[str, Tensor] = named_tensors(small)
    every = model.named_parameters(remove_duplicate=False)
    names = {id(p): now for name, p in every if (now := renaming(name)) is not None}
    stay = {p: state for p, state in optimizer.state.items() if id(p) in names}
    states = {p: _remembered(names[id(p)], p, kept, state) for p, state in stay.items()}
    groups = [[new[names[id(p)]] for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
    before = [group["params"] for group in optimizer.param_groups], dict(optimizer.state)
    try:
        _give(optimizer, groups, {new[names[id(p)]]: state for p, state in states.items()})
    except BaseException:  # interrupted, it would train parts of two models
        _give(optimizer, *before)
        raise


def _give(optimizer: torch.optim.Optimizer, groups: Sequence[list[Tensor]], state: Mapping[Tensor, Any]) -> None:
    for group, params in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = params
    optimizer.state.clear()
    optimizer.state.update(state)


def _remembered(name: str, p: Tensor, kept: Kept, state: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer remembers of a parameter, cut as it is."""
    if name not in kept:
        return dict(state)
    found: dict[str, Any] = {}
    for key, value in state.items():
        one = isinstance(value, Tensor) and value.numel() == 1 and p.numel() > 1
        if isinstance(value, Tensor) and value.shape == p.shape and not one:
            found[key] = sliced(value, kept[name])
        elif one or value is None or isinstance(value, int | float | str):
            found[key] = value
        else:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"the optimizer remembers {key} of {name} as {what}, not as one number a weight {tuple(p.shape)}: "
                "shrink without optimizer=, and make a new one for the small model"
            )
    return found
