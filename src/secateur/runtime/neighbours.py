"""Which layers a forward calls directly one after the other with the same tensor: seen in its syntax tree.

Between two such calls nothing runs but methods of tensors that do not write, and arithmetic of numbers and shapes. So
the layers may be called at once where the first one is: what they are given is the same. A name that is not known to be
that of a tensor is taken for that of numbers: an object that writes to the input when it is added is not seen.
"""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass

from secateur.runtime import sources

__all__: list[str] = []  # reached through secateur.accelerate alone

_METHODS = {
    *("view", "reshape", "transpose", "permute", "contiguous", "unflatten", "flatten", "unsqueeze", "squeeze"),
    *("chunk", "split", "movedim", "swapaxes", "expand", "size", "dim"),
}
"""Of tensors: none of them writes to any."""

_MOST = 16  # layers that one native call computes, as in native/linear.cpp
_SIZES = frozenset({"shape", "dtype", "device", "ndim"})
"""Attributes of tensors, to be looked at."""

_TENSOR, _PLAIN, _UNKNOWN = "tensor", "plain", ""  # the last one is false
"""What a value is: what a layer gave, or a view of it, or the input; a number, or what holds numbers; anything."""


@dataclass(frozen=True)
class Neighbours:
    """Layers that are called directly one after the other with the same tensor.

    Attributes:
        names: of the layers, in the order of their calls.
        offsets: for each, where `f_lasti` of a frame of the forward may be while it is called.
        numbers: attributes that are read in between.
    """

    names: tuple[str, ...]
    offsets: tuple[frozenset[int], ...]
    numbers: frozenset[str]

    def __or__(self, other: Neighbours) -> Neighbours:
        """The same layers in two places."""
        both = zip(self.offsets, other.offsets, strict=True)
        return Neighbours(self.names, tuple(a | b for a, b in both), self.numbers | other.numbers)


@functools.lru_cache(256)
def neighbours(code: types.CodeType, layers: frozenset[str]) -> tuple[Neighbours, ...]:
    """All that there are in a forward, at most 16 together.

    Args:
        code: of the forward.
        layers: names of attributes that may be called so.

    Returns:
        None of the same names twice; none at all without the source, or before Python 3.11.
    """
    tree = sources.tree(code)
    own = code.co_varnames[0] if code.co_argcount else ""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == own] if tree else []
    if tree is None or not all(isinstance(node.ctx, ast.Load) for node in names):
        return ()
    walk = _Walk(own, frozenset(code.co_varnames) - {own}, layers)
    walk.block(tree.body)
    found: dict[tuple[str, ...], Neighbours] = {}
    for calls, numbers in walk.found:
        one = Neighbours(
            tuple(map(_name, calls)), tuple(sources.offsets(code, call) for call in calls), frozenset(numbers)
        )
        if all(one.offsets):
            found[one.names] = found[one.names] | one if one.names in found else one
    return tuple(found.values())


class _Walk:
    """Goes through statements in the order in which Python evaluates them."""

    def __init__(self, own: str, variables: frozenset[str], layers: frozenset[str]) -> None:
        self.found: list[tuple[list[ast.Call], set[str]]] = []
        self._own, self._variables, self._layers = own, variables, layers
        self._calls: list[ast.Call] = []
        self._numbers: set[str] = set()
        self._tensors: set[str] = set()
        """Names of what the layers gave, and of views of it."""

    def block(self, statements: Iterable[ast.stmt]) -> None:
        self._other()
        for statement in statements:
            self._statement(statement)
        self._other()

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._assign(node.targets[0], node.value)
        elif isinstance(node, ast.AnnAssign) and node.simple and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.Expr | ast.Return) and node.value is not None:
            self._value(node.value)
        else:
            self._other()
            if isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try):
                parts = [node, *getattr(node, "handlers", ())]
                for name in ("body", "orelse", "finalbody"):
                    for part in parts:
                        self.block(getattr(part, name, ()))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        targets, values = _elements(target), _elements(value)
        if len(targets) == len(values):
            kinds = [self._value(one) for one in values]
        else:
            kinds = [self._value(value) and _PLAIN] * len(targets)
        for one, kind in zip(targets, kinds, strict=True):
            if not isinstance(one, ast.Name):
                self._other()
                continue
            if one.id == self._given():
                self._end()
            (self._tensors.add if kind == _TENSOR else self._tensors.discard)(one.id)

    def _end(self) -> None:
        """The calls so far are all that belong together."""
        if len(self._calls) > 1:
            self.found.append((self._calls, self._numbers))
        self._calls, self._numbers = [], set()

    def _other(self) -> str:
        """Something is done that may write, or give other names to tensors."""
        self._end()
        self._tensors.clear()
        return _UNKNOWN

    def _given(self) -> str:
        return _argument(self._calls[0]) if self._calls else ""

    def _value(self, node: ast.expr) -> str:
        """Go through an expression; what kind of value it has."""
        if isinstance(node, ast.Constant):
            return _PLAIN
        if isinstance(node, ast.Name):
            return _TENSOR if node.id in self._tensors or node.id == self._given() else _PLAIN
        if isinstance(node, ast.Tuple | ast.List):
            return self._all(node.elts) and _PLAIN
        if isinstance(node, ast.Starred):
            return self._all([node.value]) and _PLAIN
        if isinstance(node, ast.UnaryOp):
            return self._all([node.operand])
        if isinstance(node, ast.BinOp):
            return self._all([node.left, node.right])
        if isinstance(node, ast.Subscript):
            return self._all([node.value, node.slice])
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        return self._call(node) if isinstance(node, ast.Call) else self._other()

    def _all(self, nodes: Iterable[ast.expr]) -> str:
        """The kind of what is made of several values, none of which may be unknown."""
        kinds = [self._value(node) for node in nodes]
        if _UNKNOWN in kinds:
            return self._other()
        return _TENSOR if _TENSOR in kinds else _PLAIN

    def _attribute(self, node: ast.Attribute) -> str:
        if sources.is_name(node.value, self._own):
            self._numbers.add(node.attr)
            return _PLAIN
        return _PLAIN if self._value(node.value) == _TENSOR and node.attr in _SIZES else self._other()

    def _call(self, node: ast.Call) -> str:
        if self._is_layer(node):
            again = any(_name(call) == _name(node) for call in self._calls)
            if again or len(self._calls) == _MOST or self._given() not in ("", _argument(node)):
                self._end()
            self._calls.append(node)
            return _TENSOR
        function = node.func
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        harmless = (
            isinstance(function, ast.Attribute)
            and not sources.is_name(function.value, self._own)
            and self._value(function.value) == _TENSOR
            and function.attr in _METHODS
        )
        if not harmless:
            self._other()
        kind = self._all(given)
        return _TENSOR if harmless and kind else self._other()

    def _is_layer(self, node: ast.Call) -> bool:
        return (
            isinstance(node.func, ast.Attribute)
            and sources.is_name(node.func.value, self._own)
            and node.func.attr in self._layers
            and len(node.args) == 1
            and not node.keywords
            and isinstance(node.args[0], ast.Name)
            and node.args[0].id in self._variables
        )


def _name(call: ast.Call) -> str:
    assert isinstance(call.func, ast.Attribute)
    return call.func.attr


def _argument(call: ast.Call) -> str:
    assert isinstance(call.args[0], ast.Name)
    return call.args[0].id


def _elements(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
