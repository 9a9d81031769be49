"""Every error and warning of secateur.

```
SecateurError
|- InputError       (also a ValueError)    a value that cannot be used: NaN, 1.1, an unknown option
|  |- FileError                             a file that is damaged, cut short, of another kind or version
|  '- NotFiniteError                        NaN or inf in numbers that are to be ranked
|- InputTypeError   (also a TypeError)     an argument of the wrong type: the int 1, an int8 tensor
|- UnknownNameError (also a KeyError)      a name or glob that matches nothing; the nearest names are given
|- MaskError        (also a ValueError)    masks of another shape or for another model; zeros that came back
|- PatternError     (also a ValueError)    a tensor to which a pattern of zeros cannot be applied
|- StateError       (also a RuntimeError)  a call that comes too early, too late or twice
|- GroupError       (also a RuntimeError)  processes that work together, of which one was lost or did not come
|- StructureError   (also a RuntimeError)  a model from which no unit can be removed without changing its function
'- WriteError       (also an OSError)      a file that could not be written; the old one is intact
SecateurWarning     (a UserWarning)        something works, but not as one would hope
```

Each message says what is wrong (tensor, value), why, and what to do; each is raised before anything is changed.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence


class SecateurError(Exception):
    """The base of all errors that secateur raises on purpose; control characters in its message are escaped.

    Args:
        in_python: the end of the message, a remedy that is for Python only: the command line leaves it out.
    """

    def __init__(self, *args: object, in_python: str = "") -> None:
        self.in_python = printable(in_python)
        told = [f"{args[0]}{in_python}", *args[1:]] if in_python else args
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in told))


class InputError(SecateurError, ValueError):
    """A value that cannot be used."""


class FileError(InputError):
    """A file that is damaged, cut short, of another kind or of another version."""


class NotFiniteError(InputError):
    """NaN or inf in numbers that are to be ranked."""


class InputTypeError(SecateurError, TypeError):
    """An argument of the wrong type or dtype."""


class UnknownNameError(SecateurError, KeyError):
    """A name or glob that matches nothing."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class MaskError(SecateurError, ValueError):
    """Masks that do not fit, or zeros that came back."""


class PatternError(SecateurError, ValueError):
    """A tensor to which a pattern of zeros cannot be applied."""


class StateError(SecateurError, RuntimeError):
    """A call that comes too early, too late or twice."""


class GroupError(SecateurError, RuntimeError):
    """Processes that work together, of which one was lost or did not come."""


class StructureError(SecateurError, RuntimeError):
    """A model from which no unit can be removed without changing its function."""


class WriteError(SecateurError, OSError):
    """A file that could not be written; an old one under its name is intact."""


class SecateurWarning(UserWarning):
    """Something works, but not as one would hope.

    Args:
        in_python: as of a SecateurError.
    """

    def __init__(self, *args: object, in_python: str = "") -> None:
        self.in_python = in_python
        super().__init__(*([f"{args[0]}{in_python}", *args[1:]] if in_python else args))


_PASSED = ("secateur", "torch", "contextlib")
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {
    chr(mark) for marks in (range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0)) for mark in marks
}
"""Letters and marks that are drawn as nothing: fillers, blanks, variation selectors."""


def printable(text: str) -> str:
    r"""Write a name that came from a file or a model so that nothing in it acts on a terminal or hides.

    Control characters, escapes, line ends, bidi marks, invisible characters and lone surrogates become backslash
    escapes; all other text stays as it is.

    >>> printable("a\x1b[31mb\n\u202ec")
    'a\\x1b[31mb\\n\\u202ec'
    """
    return "".join(c if c.isprintable() and c not in _BLANK else c.encode("unicode_escape").decode() for c in text)


def warn(message: str, in_python: str = "") -> None:
    """Issue a SecateurWarning that points at the first line of the caller's.

    So one outside this package, torch, whose hooks may call it, and contextlib, through which contexts are entered.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(SecateurWarning(message, in_python=in_python), stacklevel=level)


def listed(names: Sequence[str], shown: int = 3) -> str:
    """Word some names in a message: the first of them, with dots where there are more.

    >>> listed(["a", "b", "c"]), listed(["a", "b", "c", "d"])
    ('a, b, c', 'a, b, c, ...')
    """
    return ", ".join([*names[:shown], *(["..."] if len(names) > shown else [])])


def nearest(name: str, valid: Iterable[str], shown: int = 5) -> str:
    """Word the end of an "unknown name" message: the nearest valid names, or the first ones."""
    names = list(valid)
    if not names:
        return "there are none to choose from"
    close = difflib.get_close_matches(name.strip("*"), names, n=shown, cutoff=0.4)
    if close:
        return "the nearest names are: " + ", ".join(close)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return "valid names are: " + ", ".join(names[:shown]) + rest
