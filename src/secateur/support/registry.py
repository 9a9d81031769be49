"""What can be chosen by name: registered where it is written, listed from here in errors, in help and in the docs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from secateur.errors import InputError
from secateur.support import checks

T = TypeVar("T")
Made = TypeVar("Made", bound=Callable[..., object])


@dataclass(frozen=True)
class Choice(Generic[T]):
    """One thing that can be chosen.

    Attributes:
        name: what to write to choose it.
        value: the thing itself.
        meaning: what it is, in a line.
        source: where it comes from: paper and equation.
        call: how to make it, where a name alone does not say enough; empty if it does.
    """

    name: str
    value: T
    meaning: str
    source: str = ""
    call: str = ""


class Registry(Mapping[str, Choice[T]], Generic[T]):
    """The choices of one kind, in the order of their registration; prints as a table.

    Args:
        kind: what they are, for messages: "score".
        otherwise: what a user may give instead of a name, for messages.
    """

    def __init__(self, kind: str, otherwise: str) -> None:
        self.kind = kind
        self.otherwise = otherwise
        self._choices: dict[str, Choice[T]] = {}

    def __getitem__(self, name: str) -> Choice[T]:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def add(self, name: str, value: T, *, meaning: str = "", source: str = "", call: str = "") -> T:
        """Register something under a name, and give it back; its meaning is the first line of its docstring.

        Raises:
            InputTypeError: no name. InputError: the name is taken by something else.
        """
        if not isinstance(name, str) or not name:
            raise checks.wrong(f"the name of a {self.kind}", name, "some letters")
        old = self._choices.get(name)
        if old is not None and _place(old.value) != _place(value):
            raise InputError(f"a {self.kind} named {name!r} exists already: register yours under another name")
        first_line = (inspect.getdoc(value) or "").partition("\n")[0]
        self._choices[name] = Choice(name, value, meaning or first_line.rstrip("."), source, call)
        return value

    def find(self, name: str) -> T:
        """Return what a name stands for.

        Raises:
            InputError: no such name, or one that says too little; the message lists the choices.
        """
        choice = self._choices.get(name)
        if choice is None:
            raise self.unknown(name)
        if choice.call:
            raise InputError(f"{self.kind} {name!r} needs more than its name: write {self.kind}={choice.call}")
        return choice.value

    def unknown(
        self, name: str, where: str = "", among: Callable[[T], bool] = lambda value: True, more: Sequence[str] = ()
    ) -> InputError:
        """Word the error for a name that is not there: the choices, those for which `among` holds, and some more."""
        otherwise = f", or {self.otherwise}" if self.otherwise and not where else ""
        listed = ", ".join([*self.written(among), *more])
        return InputError(f"no {self.kind} named {name!r}{where}: choose {listed}", in_python=otherwise)

    def written(self, among: Callable[[T], bool] = lambda value: True) -> list[str]:
        """What to write for each choice."""
        return [choice.call or choice.name for choice in self._choices.values() if among(choice.value)]

    def markdown(self) -> str:
        """The table of the docs."""
        lines = [f"| {self.kind} | what it is | source |", "|---|---|---|"]
        for choice in self._choices.values():
            made = f" (`{choice.call}`)" if choice.call else ""
            lines.append(f"| `{choice.name}`{made} | {choice.meaning} | {choice.source} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.markdown()

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self._choices)})"


def called(made: Made, written: Callable[..., object]) -> Made:
    """Give what a decorator makes the name, the place and the docstring of what was written; its signature stays."""
    for attribute in ("__doc__", "__module__", "__name__", "__qualname__"):
        setattr(made, attribute, getattr(written, attribute))
    return made


def _place(value: object) -> object:
    """Where something was written: a cell of a notebook that runs again registers the same thing again."""
    name = getattr(value, "__qualname__", None)
    return value if name is None else (getattr(value, "__module__", None), name)
