"""Calls of functions of torch: their names, their tensors, and what is remembered of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.structure.fields import Labelled
from secateur.support.inputs import Arguments


@functools.lru_cache(4096)
def key(func: Any) -> str:
    """A function's plain name: "add" for add, add_ and Tensor.add; "__add" for +; "get.T" for a property."""
    name = getattr(func, "__name__", "") or str(func)
    if name in ("__get__", "__set__"):
        return f"{name.strip('_')}.{getattr(func.__self__, '__name__', '')}"
    return f"__{name.strip('_')}" if name.startswith("__") else name.strip("_")


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in (tuple, list):  # arguments of calls, mostly: others are many times slower to look through
        return [t for one in tree if one is not None for t in tensors(one)]
    if type(tree) is dict:
        return tensors([*tree.values()])
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] if type(tree) not in _LEAVES else []


def replaced(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nested containers with other tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)([replaced(one, change) for one in tree])
    if type(tree) is dict:
        return {k: replaced(one, change) for k, one in tree.items()}
    if tree is None or type(tree) in _LEAVES:
        return tree
    return tree_map_only(Tensor, change, tree)


_LEAVES = frozenset([int, float, str, bool, slice, torch.dtype, torch.device, type(...)])


def numbers(tree: Any) -> list[float]:
    """The Python numbers among arguments, other than flags and rates of dropout."""
    if isinstance(tree, int | float) and not isinstance(tree, bool):
        return [tree]
    if isinstance(tree, slice):
        return numbers([tree.start, tree.stop, tree.step])
    if isinstance(tree, dict):
        return numbers([one for name, one in tree.items() if "drop" not in str(name)])
    return [n for one in tree for n in numbers(one)] if isinstance(tree, tuple | list) else []


def in_place(func: Any) -> bool:
    """Whether a function writes into its first argument, as its name tells."""
    name = getattr(func, "__name__", "")
    if name.startswith("__i"):
        return name not in _NO_WRITES
    return name.endswith("_") and not name.endswith("__")


_NO_WRITES = frozenset(["__int__", "__index__", "__invert__", "__iter__"])


def results(name: str, args: tuple[Any, ...], out: Any) -> list[Tensor]:
    """The tensors that a call makes or writes into."""
    return [args[0]] if name in ("__setitem", "set.data") else tensors(out)


@dataclass(eq=False)
class Call:
    """What is remembered of one call.

    Attributes:
        name: plain name of the function.
        module: path of the module whose forward made it.
        line: file and line of the code that made it.
        outs, ins: shape and fields of the results and of the operands.
        elastic: made of zeros or the like, or without numbers: any size will do.
        loose: sizes without units may change: they depend on the values of data, or the results are integers.
        used: which results a later call took up.
        products: for each product in it, sizes of all its letters, summed ones too, and fields over them: their number
            is that of its multiply-accumulates.
        numbers: the Python numbers among its arguments.
        sources: of each operand the call that made it, or the name of the parameter or buffer that it is.
        rooted: it divides by the root of the size of a head itself.
    """

    name: str
    module: str
    line: str
    outs: list[Labelled] = field(default_factory=list)
    ins: list[Labelled] = field(default_factory=list)
    elastic: bool = False
    loose: bool = False
    used: set[int] = field(default_factory=set)
    products: list[Labelled] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    sources: list[Call | str | None] = field(default_factory=list, repr=False)
    rooted: bool = False

    def kind(self) -> tuple[Any, ...]:
        """What another forward would make in its place: name, parameters read, sizes of the results, numbers."""
        own = [s for s in self.sources if isinstance(s, str)]
        return self.name, own, [shape for shape, _ in self.outs], [] if "dropout" in self.name else self.numbers

    def __str__(self) -> str:
        return f"{self.name} in {self.module or 'the model'} ({self.line})"


@dataclass(frozen=True)
class Run:
    """One forward: its arguments, whether in training mode, and its calls."""

    arguments: Arguments
    training: bool
    calls: list[Call]
