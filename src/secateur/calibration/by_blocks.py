"""One-shot pruning block by block, each on the outputs of those that are pruned already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from secateur import plan
from secateur.allocation import Allocation, Rule, apportion
from secateur.calibration import sequential
from secateur.calibration.listening import Listener
from secateur.calibration.moments import Moments
from secateur.calibration.padding import real_positions
from secateur.calibration.sequential import Forward, Forwards, Solved
from secateur.calibration.solvers import SOLVERS
from secateur.calibration.solvers.base import Solver, resolve
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.supports import selector
from secateur.calibration.ways import fast
from secateur.errors import InputError, NotFiniteError, listed, warn
from secateur.masks import Masks
from secateur.patterns import Pattern
from secateur.scope import Member, Scope, unwrap
from secateur.sparsity import Sparsity
from secateur.support import checks
from secateur.support.files import StrPath
from secateur.support.tables import counted


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

    def told(self, counts: Mapping[str, int]) -> dict[str, object]:
        """As JSON holds it, so that another task is told from this one."""
        solver = self.solver if isinstance(self.solver, str) else getattr(self.solver, "__qualname__", "")
        return {"solver": solver, "pattern": str(self.pattern), "zeros": dict(counts)}


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
    if isinstance(task.allocation, str) and task.allocation == "sensitivity":
        raise InputError(
            "allocation is 'sensitivity', which looks at the whole model: choose 'uniform', 'erk' or {glob: fraction} "
            "with sequential, or leave that out"
        )
    inner = unwrap(model)
    made = plan.make(
        inner, task.sparsity, score="magnitude", allocation=task.allocation, pattern=task.pattern, scope=scope
    )
    masks = made.masks(made.counts())
    solve = _BlockSolver(inner, masks, made.pattern, fast if task.solver is fast else resolve(task.solver))
    settings = task.told(masks.counts())
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
        solver: of a matrix.
    """

    def __init__(self, model: nn.Module, masks: Masks, pattern: Pattern | None, solver: Solver) -> None:
        self._model, self._masks, self._pattern, self._solver = model, masks, pattern, solver
        self._few: list[str] = []
        self._unreached: list[str] = []

    def __call__(self, members: Mapping[str, Member], forwards: Forwards) -> Iterator[Solved]:
        left = dict(members)
        for names in self._together(members, forwards):
            yield self._pruned({name: left.pop(name) for name in names}, forwards)
        self._unreached += left
        yield {name: self._masked(member) for name, member in left.items()}

    def _together(self, members: Mapping[str, Member], forwards: Forwards) -> list[list[str]]:
        """The tensors that read something, and all of whose rows do: those that share a Gram matrix are together.

        One batch tells. Each lot then reads what those before it give when they are pruned, and one Gram matrix is in
        memory at a time, as a rule.
        """
        moments = _heard(self._model, members, islice(forwards(), 1))
        rows = dict.fromkeys(members, 0)
        for one in moments:
            for piece in one.pieces:
                rows[piece.name] += piece.stop - piece.start
        whole = [name for name, member in members.items() if rows[name] == _shape(member)[0]]
        lots = {name: {name} for name in whole}
        by_gram: dict[int, set[str]] = {}
        for one in moments:
            by_gram.setdefault(id(one.gram), set()).update(set(one.names).intersection(whole))
        for names in by_gram.values():
            joined = set[str]().union(*(lots[name] for name in names))
            lots |= dict.fromkeys(joined, joined)
        return [
            [other for other in whole if other in lots[name]] for name in whole if name == _first(lots[name], whole)
        ]

    def _pruned(self, members: Mapping[str, Member], forwards: Forwards) -> Solved:
        moments = _heard(self._model, members, forwards())
        self._few += [one.names[0] for one in moments if int(one.count.min()) < one.inputs]
        zeros = self._zeros(moments, members)
        found = {name: _room(member) for name, member in members.items()}
        for at in _by_gram(moments):
            gram = moments[at[0]].gram
            for i in at:  # their shapes are needed still, the numbers no longer than for the curvature
                moments[i] = replace(moments[i], gram=gram.new_empty(()).expand(gram.shape))
            try:
                curvature = Curvature(gram)
            except NotFiniteError as error:
                raise NotFiniteError(f"{listed([name for i in at for name in moments[i].names])}: {error}") from error
            del gram
            for i in at:
                self._solve(moments[i], curvature, zeros[i], members, found)
        return {name: _stored(member, found[name]) for name, member in members.items()}

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
                f"{listed(self._few)} ({counted(len(self._few), 'tensor')}) saw fewer samples than inputs, so that "
                "what is computed of them rests on damping: give more batches"
            )

    def _zeros(self, moments: Sequence[Moments], members: Mapping[str, Member]) -> list[int]:
        """How many weights of each matrix go: of a tensor in several of them, in proportion."""
        counts, zeros = self._masks.counts(), [0] * len(moments)
        for name in {name for one in moments for name in one.names}:
            sizes = {
                str(i): (piece.stop - piece.start) * _shape(members[name])[1:].numel()
                for i, one in enumerate(moments)
                for piece in one.pieces
                if piece.name == name
            }
            for i, count in apportion(sizes, sizes, counts[name]).items():
                zeros[int(i)] += count
        return zeros

    def _solve(
        self,
        moments: Moments,
        curvature: Curvature,
        zeros: int,
        members: Mapping[str, Member],
        found: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        own = {name: members[name] for name in moments.names}
        tensors = {name: m.layout.outputs_first(m.parameter.detach()).float() for name, m in own.items()}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        weights = moments.matrix(tensors)
        each = len(moments.pieces) > 1 or self._solver in (SOLVERS.find("wanda"), fast)
        within: Any = "row" if each and self._pattern is None else "matrix"  # over all rows an LSTM comes to nothing
        select = selector(moments, shapes, weights, zeros, pattern=self._pattern, within=within)
        for at, solved in enumerate(self._solver(weights, curvature, select)):
            for (name, start, stop), rows in moments.parts(solved, shapes):
                found[name][at][start:stop] = rows

    def _masked(self, member: Member) -> tuple[Tensor, Tensor]:
        """What is left of a tensor by magnitude."""
        parameter = member.parameter.detach()
        kept = self._masks[member.name].to(parameter.device)
        return parameter * kept, kept


def _heard(model: nn.Module, members: Mapping[str, Member], forwards: Iterable[Forward]) -> list[Moments]:
    """What some tensors read in some forwards."""
    listener = Listener(members)
    for forward in forwards:
        with listener.forward(real_positions(model, forward.batch)):
            forward.run()
    return listener.moments()


def _shape(member: Member) -> torch.Size:
    return member.layout.shape(member.parameter.shape)


def _first(names: set[str], order: Sequence[str]) -> str:
    return next(name for name in order if name in names)


def _room(member: Member) -> tuple[Tensor, Tensor]:
    """Of a tensor, its outputs first: new weights, and which of them stay."""
    shape, device = _shape(member), member.parameter.device
    return torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.bool, device=device)


def _stored(member: Member, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same as the model stores the tensor."""
    parameter = member.parameter.detach()
    weights, kept = (member.layout.as_stored(one, parameter.shape) for one in new)
    return weights.to(parameter.dtype), kept


def _by_gram(moments: Sequence[Moments]) -> list[list[int]]:
    """Which of them share a Gram matrix; the largest last, when nothing but it is in memory."""
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(moments):
        groups.setdefault(id(one.gram), []).append(i)
    return sorted(groups.values(), key=lambda at: moments[at[0]].gram.numel())
