"""Attributes that repeat the size of a tensor, made to follow: those of torch's modules, and whatever a forward reads.

The size of every result of every call is known from the labels. So the cut model is run until a call has another size;
then attributes with the old value are tried, and the one that gets further is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from secateur import anatomy
from secateur.structure.calls import Run
from secateur.structure.plan import Attribute
from secateur.structure.remains import Sizes
from secateur.structure.traces import Otherwise, Trace


class Edit(NamedTuple):
    """A place where an attribute stands."""

    module: str
    keys: tuple[str | int, ...]
    space: Any  # the dict or list that has it, under the last key


class Edits:
    """Changed attributes, which can be taken back."""

    def __init__(self) -> None:
        self._done: list[tuple[Edit, Any]] = []

    def __len__(self) -> int:
        return len(self._done)

    def set(self, place: Edit, value: Any) -> None:
        """Change an attribute."""
        old = place.space[place.keys[-1]]
        if type(old) is not type(value) or old != value:
            self._done.append((place, old))
            place.space[place.keys[-1]] = value

    def before(self, place: Edit) -> list[Any]:
        """The value that a changed attribute had first."""
        return [old for one, old in self._done if one.space is place.space and one.keys == place.keys][:1]

    def since(self, mark: int) -> list[tuple[Edit, Any]]:
        """The changes made since there were `mark` of them, with the present values."""
        return [(place, place.space[place.keys[-1]]) for place, _ in self._done[mark:]]

    def undo(self, mark: int = 0) -> None:
        """Take all changes back but the first `mark`."""
        while len(self._done) > mark:
            place, old = self._done.pop()
            place.space[place.keys[-1]] = old

    def listed(self) -> tuple[Attribute, ...]:
        """The changes as plain data, the last for each place."""
        last = {(e.module, e.keys): e.space[e.keys[-1]] for e, _ in self._done}
        return tuple(Attribute(module, keys, value) for (module, keys), value in last.items())


def replay(model: nn.Module, run: Run, sizes: Sizes) -> tuple[Trace, str]:
    """How a model makes the calls of a run, and what happens otherwise; empty if all go as expected."""
    trace = Trace(run, sizes)
    try:
        return trace.of(model, run.arguments), ""
    except Exception as error:
        text = str(error) if isinstance(error, Otherwise) else f"{type(error).__name__}: {error}"
        return trace, text[:200]


def follow_modules(model: nn.Module, edits: Edits, whole_heads: bool) -> None:
    """Let the attributes of torch's own modules follow their tensors."""
    for path, module in model.named_modules():
        for name, value in anatomy.sizes(module, whole_heads).items():
            edits.set(Edit(path, (name,), vars(module)), value)


def follow_forward(model: nn.Module, run: Run, sizes: Sizes, edits: Edits) -> tuple[Trace, str]:
    """Change attributes until the forward has the expected sizes.

    Returns how it goes then, and what is wrong with the next call where no attribute explains it; empty if all is well.
    """
    trace, error = replay(model, run, sizes)
    while error:
        at = trace.at
        if at >= len(run.calls):
            return trace, error
        found, known = None, set[tuple[int, int]]()
        for pairs in _changes(model, run, sizes, at):
            known |= pairs
            found = found or _one(model, run, sizes, edits, at, pairs) or _several(model, run, sizes, edits, at, known)
        if found is None:
            why = "no attribute of a module holds that size, so it may be a number in the code"
            return trace, f"{run.calls[at]} fails with fewer units ({error}), and {why}"
        trace, error = found
    return trace, ""


