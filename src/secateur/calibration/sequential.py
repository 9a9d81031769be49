"""Pruning block by block: statistics of one block at a time, each on the outputs of those that are pruned already.

Memory holds the sums of one block and what the batches bring to it; with a folder, not even the latter. So a model is
pruned whose sums would not find room together, as Frantar & Alistarh 2023, "SparseGPT", prune theirs on one GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.calibration.block_inputs import BlockCall, Key, record, run_until
from secateur.calibration.run_folder import Inputs, InputsInMemory, RunFolder, batches_digest, digest
from secateur.calibration.sections import Section, divide
from secateur.calibration.trees import taken
from secateur.errors import InputError
from secateur.masks import Masks
from secateur.scope import Member, Scope, unwrap
from secateur.support import checks
from secateur.support.files import StrPath
from secateur.support.inputs import Arguments, arguments, given
from secateur.support.progress import progress_bar

_RECORDED = "recorded"
_ALIGNMENT = 64
"""Bytes, of the memory that torch gives to tensors."""


@dataclass(frozen=True)
class Forward:
    """One batch of calibration data on its way through a section of the model.

    Attributes:
        batch: the arguments of the model: they tell what is padding.
        run: runs the section.
    """

    batch: Arguments
    run: Callable[[], Any]


Forwards = Callable[[], Iterator[Forward]]
"""Gives the forwards of all batches through a section, as often as it is called."""

Solved = Mapping[str, tuple[Tensor, Tensor]]
"""By name, new weights and which of them stay."""

Solve = Callable[[Mapping[str, Member], Forwards], Iterable[Solved]]
"""Prunes the tensors of a section by what it sees in the forwards, some after others: the forwards that follow run with
what was given before. Members come in the order in which their modules run."""


@contextmanager
def pruned(
    model: nn.Module,
    batches: Sequence[Any],
    solve: Solve,
    *,
    scope: Scope,
    settings: Mapping[str, object],
    folder: StrPath | None = None,
    progress: bool = False,
) -> Iterator[tuple[Masks, dict[str, Tensor]]]:
    """Let a model compute, for a while, as one that is pruned block by block; afterwards it is as it was.

    The new weights lie on disk: in `folder`, or in a temporary one.

    Args:
        model: run in eval mode, without caches.
        batches: what it is called with.
        solve: prunes one section.
        scope: what is pruned.
        settings: what `solve` does, as JSON can hold it: a folder of a run with other settings is refused.
        folder: keeps inputs of the blocks, and what is done: a run that was killed goes on at its last block, with the
            same bits as without interruption.
        progress: draw a bar on stderr.

    Yields:
        The masks, and the new weights by name.

    Raises:
        InputError: no batch, or one that the model does not take; batches that go different ways through the model; a
            folder of another run.
        WriteError: the system refuses to write. And what `solve` raises.
    """
    checks.several("batches", batches, "a list of what the model is called with")
    calls = [arguments(batch) for batch in batches]
    if not calls:
        raise InputError("batches is empty: give some of what the model is called with")
    model = unwrap(model)
    with ExitStack() as stack:
        stack.enter_context(_calm(model))
        sections = divide(model, calls[0], scope.members)
        told: dict[str, object] = {"settings": dict(settings), "blocks": [section.name for section in sections]}
        if folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="secateur-")))
        else:
            place = checks.path("folder", folder)
            state = *model.named_parameters(), *model.named_buffers()
            told |= {"model": digest(state), "batches": batches_digest(calls)}
        run = RunFolder(place, told)
        inputs = InputsInMemory() if folder is None else run.inputs()
        work = _Work(model, calls, sections, run, inputs, stack.enter_context(_Swaps(model)))
        with progress_bar("pruning", len(sections), shown=progress) as advance:
            for at in range(len(sections)):
                work.step(at, solve)
                advance(1)
        yield work.masks(scope), work.swaps.tensors


class _Work:
    """A run, section by section."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Arguments],
        sections: Sequence[Section],
        run: RunFolder,
        inputs: Inputs,
        swaps: _Swaps,
    ) -> None:
        self.model, self.batches, self.sections = model, batches, sections
        self.run, self.inputs, self.swaps = run, inputs, swaps
        self._calls: list[Sequence[BlockCall]] = []  # of the chain under way, for each batch
        self._masks: list[Masks] = []

    def step(self, at: int, solve: Solve) -> None:
        """Prune a section, if that is not done, and let the model compute with what it became."""
        section = self.sections[at]
        if at >= self.run.done:
            if section.chain is not None and (section.at == 0 or not self._calls):
                self._record(section)
            self._solve(at, solve)
            if section.chain is not None:
                self._go_on(at)
            self.run.finish(at)
            self.inputs.clear(_stage(at))
        tensors, masks = self.run.load(at)
        for name, tensor in tensors.items():
            self.swaps.put(section.members[name], tensor)
        self._masks.append(masks)

    def masks(self, scope: Scope) -> Masks:
        """Those of all sections, in the order of the scope."""
        packed = {name: masks.packed(name) for masks in self._masks for name in masks}
        shapes = {name: masks.shape(name) for masks in self._masks for name in masks}
        return Masks.from_bits({name: packed[name] for name in scope}, shapes)

    def _record(self, section: Section) -> None:
        """Find what the blocks of a chain are called with, batch by batch; only what is still needed stays."""
        self._calls = []
        assert section.chain is not None
        for number, batch in enumerate(self.batches):
            with taken(given(batch), number + 1):
                found = record(self.model, batch, section.chain)
            self._calls.append(found.calls)
            needed = _keys(found.calls[section.at :])
            self.inputs.lay(_RECORDED, number, {key: found.tensors[key] for key in needed})

    def _solve(self, at: int, solve: Solve) -> None:
        members = self.sections[at].members
        for member in members.values():
            parameter = member.parameter.detach()
            if parameter.data_ptr() % _ALIGNMENT:  # it lies in a file, and products might round otherwise
                self.swaps.put(member, parameter.clone())
        kept: dict[str, Tensor] = {}
        for solved in solve(members, lambda: self._forwards(at)) if members else ():
            kept |= self._taken(members, solved)
            del solved  # before the next ones are computed
        new = {name: member.parameter.detach() for name, member in members.items()}
        self.run.save(at, new, Masks.from_bits(kept, {name: weights.shape for name, weights in new.items()}))

    def _taken(self, members: Mapping[str, Member], solved: Solved) -> dict[str, Tensor]:
        """Let the model compute with what was solved; which weights stay, as bits."""
        masks = Masks({name: stays for name, (_, stays) in solved.items()})
        masks.apply({name: weights for name, (weights, _) in solved.items()})
        for name, (weights, _) in solved.items():
            self.swaps.put(members[name], weights)
        return {name: masks.packed(name) for name in masks}

    def _forwards(self, at: int) -> Iterator[Forward]:
        for number, batch in enumerate(self.batches):
            yield Forward(batch, partial(self._forward, at, number))

    def _forward(self, at: int, number: int) -> Any:
        """Run a section on one batch; returns the output of a block."""
        section, batch = self.sections[at], self.batches[number]
        if section.chain is None:
            with taken(given(batch), number + 1):
                return run_until(self.model, batch, section.until)
        call = self._calls[number][section.at]
        recorded = self.inputs.take(_RECORDED, number, _keys([call]))
        brought = self.inputs.take(_stage(at), number, {*map(str, call.links)})
        args, kwargs = call.arguments({**recorded, **brought})
        with taken(given(batch), number + 1):
            return section.chain[section.at].module(*args, **kwargs)

    def _go_on(self, at: int) -> None:
        """Run a block with its new weights: what it gives is what the next one takes."""
        section = self.sections[at]
        assert section.chain is not None
        for number, calls in enumerate(self._calls):
            later = calls[section.at + 1 :]
            wanted = {link for call in later for link in call.links if link.block <= section.at}
            carried = [str(link) for link in wanted if link.block < section.at]
            state = self.inputs.take(_stage(at), number, carried)
            if later:
                leaves = tree_leaves(self._forward(at, number))
                state |= {str(link): leaves[link.leaf] for link in wanted if link.block == section.at}
                self.inputs.lay(_stage(at + 1), number, state)
            self.inputs.leave(_stage(at), number, ())
            self.inputs.leave(_RECORDED, number, _keys(later))


