"""A model in sections that are pruned one after another: its blocks, and what stands before, between and after them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from secateur.calibration.block_chains import Chain, Course, course
from secateur.calibration.block_inputs import record
from secateur.calibration.trees import taken
from secateur.errors import warn
from secateur.scope import Member
from secateur.support.inputs import Arguments, given


@dataclass(frozen=True)
class Section:
    """Tensors that are pruned at one time.

    Attributes:
        name: for people: that of the block, or where it stands.
        members: the tensors, by name, in the order in which their modules run; there may be none in a block.
        chain: the blocks of which it is one; None for what stands outside of them.
        at: which of them.
        until: outside of chains, the module at which a forward has come past all of the tensors; None: the end.
    """

    name: str
    members: Mapping[str, Member]
    chain: Chain | None = None
    at: int = 0
    until: nn.Module | None = None


def divide(model: nn.Module, batch: Arguments, members: Mapping[str, Member]) -> tuple[Section, ...]:
    """Divide a model into sections, in the order in which they run.

    Args:
        model: in eval mode.
        batch: the arguments of the first one, whose forward tells what runs when.
        members: the tensors to be pruned, by name.

    Raises:
        InputError: the model does not take the batch.

    Warns:
        SecateurWarning: no chain of blocks can be run by itself, so that all of the model is one section.
    """
    with taken(given(batch), 1):
        seen = course(model, batch)
    reasons = [_why_not(model, batch, chain) for chain in seen.chains]
    usable = [at for at, why in enumerate(reasons) if not why]
    times = {name: _time(name, seen) for name in members}
    members = {name: members[name] for name in sorted(members, key=times.__getitem__)}
    sections = _sections(seen, usable, members)
    split = _split(sections, members)
    if usable and not split:
        return sections
    reason = f"{split} is tied to a tensor of another one" if split else next(filter(None, reasons), "")
    warn(
        f"no blocks were found that can be pruned one by one{reason and f' ({reason})'}: the whole model is one block, "
        "and the statistics of all its layers are in memory together"
    )
    return (Section("the whole model", members),)


def _why_not(model: nn.Module, batch: Arguments, chain: Chain) -> str:
    """Why blocks cannot run by themselves, if so: what they are called with depends on what they compute."""
    try:
        recorded = record(model, batch, chain)
    except Exception as error:  # whatever a model does with the stand-ins of outputs
        return f"{chain[0].name} cannot be passed by: {error}"
    for at, block in enumerate(chain):
        if recorded.marks(at) != block.taken:
            return f"what {block.name} is called with is computed from what other blocks gave"
    return ""


def _sections(seen: Course, usable: Sequence[int], members: Mapping[str, Member]) -> tuple[Section, ...]:
    """Each block, and around the chains what is left of the tensors; those of modules that never ran stand last."""
    chains = [seen.chains[at] for at in usable]
    starts = [seen.starts[at] for at in usable]
    owners = {name: _owner(name, chains) for name in members}

    def place(name: str) -> int:
        time = _time(name, seen)
        return len(starts) if math.isinf(time) else sum(start < time for start in starts)

    sections = []
    for number, chain in enumerate([*chains, None]):
        outside = {name for name, owner in owners.items() if owner is None and place(name) == number}
        if outside:
            where = f"what stands before {chain[0].name}" if chain else "what stands after the blocks"
            until = chain[0].module if chain else None
            sections.append(Section(where, {n: m for n, m in members.items() if n in outside}, until=until))
        for at, block in enumerate(chain or ()):
            own = {n: m for n, m in members.items() if owners[n] == block.name}
            sections.append(Section(block.name, own, chain, at))
    return tuple(sections)


def _owner(name: str, chains: Sequence[Chain]) -> str | None:
    """The block that a tensor belongs to."""
    return next((b.name for chain in chains for b in chain if name.startswith(f"{b.name}.")), None)


def _time(name: str, seen: Course) -> float:
    """When the module of a tensor ran; inf if it did not, or is the model itself, which may read it at any time."""
    module = name.rpartition(".")[0]
    while module and module not in seen.times:  # an attention reads its out_proj itself
        module = module.rpartition(".")[0]
    return seen.times[module] if module else math.inf


def _split(sections: Sequence[Section], members: Mapping[str, Member]) -> str:
    """The name of a tensor that belongs to several sections, if there is one."""
    where = {name: section.name for section in sections for name in section.members}
    blocks = [section.name for section in sections if section.chain is not None]
    for name, member in members.items():
        for alias in member.aliases:
            block = next((block for block in blocks if alias.startswith(f"{block}.")), None)
            if (block or where[name]) != where[name] or (block is None and where[name] in blocks):
                return name
    return ""
