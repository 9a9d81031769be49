"""The weights that stay under given masks, fitted so that the outputs change least."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur import scope as scopes
from secateur.calibration.contest import Contest, Judge, Pruned
from secateur.calibration.matrices import Matrix, masked, matrices, opened, require_whole, restored
from secateur.calibration.solvers.base import Select
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.solvers.refit import refit as fit
from secateur.calibration.statistics import Statistics
from secateur.calibration.supports import Within
from secateur.calibration.ways import Solutions, Way, loops
from secateur.errors import InputError
from secateur.masks import Masks
from secateur.scope import Scope
from secateur.support import checks
from secateur.support.progress import progress_bar


@torch.no_grad()
def refit(
    model: nn.Module,
    masks: Masks,
    stats: Statistics,
    *,
    dense: nn.Module | Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> Pruned:
    """Prune a model by given masks, and fit the weights that stay so that its outputs change least.

    It serves for masks of any origin: of a score, a pattern, another solver. The masks stay as they are. Weights of any
    dtype are solved in float32: those of float64 come back in float64, but are exact to float32 only.

    Args:
        model: the dense one, or with `dense` one that the masks have pruned already; changed in place.
        masks: True = kept.
        stats: from `sc.calibrate(dense model, batches)`.
        dense: the dense model or its state_dict, if the weights that went are zeros in `model` already.
        progress: draw a bar on stderr.

    Returns:
        The masks, which also print as a table of what was lost.

    Warns:
        SecateurWarning: tensors without statistics, which are only masked.

    Raises:
        InputTypeError, InputError, UnknownNameError, MaskError: an argument that cannot be used; masks or statistics of
            another model; a model that is pruned already, without `dense`. The model is as it was then.

    Source: Meng et al. 2024, "ALPS", algorithm 2: conjugate gradients with the diagonal of H as preconditioner.

    >>> from secateur import Masks, calibrate
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 1.0]]))
    >>> stats = calibrate(model, [torch.tensor([[1.0, 1.0], [2.0, 2.0]])])  # both inputs are always equal
    >>> _ = refit(model, Masks({"weight": torch.tensor([[True, False]])}), stats)
    >>> [round(w, 1) for w in model.weight[0].tolist()]
    [2.0, 0.0]
    """
    checks.flag("progress", progress)
    inner = opened(model, stats)
    if not isinstance(masks, Masks):
        raise checks.wrong("masks", masks, "what sc.prune returned, or sc.Masks({name: bool tensor})")
    masks.writable(inner)
    found = scopes.weights(inner, only=list(masks))
    require_whole(found)
    masks = masks.named({name: _name_in(masks, name, *member.aliases) for name, member in found.members.items()})
    source = _source(found, masks, dense)
    parts = matrices(found, stats.moments)

    def select(part: Matrix, within: Within) -> Select:
        kept = part.moments.matrix({m.name: m.layout.outputs_first(masks[m.name]) for m in part.members})
        return lambda scores: kept

    with restored(found):
        for name, tensor in source.items():
            found[name].copy_(tensor)
        inside = loops(inner, stats.runs, parts)
        judge, work = Judge(inner, stats, found, None), Solutions(parts, select, inside)
        contest, every = Contest(judge, masked(found, masks, parts)), [Way("refit", _survivors)]
        if inside and judge:
            every.append(Way("refit, open loop", _survivors, rounds=0))
        with progress_bar("refitting", len(every), shown=progress) as advance:
            for way in every:
                contest.enter(way, work.of(way))
                advance(1)
        result = contest.result(found)
    contest.draft.write(found)
    return result


def _survivors(weights: Tensor, curvature: Curvature, select: Select) -> tuple[Tensor, Tensor]:
    kept = select(weights)
    return fit(weights, weights, kept, curvature), kept


def _name_in(masks: Masks, *names: str) -> str:
    return next(name for name in names if name in masks)


def _source(scope: Scope, masks: Masks, dense: nn.Module | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights to come near to, where they are not those of the model."""
    if dense is None:
        gone = [name for name in masks if not bool(scope[name][~masks[name]].any())]
        if masks.pruned and len(gone) == len(masks):
            raise InputError(
                "the weights that the masks prune are zero already, so that nothing tells what they did: give the "
                "dense model, or its state_dict, as dense=..."
            )
        return {}
    if not isinstance(dense, (nn.Module, Mapping)):
        raise checks.wrong("dense", dense, "the dense model, or its state_dict")
    given = masks.match(dense)
    return {name: given[name].detach() for name in masks}
