"""Fewer blocks: the residual blocks that matter least are taken out of their lists, and the model is proven.

A block's *influence* is how much the outputs change when it alone is passed by. It takes one forward a block, and it
tells what a loss of the block does to the model better than how much the block changes its own input does (Song et al.
2024, "SLEB", section 3.2; Kim et al. 2024, "Shortened LLaMA", section 3.2; both with perplexity, which needs labels).
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import StructureError, listed
from secateur.structure.attributes import Edit, Edits
from secateur.structure.blocks import Block, Renaming, children, lists, moved_up, take_out
from secateur.structure.calm import calm
from secateur.structure.configs import Configs
from secateur.structure.constants import constant, varied
from secateur.structure.cut import named_tensors, twin, undo
from secateur.structure.plan import Attribute
from secateur.structure.policy import relied_on
from secateur.structure.proof import fresh
from secateur.structure.reads import Named, strays
from secateur.structure.residuals import Candidate, candidates, innermost, nested, passed_by
from secateur.support.inputs import Arguments

_log = logging.getLogger(__name__)
_PLACE = re.compile("idx|index|layer|block|number|_id$")
_COUNT = re.compile("layer|block|depth|^n$", re.IGNORECASE)


class Shorter(NamedTuple):
    """A model with fewer blocks, which shares the memory of the given one, and what was done to it."""

    model: nn.Module
    blocks: tuple[Block, ...] = ()
    attributes: tuple[Attribute, ...] = ()


def shorten(
    model: nn.Module, examples: Sequence[Arguments], depth: float, keep: Mapping[str, str], verify: bool
) -> Shorter:
    """Take the blocks with the least influence out of a model, so that a fraction of all blocks remains.

    Args:
        model: stays as it is.
        examples: of its arguments.
        depth: fraction of the blocks that remains.
        keep: tensors whose blocks stay, and why.
        verify: prove it on fresh inputs too.

    Raises:
        StructureError: no block is to go, or fewer can go than are to; says why.
    """
    lists = candidates(model, examples)
    for one in (one for modules in lists.values() for one in modules):
        held = next((why for name, why in keep.items() if name.startswith(f"{one.name}.")), "")
        one.why = held or one.why
    influence: dict[str, float] = {}
    while True:
        found = innermost(lists)
        kin = _kin(model, found)
        wanted = len(kin) - math.floor(depth * len(kin) + 0.5)
        _check(depth, len(kin), wanted)
        _add_influences(model, examples, found, influence)
        goes = _least(found, kin, influence, wanted)
        spent = [path for path, modules in found.items() if all(one.why for one in modules) and nested(path, lists)]
        if len(goes) == wanted:
            done, why = _without(model, examples, found, goes, influence, verify)
            if done is not None:
                return done
            for one in goes:
                alone = _without(model, examples, found, [one], influence, verify=False)[1]
                one.why = alone and f"without it, {alone}"
            if not any(one.why for one in goes):
                raise StructureError(
                    f"without {listed([one.name for one in goes], 12)} the model is another one than with these passed "
                    f"by: {why}. Give keep= for some of them, or another depth"
                )
        elif spent:
            lists = {path: modules for path, modules in lists.items() if path not in spent}  # those around may go
        else:
            raise StructureError(_too_few(depth, kin, wanted, len(goes), found))


def _check(depth: float, blocks: int, wanted: int) -> None:
    """See that there are blocks, and that some are to go."""
    if not blocks:
        raise StructureError(
            f"depth={depth:g} finds nothing to take out: no list of the model (nn.ModuleList, nn.Sequential) has two "
            "blocks of one class that add to what they take. Give a sparsity, which makes layers narrower"
        )
    if not wanted:
        raise StructureError(
            f"depth={depth:g} leaves all {blocks} blocks: it is the fraction that remains, so give "
            f"{(blocks - 1) / blocks:.2g} or less"
        )


def shorten_by(model: nn.Module, examples: Sequence[Arguments], blocks: Sequence[Block], verify: bool) -> Shorter:
    """Take the blocks out of a model that went from another copy, and prove it as `shorten` does.

    Raises:
        MaskError: it is another model. StructureError: they cannot go here; says why.
    """
    take_out(twin(model), blocks)  # raises where a list is another one
    goes = {block.name for block in blocks if not block.becomes}
    lists = candidates(model, examples)
    found = {path: modules for path, modules in lists.items() if any(one.name in goes for one in modules)}
    names = {one.name: one for modules in found.values() for one in modules}
    held = next((f"{name}: {names[name].why}" for name in sorted(goes & {*names}) if names[name].why), "")
    influence = {block.name: block.influence for block in blocks if block.influence is not None}
    ones = [one for name, one in names.items() if name in goes]
    done, why = (None, held) if held or not ones else _without(model, examples, found, ones, influence, verify)
    if done is None:
        raise StructureError(
            f"the plan takes {listed(sorted(goes))} out, which cannot go here: "
            f"{why or 'they do not add to what they take'}. Make a plan of this model, with these inputs"
        )
    return done


def _kin(model: nn.Module, found: Mapping[str, Sequence[Candidate]]) -> set[str]:
    """The blocks that count: residual ones, and others of their class in the same list."""
    kin = set()
    for modules in found.values():
        kinds = {one.name: type(model.get_submodule(one.name)) for one in modules}
        count = Counter(kinds.values())
        residual = {kinds[one.name] for one in modules if one.forms}
        kin |= {name for name, kind in kinds.items() if kind in residual and count[kind] > 1}
    return kin


def _add_influences(
    model: nn.Module,
    examples: Sequence[Arguments],
    found: Mapping[str, Sequence[Candidate]],
    influence: dict[str, float],
) -> None:
    """Find how much the outputs change without each block that may go, as a fraction of their length."""
    new = [one for modules in found.values() for one in modules if not one.why and one.name not in influence]
    if not new:
        return
    model = twin(model)
    whole = [_outputs(model, arguments) for arguments in examples]
    for one in new:
        try:
            with passed_by(model, [one]):
                changes = [
                    float((a - b).norm() / a.norm().clamp_min(1e-12))
                    for arguments, outs in zip(examples, whole, strict=True)
                    for a, b in zip(outs, _outputs(model, arguments), strict=True)
                ]
        except Exception as error:
            one.why = f"the model does not run when it is passed by ({type(error).__name__}: {error})"
            continue
        change = sum(changes) / max(1, len(changes))
        influence[one.name] = change if math.isfinite(change) else math.inf


def _outputs(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    args, kwargs = arguments
    with calm(model, False):
        outs = relied_on(model(*args, **kwargs))
    return [t.detach().double() for t in outs if t.is_floating_point()]


def _least(
    found: Mapping[str, Sequence[Candidate]], kin: Collection[str], influence: Mapping[str, float], wanted: int
) -> list[Candidate]:
    """The blocks with the least influence of all lists; in each list one block stays."""
    place = {one.name: path for path, modules in found.items() for one in modules}
    left = {path: sum(one.name in kin for one in modules) for path, modules in found.items()}
    free = [one for modules in found.values() for one in modules if not one.why]
    goes: list[Candidate] = []
    for one in sorted(free, key=lambda one: influence[one.name]):
        if len(goes) < wanted and left[place[one.name]] > 1:
            goes.append(one)
            left[place[one.name]] -= 1
    return goes


def _too_few(
    depth: float, kin: Collection[str], wanted: int, can: int, found: Mapping[str, Sequence[Candidate]]
) -> str:
    reasons: dict[str, list[str]] = {}
    for one in (one for modules in found.values() for one in modules):
        if one.name in kin and one.why:
            reasons.setdefault(one.why, []).append(one.name)
    told = "; ".join(f"{listed(names)}: {why}" for why, names in [*reasons.items()][:4])
    remedy = f"Ask for a depth of {1 - can / len(kin):.2g} or more" if can else "Give a sparsity, for narrower layers"
    return (
        f"depth={depth:g} leaves {len(kin) - wanted} of {len(kin)} blocks, and only {can} can go: "
        f"{told or 'one of each list stays'}. {remedy}"
    )


def _without(
    model: nn.Module,
    examples: Sequence[Arguments],
    found: Mapping[str, Sequence[Candidate]],
    goes: Sequence[Candidate],
    influence: Mapping[str, float],
    verify: bool,
) -> tuple[Shorter | None, str]:
    """Take some blocks out, and prove that the model computes what the given one does with these passed by.

    Returns the shorter model, or None and what is wrong with it.
    """
    blocks = list(_blocks(model, found, {one.name for one in goes}, influence))
    small, passing = twin(model), twin(model)
    take_out(small, blocks)
    edits = Edits()
    _renumber(model, small, blocks, edits)
    why = Configs(model).shorten(small, blocks, examples, edits)
    if why:
        return None, why
    given, ours = _named(passing, Renaming(blocks)), _named(small, lambda name: name)
    mark = len(edits)
    with passed_by(passing, goes):
        for counts in _counts(small, blocks):
            edits.undo(mark)
            for place, value in counts:
                edits.set(place, value)
            trouble = _proven(given, ours, examples, verify)
            if not trouble:
                return Shorter(small, tuple(blocks), edits.listed()), ""
            why = why or trouble
    return None, why


def _named(model: nn.Module, renaming: Callable[[str], str | None]) -> Named:
    """A model with the names that its tensors have in the shorter one; what goes has none."""
    names: dict[int, str] = {}
    for name, t in named_tensors(model).items():
        now = renaming(name)
        if now is not None:
            names.setdefault(id(t), now)
    return Named(model, names)


def _proven(given: Named, small: Named, examples: Sequence[Arguments], verify: bool) -> str:
    """What differs on the examples; empty if nothing does.

    Also with other values of constant weights, and on fresh inputs, where these run; and in training mode where
    parameters take no part in eval mode.
    """
    for arguments in examples:
        try:
            why = strays(given, small, arguments)
        except Exception as error:
            return f"the forward fails ({type(error).__name__}: {error})"
        if verify and not why:
            others = fresh(arguments)
            try:
                why = strays(given, small, others)
            except Exception as error:
                _log.info("no proof on fresh inputs: %s", error)
        if not why:
            try:
                with _unlike(given, small):
                    why = strays(given, small, arguments)
            except Exception as error:
                _log.info("no proof with other weights: %s", error)
        if why:
            return why
    for arguments in examples if given.unread else ():
        try:
            why = strays(given, small, arguments, training=True)
        except Exception as error:
            return f"the forward in training mode fails ({type(error).__name__}: {error})"
        if why:
            return f"in training mode, {why}"
    return ""


@contextlib.contextmanager
def _unlike(*models: Named) -> Iterator[None]:
    """Other numbers in constant parameters, the same in all models."""
    generator = torch.Generator().manual_seed(0)
    new: dict[str, Tensor] = {}
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for one in models:
            for p in one.model.parameters():
                name = one.names.get(id(p))
                if name is None or not p.is_floating_point() or not constant(p):
                    continue
                if name not in new:
                    new[name] = varied(p.detach(), generator)
                done.append((p, p.data))
                p.data = new[name]
        yield
    finally:
        undo(done)


def _blocks(
    model: nn.Module,
    found: Mapping[str, Sequence[Candidate]],
    goes: Collection[str],
    influence: Mapping[str, float],
) -> Iterator[Block]:
    """The modules of each list that loses some, under each of the names that the list has."""
    by_id: dict[int, str] = {id(model.get_submodule(path)): path for path in found}
    for alias, module in model.named_modules(remove_duplicate=False):
        modules = found.get(by_id.get(id(module), ""), ()) if id(module) in by_id else ()
        gone = [one.name in goes for one in modules]
        if not any(gone):
            continue
        names = children(model, alias)
        for one, name, becomes in zip(modules, names, moved_up(names, gone), strict=True):
            held = "" if not becomes else one.why or "others have less influence"
            yield Block(name, becomes, influence.get(one.name), held)


def _renumber(model: nn.Module, small: nn.Module, blocks: Sequence[Block], edits: Edits) -> None:
    """Let attributes that tell a block its place follow: ints that differ from it by the same number in all blocks."""
    for own in lists(blocks).values():
        values: dict[str, list[tuple[int, int]]] = {}
        for place, block in enumerate(own):
            for module in model.get_submodule(block.name).modules():
                for name, value in vars(module).items():
                    if type(value) is int and _PLACE.search(name):
                        values.setdefault(name, []).append((place, value - place))
        told = {name: {offset for _, offset in found} for name, found in values.items() if len(dict(found)) > 1}
        for place, path in enumerate(block.becomes for block in own if block.becomes):
            for inner, module in small.get_submodule(path).named_modules():
                space = vars(module)
                for name in [name for name in space if len(told.get(name, ())) == 1]:
                    edits.set(Edit(f"{path}.{inner}".rstrip("."), (name,), space), place + min(told[name]))


def _counts(small: nn.Module, blocks: Sequence[Block]) -> Iterator[list[tuple[Edit, int]]]:
    """Attributes that may count the modules of a list, with the new numbers: those with such a name; one more; none."""
    named: list[tuple[Edit, int]] = []
    others: list[tuple[Edit, int]] = []
    for container, own in lists(blocks).items():
        owner = container.rpartition(".")[0]
        space = vars(small.get_submodule(owner)) if container else {}
        for name, value in space.items():
            if type(value) is int and value == len(own):
                one = Edit(owner, (name,), space), sum(bool(block.becomes) for block in own)
                (named if _COUNT.search(name) else others).append(one)
    yield named
    for one in others:
        yield [*named, one]
    if named:
        yield []