def _stage(at: int) -> str:
    """The name of what the batches bring to a section."""
    return f"{at:04}"


def _keys(calls: Sequence[BlockCall]) -> set[str]:
    """What no block gives and some calls need."""
    return {str(leaf) for call in calls for leaf in call.leaves if isinstance(leaf, Key)}


class _Swaps:
    """Other tensors in the places of a model's parameters, which come back at the end.

    Attributes:
        tensors: those that are there now, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._before: dict[tuple[nn.Module, str], nn.Parameter] = {}

    def __enter__(self) -> _Swaps:
        return self

    def __exit__(self, *_: object) -> None:
        for (module, attribute), parameter in self._before.items():
            setattr(module, attribute, parameter)

    def put(self, member: Member, tensor: Tensor) -> None:
        """Put a tensor in the place of a parameter, under all of its names, in memory as that one."""
        own = member.parameter
        new = tensor.to(own.device)
        if new.stride() != own.stride():
            new = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=own.device).copy_(new)
        self.tensors[member.name] = new
        for name in (member.name, *member.aliases):
            path, _, attribute = name.rpartition(".")
            module = self._modules[path]
            there = module._parameters[attribute]
            assert there is not None
            self._before.setdefault((module, attribute), there)
            same = there.shape == own.shape and there.stride() == own.stride()
            placed = new if same else new.as_strided(there.shape, there.stride())
            setattr(module, attribute, nn.Parameter(placed, requires_grad=False))


@contextmanager
def _calm(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients, without the caches of generation, and without torch's nested tensors.

    A transformer of torch that is given padding makes these in its fast path, and sums of them, for one, fail.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    modes = {module: module.training for module in model.modules()}
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        for config in cached:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for config in cached:
            config.use_cache = True
        for module, training in modes.items():
            module.training = training