def _changes(model: nn.Module, run: Run, sizes: Sizes, at: int) -> Iterator[set[tuple[int, int]]]:
    """Old and new sizes near a call; then those of all calls in the module above."""
    call = run.calls[at]

    def changed(which: Sequence[int]) -> set[tuple[int, int]]:
        found = set()
        for k in which:
            for (old, _), new in zip(run.calls[k].outs, sizes[k] or (), strict=False):
                found |= {(a, b) for a, b in zip(old, new, strict=True) if a != b != -1}
        return found

    def inside(path: str) -> list[int]:
        return [k for k, c in enumerate(run.calls) if c.module.startswith(path)]

    pairs = changed([k for k in (at, at - 1) if k >= 0]) or changed(inside(call.module))
    groups = getattr(model.get_submodule(call.module), "groups", 1)
    if call.name.startswith("conv") and isinstance(groups, int) and groups > 1:
        pairs |= {(groups, groups * new // old) for old, new in pairs}  # whole groups went
    yield pairs
    yield changed(inside(call.module.rpartition(".")[0])) - pairs


def _one(
    model: nn.Module, run: Run, sizes: Sizes, edits: Edits, at: int, pairs: set[tuple[int, int]]
) -> tuple[Trace, str] | None:
    """Change one attribute, in all modules of its class or in one alone: that which gets furthest."""
    for holder in _holders(model, run.calls[at].module):
        best: tuple[Trace, str, list[tuple[Edit, Any]]] | None = None
        space = holder.space
        for name, value in list(space.items() if isinstance(space, dict) else enumerate(space)):
            place = holder._replace(keys=(*holder.keys, name))
            first = edits.before(place)  # what all of a class got may be wrong for one
            for to in [*(new for old in (value, *first) for new in _becomes(old, pairs)), *first]:
                for places in (_alike(model, place, value), [place]):
                    mark = len(edits)
                    for one in places:
                        edits.set(one, to)
                    got, why = replay(model, run, sizes)
                    if got.at > at and (best is None or got.at > best[0].at):
                        best = got, why, edits.since(mark)
                    edits.undo(mark)
                    if (best is not None and best[0].at == got.at) or len(places) == 1:
                        break
        if best is not None:
            for place, value in best[2]:
                edits.set(place, value)
            return best[:2]
    return None


def _several(
    model: nn.Module, run: Run, sizes: Sizes, edits: Edits, at: int, pairs: set[tuple[int, int]], most: int = 200
) -> tuple[Trace, str] | None:
    """Change several attributes of one module at once: for each old size one of those that hold it, or all."""
    for path in (run.calls[at].module, *_above(run.calls[at].module)):
        space = vars(model.get_submodule(path))
        options: list[list[tuple[tuple[Edit, int], ...]]] = []
        for old, new in dict(pairs).items():
            places = [(Edit(path, (n,), space), new) for n, v in space.items() if type(v) is int and v == old]
            if places:
                options.append([(), *((one,) for one in places), *([tuple(places)] if len(places) > 1 else [])])
        for choice in itertools.islice(itertools.product(*options), most):
            if sum(map(len, choice)) > 1:
                mark = len(edits)
                for place, value in itertools.chain(*choice):
                    edits.set(place, value)
                got, why = replay(model, run, sizes)
                if got.at > at:
                    return got, why
                edits.undo(mark)
    return None


def _above(path: str) -> list[str]:
    """The modules that a module is in, from near to far."""
    return [path.rsplit(".", k)[0] if path.count(".") >= k else "" for k in range(1, path.count(".") + 1 + bool(path))]


def _alike(model: nn.Module, place: Edit, value: Any) -> list[Edit]:
    """The same attribute with the same value in all modules of its module's class."""
    if len(place.keys) > 1:
        return [place]
    kind, name = type(model.get_submodule(place.module)), place.keys[0]
    every = ((path, vars(m)) for path, m in model.named_modules() if type(m) is kind)
    return [Edit(path, place.keys, space) for path, space in every if name in space and _equal(space[name], value)]


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _holders(model: nn.Module, path: str) -> Iterator[Edit]:
    """What may hold a size: the module, its children, its ancestors, and what they own that is no module."""
    seen: set[int] = set()
    below = [f"{path}.{name}".lstrip(".") for name, _ in model.get_submodule(path).named_children()]
    for module in dict.fromkeys([path, *below, *_above(path)]):
        stack = [Edit(module, (), vars(model.get_submodule(module)))]
        while stack:
            holder = stack.pop(0)
            if id(holder.space) in seen:
                continue
            seen.add(id(holder.space))
            yield holder
            space = holder.space
            for k, v in list(space.items() if isinstance(space, dict) else enumerate(space)):
                if k in ("_parameters", "_buffers", "_modules") or isinstance(v, nn.Module | Tensor | type):
                    continue
                inner = v if isinstance(v, list | dict) else None if callable(v) else getattr(v, "__dict__", None)
                if inner is not None:
                    stack.append(Edit(module, (*holder.keys, k), inner))


def _becomes(value: Any, pairs: set[tuple[int, int]]) -> list[Any]:
    """What an attribute may become: an int, or one of the ints of a tuple or list, or all, as the sizes changed."""
    if type(value) is int:
        return [new for old, new in pairs if value == old]
    if type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        new = dict(pairs)
        every = [new.get(v, v) for v in value]
        single = [[*value[:i], new[v], *value[i + 1 :]] for i, v in enumerate(value) if v in new]
        return [type(value)(v) for v in (*single, every) if list(v) != list(value)]
    return []
