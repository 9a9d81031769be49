"""Checks of arguments: an error of one sentence names the argument and says what to give."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from secateur.errors import InputError, InputTypeError


def told(value: object) -> str:
    """Word a value in a message: itself if it is short, else its type.

    >>> told("3"), told([1, 2])
    ("'3'", 'a list')
    """
    short = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
    return repr(value) if short else kind(value)


def kind(value: object) -> str:
    """Word what something is: its type with an article.

    >>> kind([1, 2]), kind(3), kind(None)
    ('a list', 'an int', 'None')
    """
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def wrong(name: str, value: object, remedy: str) -> InputTypeError:
    """Word the error for an argument of the wrong type."""
    return InputTypeError(f"{name} is {told(value)}: give {remedy}")


def whole(name: str, value: object, least: int | None = None, what: str = "") -> None:
    """See that an argument is an int, no bool, and of `least` or more if that is given.

    Raises:
        InputTypeError, InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, value, what or "a whole number")
    if least is not None and value < least:
        raise InputError(f"{name} is {value}: give {what}{', ' if what else ''}{least} or more")


def number(name: str, value: object, what: str) -> None:
    """See that an argument is an int or a float, no bool; NaN and inf are left to its limits.

    Raises:
        InputTypeError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(name, value, what)


def flag(name: str, value: object) -> None:
    """See that an argument is True or False.

    Raises:
        InputTypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")


def function(name: str, value: object, what: str) -> None:
    """See that an argument can be called.

    Raises:
        InputTypeError: it cannot.
    """
    if not callable(value):
        raise wrong(name, value, what)


def several(name: str, value: object, what: str) -> None:
    """See that an argument is iterable, but no text and no dict.

    Raises:
        InputTypeError: it is something else.
    """
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, type)):
        raise wrong(name, value, what)


def path(name: str, value: object) -> Path:
    """Read an argument as a path.

    Raises:
        InputTypeError: it is none.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise wrong(name, value, "a path, as a str or a pathlib.Path")
    return Path(value)


def threads(value: object) -> None:
    """See that a number of CPU threads is one, or None for as many as torch has.

    Raises:
        InputTypeError, InputError: it is not.
    """
    if value is not None:
        whole("threads", value, 1, "a number of CPU threads, or leave it out for torch's own")
