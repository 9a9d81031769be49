"""One-shot pruning block by block, each on the outputs of those that are pruned already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from secateur import plan
from secateur.allocation import ALLOCATIONS, Allocation, Rule
from secateur.calibration import sequential
from secateur.calibration.listening import Listener
from secateur.calibration.matrices import Draft, Matrix, complete, matrices, require_whole, shared
from secateur.calibration.padding import real_positions
from secateur.calibration.sequential import Forward, Forwards, Solved
from secateur.calibration.solvers.base import Select, Solver, resolve
from secateur.calibration.supports import Within, selector
from secateur.calibration.ways import Solutions, Way, fast, loops, ways
from secateur.errors import InputError, listed, warn
from secateur.masks import Masks
from secateur.patterns import Pattern
from secateur.scope import Member, Scope, unwrap
from secateur.sparsity import Sparsity
from secateur.support import checks
from secateur.support.files import StrPath
from secateur.support.tables import counted

SENSITIVITY = "sensitivity"
"""The allocation that is measured in the whole model."""


@dataclass(frozen=True)
class Task:
    """What to prune, how much of it, and how.

    Attributes:
        sparsity: the fraction of all weights in scope that become zero, a `sc.Count`, or `{glob: fraction}`.
        solver: a name of `secateur.calibration.solvers.SOLVERS`, or a function like those.
        allocation: how many weights each tensor loses, as for `prune`; of what is known before data is seen.
        pattern: as for `prune`.
    """

    sparsity: Sparsity
    solver: str | Solver = "alps"
    allocation: str | Allocation | Rule = "uniform"
    pattern: str | Pattern | None = None

    def planned(self, model: nn.Module, scope: Mapping[str, nn.Parameter] | None) -> plan.Plan:
        """The choices, checked against a model."""
        given: Any = {"allocation": self.allocation, "pattern": self.pattern, "scope": scope}
        return plan.make(model, self.sparsity, score="magnitude", **given)

    def told(self, counts: Mapping[str, int], weights: int) -> dict[str, object]:
        """As JSON holds it, so that another task is told from this one."""
        solver = self.solver if isinstance(self.solver, str) else getattr(self.solver, "__qualname__", "")
        share = round(sum(counts.values()) / max(weights, 1), 6)
        return {"solver": solver, "pattern": str(self.pattern), "sparsity": share, "zeros": dict(counts)}


def prune_by_blocks(
    model: nn.Module,
    batches: Sequence[Any],
    task: Task,
    *,
    scope: Mapping[str, nn.Parameter] | None = None,
    folder: StrPath | None = None,
    progress: bool = False,
) -> Masks:
    """Prune a trained model block by block, without training it: memory holds the second moments of one block.

    Blocks are found by themselves: modules of one kind in a list, of which each is given what the one before it gave.
    A model without such is pruned at once. What stands before, between and after them is pruned too, if it is in scope,
    when its turn comes.

    Args:
        model: pruned in place. Biases stay, and so do names and shapes.
        batches: what it is called with: a tensor, a tuple of positional or a dict of keyword arguments each. All go
            into the sums.
        task: what is asked; or the sparsity alone.
        scope: as for `prune`.
        folder: keeps what is done, and what the batches bring to the next block, on disk. A run that was killed goes on
            there, and gives the same bits as one that was not.
        progress: draw a bar on stderr.

    Returns:
        The masks.

    Warns:
        SecateurWarning: a model without blocks; tensors that no batch reached, which are pruned by magnitude.

    Raises:
        InputError, InputTypeError, UnknownNameError, PatternError: an argument that cannot be used; batches that go
            different ways through the model; a folder of another run. NotFiniteError: NaN or inf in weights or in what
            they read. WriteError: the system refuses to write. The model is as it was then.

    >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    >>> model = nn.Sequential(*(block() for _ in range(3)))
    >>> batches = [torch.linspace(-1, 1, 256).sin().mul(i).view(32, 8) for i in range(1, 6)]
    >>> masks = prune_by_blocks(model, batches, Task(0.5))
    >>> masks.pruned, int((model[0][0].weight == 0).sum())
    (96, 32)
    """
    with pruned_by_blocks(model, batches, task, scope=scope, folder=folder, progress=progress) as (masks, tensors):
        pass
    own = dict(unwrap(model).named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return masks


@contextmanager
def pruned_by_blocks(
    model: nn.Module,
    batches: Sequence[Any],
    task: Task,
    *,
    scope: Mapping[str, nn.Parameter] | None = None,
    folder: StrPath | None = None,
    progress: bool = False,
) -> Iterator[tuple[Masks, dict[str, Tensor]]]:
    """As `prune_by_blocks`, but the model is pruned within the context only; yields masks and weights, by name."""
    checks.flag("progress", progress)
    if isinstance(task.allocation, str) and task.allocation == SENSITIVITY:
        raise InputError(
            f"allocation is {SENSITIVITY!r}, which looks at the whole model: choose "
            f"{', '.join(ALLOCATIONS.written())}, or {ALLOCATIONS.otherwise}, or give {{glob: fraction}} as the "
            "sparsity; or leave sequential out"
        )
    inner = unwrap(model)
    made = task.planned(inner, scope)
    require_whole(made.scope)
    masks = made.masks(made.counts())
    solver = fast if task.solver is fast else resolve(task.solver)
    way = ways(solver, "fast" if solver is fast else "full", looped=True)[0]
    solve = _BlockSolver(inner, masks, made.pattern, way)
    settings = task.told(masks.counts(), masks.size)
    pruned = Scope({name: made.scope.members[name] for name in masks}, {}, made.scope.parameters)
    running = sequential.pruned(
        inner, batches, solve, scope=pruned, settings=settings, folder=folder, progress=progress
    )
    with running as found:
        solve.warn()
        yield found


class _BlockSolver:
    """Prunes the tensors of one block, those that read one input after those that run before them.

    Args:
        model: of which they are.
        masks: by magnitude: they tell how many weights go, and which where no batch comes.
        pattern: of the zeros.
        way: to prune them.
    """

    def __init__(self, model: nn.Module, masks: Masks, pattern: Pattern | None, way: Way) -> None:
        self._model, self._masks, self._pattern, self._way = model, masks, pattern, way
        self._counts = masks.counts()
        self._few: list[str] = []
        self._unreached: list[str] = []

    def __call__(self, members: Mapping[str, Member], forwards: Forwards) -> Iterator[Solved]:
        left = dict(members)
        for names in self._together(Scope(members, {}, 0), forwards):
            yield self._pruned(Scope({name: left.pop(name) for name in names}, {}, 0), forwards)
        self._unreached += left
        yield {name: self._masked(member) for name, member in left.items()}

    def _together(self, scope: Scope, forwards: Forwards) -> list[list[str]]:
        """The tensors that read something, and all of whose rows do: those that share a Gram matrix are together.

        So are those of a recurrent module, which is fitted as a whole. One batch tells. Each lot then reads what those
        before it give when they are pruned, and one Gram matrix is in memory at a time, as a rule.
        """
        moments = self._heard(scope, islice(forwards(), 1)).moments()
        whole = complete(scope, moments)
        ties: dict[int, set[str]] = {}
        for one in moments:
            ties.setdefault(id(one.gram), set()).update(one.names)
        for name in whole:
            if isinstance(module := scope.members[name].module, nn.RNNBase):
                ties.setdefault(id(module), set()).add(name)
        lots = {name: {name} for name in whole}
        for names in ties.values():
            lot = set[str]().union(*(lots[name] for name in names.intersection(whole)))
            lots |= dict.fromkeys(lot, lot)
        return [[name for name in whole if name in lot] for lot in {id(lot): lot for lot in lots.values()}.values()]

    def _pruned(self, scope: Scope, forwards: Forwards) -> Solved:
        listener = self._heard(scope, forwards())
        parts, runs = matrices(scope, listener.moments()), listener.runs
        del listener  # its sums are the largest tensors of all
        self._few += [part.name for part in parts if int(part.moments.count.min()) < part.moments.inputs]
        zeros, draft = shared(parts, self._counts), Draft()

        def select(part: Matrix, within: Within) -> Select:
            return selector(
                part.moments, part.shapes, part.weights(), zeros[part], pattern=self._pattern, within=within
            )

        for solution in Solutions(parts, select, loops(self._model, runs, parts)).of(self._way):
            draft.put(*solution)
        return draft.stored(scope)

    def warn(self) -> None:
        """Say what was short of data.

        Warns:
            SecateurWarning: tensors that no batch reached; fewer samples than inputs.
        """
        if self._unreached:
            warn(
                f"{listed(self._unreached)} ({counted(len(self._unreached), 'tensor')}) read nothing on these batches, "
                "so that they are pruned by magnitude: give batches that reach them, or leave them out of the scope"
            )
        if self._few:
            warn(
                f"{listed(self._few)} ({counted(len(self._few), 'matrix', 'matrices')}) saw fewer samples than inputs, "
                "so that what is computed of them rests on damping: give more batches"
            )

    def _heard(self, scope: Scope, forwards: Iterable[Forward]) -> Listener:
        """A listener to some forwards."""
        listener = Listener(scope.members, self._model)
        for forward in forwards:
            with listener.forward(real_positions(self._model, forward.batch)):
                forward.run()
        return listener

    def _masked(self, member: Member) -> tuple[Tensor, Tensor]:
        """What is left of a tensor by magnitude."""
        parameter = member.parameter.detach()
        kept = self._masks[member.name].to(parameter.device)
        return parameter * kept, kept
