"""The syntax tree of a function, where its source is certain to be what runs."""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

__all__: list[str] = []  # reached through secateur.accelerate alone

_SAME = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_firstlineno", "co_flags"),
    *("co_name", "co_argcount", "co_kwonlyargcount", "co_posonlyargcount"),
)


@functools.lru_cache(256)
def tree(code: types.CodeType) -> ast.FunctionDef | None:
    """The syntax tree of a function by its code, without its decorators.

    Its file is compiled again. What that gives must be the same in all that it does and in where that stands, as files
    change, and a function may be of other source than it says.

    Returns:
        None if there is no source, or it is that of something else.
    """
    try:
        lines, _ = inspect.findsource(code)
        nodes, compiled = _compiled("".join(lines))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    same = [one for one in _codes(compiled) if _is_same(one, code)]
    found = [node for node in ast.walk(nodes) if isinstance(node, ast.FunctionDef) and _stands(node, code)]
    return found[0] if len(same) == len(found) == 1 else None


def is_name(node: ast.AST, name: str) -> bool:
    """Whether a node is a variable of this name."""
    return isinstance(node, ast.Name) and node.id == name


def _positions(code: types.CodeType) -> list[Any]:
    found = getattr(code, "co_positions", None)  # from Python 3.11 on
    return [] if found is None else [*found()]


@functools.lru_cache(4)  # as the layers of a model are of few files
def _compiled(text: str) -> tuple[ast.Module, types.CodeType]:
    nodes = ast.parse(text)
    return nodes, compile(nodes, "<source>", "exec", dont_inherit=True)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield one
            yield from _codes(one)


def _is_same(one: types.CodeType, other: types.CodeType) -> bool:
    return (
        all(getattr(one, name) == getattr(other, name) for name in _SAME)
        and _positions(one) == _positions(other)
        and len(one.co_consts) == len(other.co_consts)
        and all(map(_is_same_constant, one.co_consts, other.co_consts))
    )


def _is_same_constant(one: Any, other: Any) -> bool:
    if isinstance(one, types.CodeType) and isinstance(other, types.CodeType):
        return _is_same(one, other)
    return type(one) is type(other) and repr(one) == repr(other)  # -0.0 is not 0.0


def _stands(node: ast.FunctionDef, code: types.CodeType) -> bool:
    lines = node.lineno, *(one.lineno for one in node.decorator_list)
    return node.name == code.co_name and min(lines) == code.co_firstlineno


def offsets(code: types.CodeType, node: ast.expr) -> frozenset[int]:
    """Where `f_lasti` of a frame of this code may be while an expression is called; empty where Python cannot tell."""
    place = node.lineno, node.end_lineno, node.col_offset, node.end_col_offset
    return frozenset(2 * i for i, one in enumerate(_positions(code)) if one == place)
