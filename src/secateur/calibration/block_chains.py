"""Chains of blocks: modules of one kind in a list, of which each reads what the one before it gave."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from secateur.support.inputs import Arguments


class Mark(NamedTuple):
    """What tells one tensor from another without keeping it: its dtype, its shape and its sum, as text."""

    text: str


class ChainBlock(NamedTuple):
    """A block of a chain, and what its call looked like in one forward.

    Attributes:
        name: of the module, in the model.
        module: the module itself.
        spec: the structure of its output.
        leaves: those of its output; in place of a tensor its mark.
        taken: the marks of the tensors among its arguments; None for what an earlier block of the chain gave.
    """

    name: str
    module: nn.Module
    spec: TreeSpec
    leaves: tuple[Any, ...]
    taken: tuple[Mark | None, ...]


Chain = tuple[ChainBlock, ...]
"""Blocks in the order in which they run; each takes the first output of the one before."""


class Course(NamedTuple):
    """What runs when, in one forward of a model.

    Attributes:
        chains: in the order in which they run, no block within another.
        starts: when each of them began.
        times: of each module that ran, by its name, when it began first.
    """

    chains: tuple[Chain, ...]
    starts: tuple[int, ...]
    times: dict[str, int]


def course(model: nn.Module, batch: Arguments) -> Course:
    """Find the chains of blocks of a model, by one forward.

    Candidates are the modules of one class in a list (`nn.ModuleList`, `nn.Sequential`). They are a chain as far as
    each runs once and is given the very tensor that the one before it gave first. Of chains within one another the
    longest counts.

    Args:
        model: in eval mode; is as it was afterwards.
        batch: the arguments of the forward.
    """
    watch = _Watch(model)
    with watch, torch.no_grad():
        model(*batch[0], **batch[1])
    found = [chain for calls in watch.calls.values() for chain in _linked(calls)]
    found.sort(key=len, reverse=True)  # stable: of equally long ones the outermost
    chosen: list[list[_Call]] = []
    for chain in found:
        if not any(_nested(one.name, other.name) for one in chain for held in chosen for other in held):
            chosen.append(chain)
    chosen.sort(key=lambda chain: chain[0].time)
    chains = tuple(tuple(call.block() for call in chain) for chain in chosen)
    return Course(chains, tuple(chain[0].time for chain in chosen), watch.times)


class _Call:
    """One call of a candidate."""

    def __init__(self, name: str, module: nn.Module, time: int, linked: bool, taken: tuple[Mark | None, ...]) -> None:
        self.name, self.module, self.time, self.linked, self.taken = name, module, time, linked, taken
        self.spec: TreeSpec | None = None
        self.leaves: tuple[Any, ...] = ()

    def block(self) -> ChainBlock:
        assert self.spec is not None
        return ChainBlock(self.name, self.module, self.spec, self.leaves, self.taken)


class _Watch:
    """Hooks on all modules of a model, for one forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: dict[tuple[int, type], list[_Call]] = {}  # by list and class
        self.times: dict[str, int] = {}
        # what the candidates of a list gave; the first output of the last one; neither is kept alive
        self._given: dict[tuple[int, type], list[weakref.ref[Tensor]]] = {}
        self._first: dict[tuple[int, type], weakref.ref[Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> None:
        names = {id(module): name for name, module in self.model.named_modules()}
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        held = {id(child): (id(one), type(child)) for one in lists for child in one.children()}
        for module in self.model.modules():
            hooks = [module.register_forward_pre_hook(self._timed(names[id(module)]), prepend=True)]
            if id(module) in held and any(True for _ in module.parameters()):
                before, after = self._candidate(held[id(module)], names[id(module)])
                hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(module.register_forward_hook(after))
            for hook in hooks:
                self._stack.callback(hook.remove)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._given.clear()
        self._first.clear()

    def _timed(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.times.setdefault(name, len(self.times))

        return hook

    def _candidate(self, key: tuple[int, type], name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            taken = tensors((args, kwargs))
            given = {id(ref()) for ref in self._given.get(key, ()) if ref() is not None}
            first = self._first[key]() if key in self._first else None
            marks = tuple(None if id(t) in given else mark(t) for t in taken)
            call = _Call(name, module, self.times[name], any(t is first for t in taken), marks)
            self.calls.setdefault(key, []).append(call)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            call = next(one for one in reversed(self.calls[key]) if one.module is module)
            leaves, call.spec = tree_flatten(output)
            call.leaves = tuple(mark(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            made = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self._given.setdefault(key, []).extend(map(weakref.ref, made))
            if made:
                self._first[key] = weakref.ref(made[0])

        return before, after


def _linked(calls: Sequence[_Call]) -> Iterator[list[_Call]]:
    """The runs of calls, at least two, of which each took what the one before gave; none of a module that ran twice."""
    names = [call.name for call in calls]
    chain: list[_Call] = []
    for call in calls:
        once = names.count(call.name) == 1 and call.spec is not None
        if not (once and call.linked and chain):
            if len(chain) > 1:
                yield chain
            chain = []
        if once:
            chain.append(call)
    if len(chain) > 1:
        yield chain


def _nested(one: str, other: str) -> bool:
    """Whether one of two modules is within the other, or is it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among arguments or outputs, in their order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def mark(tensor: Tensor) -> Mark:
    """Tell a tensor by its dtype, its shape and its sum."""
    total = tensor.sum(dtype=torch.complex128 if tensor.is_complex() else torch.float64)
    return Mark(f"{tensor.dtype} {tuple(tensor.shape)} {total.item()!r}")
