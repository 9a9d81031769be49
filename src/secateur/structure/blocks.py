"""Modules of lists of modules, as plain data: which of them go, and what the others are called then.

A list is an `nn.ModuleList` or an `nn.Sequential`. Where one of its modules goes, the others move up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from secateur.errors import MaskError

LISTS = (nn.ModuleList, nn.Sequential)
_COPY = "apply it to a copy of the model it was made for, with all blocks"


@dataclass(frozen=True)
class Block:
    """A module of a list from which some go.

    Attributes:
        name: path of the module: "layers.3".
        becomes: its path afterwards; empty if it goes.
        influence: how much the outputs change without it, as a fraction of their length; None if it cannot go.
        held: why it stays; empty if it goes.
    """

    name: str
    becomes: str
    influence: float | None = None
    held: str = ""


class Renaming:
    """New names for what lies in modules that move up; None for what goes."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._new = {block.name: block.becomes for block in blocks}
        self._old = {block.becomes: block.name for block in blocks if block.becomes}

    def __call__(self, name: str) -> str | None:
        """The name that a tensor or module has afterwards."""
        return _replaced(name, self._new) or None

    def before(self, name: str) -> str:
        """The name that a tensor or module of the shorter model had."""
        return _replaced(name, self._old)


def _replaced(name: str, names: dict[str, str]) -> str:
    path = ""
    for part in name.split(".") if names else ():
        path = f"{path}.{part}" if path else part
        if path in names:
            new = names[path]
            return new + name[len(path) :] if new else ""
    return name


def children(model: nn.Module, container: str) -> list[str]:
    """The paths of the modules of a list."""
    return [f"{container}.{name}".lstrip(".") for name in model.get_submodule(container)._modules]


def moved_up(paths: Sequence[str], goes: Sequence[bool]) -> list[str]:
    """New paths for the modules of one list, empty for those that go: the rest takes the first names of each series.

    >>> moved_up(["stem", "block1", "block2", "block3"], [False, True, False, False])
    ['stem', '', 'block1', 'block2']
    """
    series: dict[str, list[str]] = {}
    stems = [re.sub(r"\d+$", "", path) for path in paths]
    for stem, path in zip(stems, paths, strict=True):
        series.setdefault(stem if stem != path else path, []).append(path)
    free = {stem: iter(names) for stem, names in series.items()}
    return ["" if gone else next(free[stem]) for stem, gone in zip(stems, goes, strict=True)]


def lists(blocks: Iterable[Block]) -> dict[str, list[Block]]:
    """The blocks of each list, by its path."""
    found: dict[str, list[Block]] = {}
    for block in blocks:
        found.setdefault(block.name.rpartition(".")[0], []).append(block)
    return found


def check_names(names: Iterable[str], blocks: Sequence[Block]) -> None:
    """See that the tensors of a state_dict lie in the modules that are named.

    Raises:
        MaskError: a module that goes has none, or there is one more.
    """
    starts = {f"{path}." if path else "" for path in lists(blocks)}
    known = {f"{block.name}." for block in blocks}
    missing = {f"{block.name}." for block in blocks if not block.becomes}
    for name in names:
        for start in starts:
            if name.startswith(start):
                own = start + name[len(start) :].partition(".")[0] + "."
                missing.discard(own)
                if own not in known:
                    raise MaskError(f"there is a {own[:-1]}, of which the plan does not know: {_COPY}")
    if missing:
        raise MaskError(f"there is no {min(missing)[:-1]}: {_COPY}")


Had = tuple[nn.Module, dict[str, nn.Module | None]]
"""A list, with the modules that it had."""


def take_out(model: nn.Module, blocks: Sequence[Block]) -> list[Had]:
    """Take modules out of their lists, in place; the others move up. Returns what `put_back` needs.

    Raises:
        MaskError: a list has other modules than those that are named. Nothing is changed.
    """
    new: dict[int, Had] = {}
    for container, own in lists(blocks).items():
        module = _found(model, container)
        names = [_last(block.name) for block in own]
        if list(module._modules) != names:
            raise MaskError(
                f"{container or 'the model'} has {len(module._modules)} modules, and the plan is for a list of "
                f"{len(names)}: {_COPY}"
            )
        pairs = zip(own, module._modules.values(), strict=True)
        new[id(module)] = module, {_last(block.becomes): inner for block, inner in pairs if block.becomes}
    taken = [(module, dict(module._modules)) for module, _ in new.values()]
    put_back(new.values())
    return taken


def put_back(taken: Iterable[Had]) -> None:
    """Give lists back the modules that they had."""
    for module, modules in taken:
        module._modules.clear()
        module._modules.update(modules)


def _found(model: nn.Module, container: str) -> nn.Module:
    try:
        return model.get_submodule(container)
    except AttributeError:
        return nn.Module()  # a list of no modules


def _last(path: str) -> str:
    return path.rpartition(".")[2]
