"""A trial: a model is pruned, judged by its user's own metric, and bit for bit as it was afterwards."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from secateur import scope as scopes
from secateur import sharding
from secateur.errors import InputError, InputTypeError, SecateurWarning
from secateur.masks import Masks
from secateur.plan import Plan
from secateur.support import checks

Evaluate = Callable[[Any], Any]
"""A user's metric: from a model to one number, higher is better."""


def tried(model: nn.Module, evaluate: Evaluate, where: str, plan: Plan | None = None) -> float:
    """Return the metric of a model pruned by a plan (None: as it is); the model is as it was afterwards.

    `evaluate` may change the model too: it may train it for a while, or estimate the statistics of its BatchNorm anew.
    torch's random numbers are as they were too, so that all trials of a call see the same ones, as dropout draws them.

    Args:
        model: what `evaluate` is given.
        evaluate: the metric.
        where: which trial it is, for messages: "head.weight at sparsity 0.9".
        plan: of this model.

    Raises:
        InputError, InputTypeError: the metric is not one finite number, or is not the same in all processes over which
            the model is spread; and what the plan raises. What `evaluate` raises passes on with a note that names the
            trial.
    """
    before = Before(scopes.resharded(model))
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices)):
            if plan is not None:
                chosen(plan).apply(plan.scope)
            found = number(evaluate(model), where)
            return sharding.alike(
                scopes.resharded(model),
                lambda: found,
                lambda metric: {"a metric of": metric},
                remedy="Let evaluate return one number for all processes, such as a mean that was all-reduced",
            )
    except Exception as error:  # add_note() needs Python 3.11; the attribute that it fills does not
        error.__dict__["__notes__"] = [*getattr(error, "__notes__", ()), f"secateur was trying {where}"]
        raise
    finally:
        scopes.resharded(model)  # the whole copies that an evaluation may leave are not what is restored
        before.restore()


def chosen(plan: Plan) -> Masks:
    """Choose the weights, without a warning of tensors that lose nearly all: the metric tells what that costs.

    A generator of the score is as it was, so that the next trial draws the same numbers.
    """
    generator = getattr(plan.score, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecateurWarning)
            return plan.masks(plan.counts())
    finally:
        if state is not None:
            plan.score.generator.set_state(state)  # type: ignore[attr-defined]


def number(value: object, where: str) -> float:
    """Read what a metric gave: a number, or a tensor of one.

    Raises:
        InputTypeError: something else. InputError: NaN or inf.
    """
    plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(plain, bool) or not isinstance(plain, Real):
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else checks.told(value)
        raise InputTypeError(f"evaluate gave {what} for {where}: let it return one number, the higher the better")
    if not math.isfinite(plain):
        raise InputError(
            f"evaluate gave {float(plain)} for {where}: let it return a finite number, such as the worst there is"
        )
    return float(plain)


class Before:
    """What a model was: the bits of its tensors and gradients, its modules, their modes, hooks and other attributes.

    Takes as much memory as the model itself. What an attribute holds is looked into where it is a plain list, dict or
    set, and no deeper.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = [(module, type(module), getattr(module, "training", None)) for module in modules]
        self._holders = [(holder, copy.copy(holder)) for module in modules for holder in _holders(module)]
        every = [*chain.from_iterable(_values(before) for _, before in self._holders)]
        every += [*model.parameters(), *model.buffers()]  # a module of torch.jit has them elsewhere
        held = list({id(value): value for value in every if isinstance(value, Tensor)}.values())
        self._gradients = [(t, t.requires_grad, t.grad) for t in held if t.is_leaf]
        held += [grad for _, _, grad in self._gradients if grad is not None]
        held = [t for t in held if t.device.type != "meta"]
        self._plain = [(t, t.data) for t in held if _plain(t)]
        found = [data.untyped_storage() for _, data in self._plain]
        storages = {(storage.data_ptr(), storage.nbytes()): storage for storage in found}  # tied ones once
        self._storages = [(storage, storage.clone()) for storage in storages.values()]  # type: ignore[no-untyped-call]
        self._others = [(t, t.detach().clone()) for t in held if not _plain(t)]

    @torch.no_grad()
    def restore(self) -> None:
        """Let the model be that again."""
        for module, kind, training in self._modules:
            if type(module) is not kind:  # a parametrization was registered
                module.__class__ = kind
            if training is not None:
                module.training = training
        for holder, before in self._holders:
            if isinstance(holder, list):
                holder[:] = before
            elif isinstance(holder, set) or _contents(holder) != _contents(before):
                holder.clear()
                holder.update(before)
        for tensor, data in self._plain:
            same = tensor.dtype == data.dtype and tensor.device == data.device
            if not (same and tensor.is_set_to(data)):
                tensor.data = data
        for storage, saved in self._storages:
            storage.copy_(saved, non_blocking=False)
        for tensor, copied in self._others:
            tensor.copy_(copied)
        for tensor, requires_grad, grad in self._gradients:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = grad


def _holders(module: nn.Module) -> list[Any]:
    """The attributes of a module, and those that hold others: parameters, hooks, the flat weights of an LSTM."""
    own = vars(module)
    return [own, *(value for value in own.values() if type(value) in (dict, OrderedDict, list, set))]


def _values(holder: Any) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder


def _contents(holder: dict[Any, Any]) -> list[tuple[Any, int]]:
    return [(key, id(value)) for key, value in holder.items()]


def _plain(tensor: Tensor) -> bool:
    """Whether all of a tensor lies in one storage: not if it is sparse, or of a library's own kind."""
    return tensor.layout is torch.strided and type(tensor.data) is Tensor
