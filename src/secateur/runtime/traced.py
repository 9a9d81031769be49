"""What a module's forward was seen to be, for as long as it is as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from secateur.runtime.attributes import Attributes, inside
from secateur.runtime.packed_layers import disturbed

__all__: list[str] = []  # reached through secateur.accelerate alone

_Words = TypeVar("_Words")
_Found = TypeVar("_Found")


def disturbed_inside(module: nn.Module) -> bool:
    """Whether something is on that a trace does not show; hooks of the module itself run around either forward."""
    return module.training or disturbed(map(vars, inside(module)[1:]))


def is_usual(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is of the kind that traces are for: with one tensor, and not to be compiled."""
    return len(args) == 1 and not kwargs and type(args[0]) is Tensor and not torch.compiler.is_compiling()


class Traced(Generic[_Words, _Found]):
    """What a module's forward was seen to be, and the attributes by which it was; a copy looks anew.

    Args:
        words: what it was seen to be when it was chosen; whatever else it is seen to be later is not run.
    """

    def __init__(self, words: _Words) -> None:
        self.words = words
        self._known: tuple[Attributes, _Found | None] | None = None
        self._seen: Attributes | None = None

    def look(self, module: nn.Module) -> tuple[_Words, _Found] | None:
        """Look at a forward as it is now: in words that are compared, and what is to run. None if it has neither."""
        raise NotImplementedError

    def __reduce__(self) -> Any:
        return type(self), (self.words,)

    def noted(self, found: _Found | None) -> None:
        """Learn that layers got other notes of ours."""

    def forget(self) -> None:
        """Have it looked at anew."""
        self._known = self._seen = None

    def note(self, module: nn.Module, found: _Found) -> None:
        """Take a module for one that was looked at just now."""
        self._known = Attributes(module), found

    def found(self, module: nn.Module) -> _Found | None:
        """What is to run, if the module is as it was when it was looked at; it is looked at where it never was."""
        known = self._known
        if known is not None and known[0].same(module):
            return known[1]
        if known is not None and known[0].same_but_notes(module):
            self.noted(known[1])
            return known[1]
        if not self.words or disturbed_inside(module):
            return None
        try:
            now = Attributes(module)
        except ValueError:
            return None
        if known is not None and (self._seen is None or not self._seen.same(module)):
            self._seen = now  # an attribute that differs at each call is not worth a trace
            return None
        seen = self.look(module)
        self._known = Attributes(module), seen[1] if seen is not None and seen[0] == self.words else None
        return self._known[1]
