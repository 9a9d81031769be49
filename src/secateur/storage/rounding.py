"""Weights brought to whole steps so that the outputs change least, by what is known of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.anatomy import Layout
from secateur.calibration.moments import Moments
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.statistics import Statistics
from secateur.errors import InputError, InputTypeError
from secateur.scope import unwrap
from secateur.storage.coding import BLOCK, MOST_STEPS, Level, step_of
from secateur.storage.stored import Alias, Rounded, Stored
from secateur.structure.columns import layout
from secateur.support import bits, checks

SWEEPS = 3
"""Over the columns: the first brings most of the gain, after the third little changes."""

_COLUMNS = 64  # whose changes are taken to the others in one product of matrices


def checked(model: object, level: Level, stats: Statistics) -> nn.Module:
    """See that weights can be rounded by statistics, and return the model that has them.

    Raises:
        InputTypeError: no module, or no statistics. InputError: a level without a step; statistics of another model;
            sharded weights.
    """
    if not isinstance(stats, Statistics):
        raise checks.wrong("stats", stats, "what sc.calibrate(model, batches) returned")
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model is {checks.kind(model)}, and stats= are of the layers of a module: give the module itself"
        )
    if level.name != "step":
        raise InputError(
            f"level={level.name!r} has no step to round to, which is what stats= are for: give level='small' or step="
        )
    plain = unwrap(model)
    for name, parameter in plain.named_parameters():
        if bits.is_sharded(parameter):
            raise InputError(f"{name} is sharded, and is rounded to the nearest step only: leave stats= out")
    stats.require(plain)
    return plain


def rounded(tensors: Sequence[Stored], model: nn.Module, level: Level, stats: Statistics) -> list[Stored]:
    """Choose the whole steps that stand for the weights in a file, so that the outputs of the layers change least.

    The steps are those that the level gives without statistics. A zero stays zero. A weight may become zero too, where
    another one makes up for it: keeping all of them alive would cost most of the gain when steps are large.

    Args:
        tensors: of the model's state, in memory.
        model: the module that computes with them.
        level: of a step.
        stats: of this model.

    Returns:
        The same list, in which weights that the statistics know are `Rounded`; it holds a copy of each.
    """
    own = {tensor.name: tensor.of if isinstance(tensor, Alias) else tensor for tensor in tensors}
    found: dict[str, _Weight] = {}
    for moments in stats.moments:
        known = [own[name] for name in moments.names if name in own]
        if len(known) < len(moments.names):  # a state_dict may leave tensors out
            continue
        if any(level.for_tensor(tensor.dtype, tuple(tensor.shape)).name != "step" for tensor in known):
            continue
        for name in moments.names:
            if name not in found:
                found[name] = _Weight(own[name], layout(model, name, model.get_parameter(name)), level)
        _descend(moments, found)
    made = {weight.stored.name: weight.made() for weight in found.values()}
    replaced = [made.get(tensor.name, tensor) for tensor in tensors]
    return [Alias(t.name, made.get(t.of.name, t.of)) if isinstance(t, Alias) else t for t in replaced]


class _Weight:
    """A tensor, outputs first: its values, and the values that will stand for it."""

    def __init__(self, stored: Stored, layout: Layout, level: Level) -> None:
        self.stored = stored
        self.layout = layout
        self.steps = [step_of(piece, level) for piece in stored.pieces(BLOCK)]
        self.exact = stored.tensor().cpu()
        each = torch.tensor(self.steps).repeat_interleave(BLOCK)[: self.exact.numel()]
        self.free = _free(self.exact, each.view(self.exact.shape))
        self.target = layout.outputs_first(self.exact).float()
        self.each = layout.outputs_first(each.view(self.exact.shape))
        self.values = nearest(self.target, self.each)

    def made(self) -> Rounded:
        """The tensor with the values that stand for it, as they are stored."""
        values = self.layout.as_stored(self.values, self.stored.shape).to(self.stored.dtype)
        values = torch.where(self.free, values, self.exact)  # float32 would lose bits of a float64 that stays
        return Rounded(self.stored.name, self.exact, values.contiguous(), self.steps)


def _descend(moments: Moments, found: Mapping[str, _Weight]) -> None:
    """Round the matrix of some tensors."""
    target, each = (
        moments.matrix({name: getattr(found[name], which) for name in moments.names}) for which in ("target", "each")
    )
    values = descend(target, each, Curvature(moments.gram.cpu()))
    shapes = {name: found[name].target.shape for name in moments.names}
    for piece, part in moments.parts(values, shapes):
        found[piece.name].values[piece.start : piece.stop] = part


def nearest(target: Tensor, steps: Tensor) -> Tensor:
    """The nearest whole steps; zeros, and numbers that a step cannot hold, stay as they are."""
    return torch.where(_free(target, steps), (target / steps).round() * steps, target)


def descend(target: Tensor, steps: Tensor, curvature: Curvature, sweeps: int = SWEEPS) -> Tensor:
    """Find whole steps Q in place of weights W with a small error tr((Q - W) H (Q - W)^T), by coordinate descent.

    Column after column takes the whole step that is best with all others as they are; the first time those that follow
    are not whole yet, which ends better than a start from the nearest steps. What a column changes is taken to the next
    ones at once, and to those beyond its block in one product of matrices.

    Args:
        target: W, float32 [groups, rows, n].
        steps: the length of a step for each weight, of the same shape.
        curvature: of H.
        sweeps: over all columns.

    Returns:
        Q. Zeros stay zero; numbers that are not finite or take too many steps stay as they are.

    Source: Frantar & Alistarh 2022, "Optimal Brain Compression", has the objective; coordinate descent on it is that
    of Behdin et al. 2023, "QuantEase", algorithm 2.
    """
    free = _free(target, steps).mT.contiguous()
    scale = curvature.scale.mT
    lengths = torch.where(free, steps.mT * scale, 1.0)
    wanted = torch.where(free, target.mT * scale, 0.0)
    now = wanted.clone()
    matrix = curvature.matrix
    slope = torch.zeros_like(now)  # half of the gradient; the diagonal is 1, so that it is a distance too
    for _ in range(sweeps):
        for start in range(0, now.shape[1], _COLUMNS):
            block = slice(start, start + _COLUMNS)
            change = _block(
                now[:, block], slope[:, block].clone(), matrix[:, block, block], lengths[:, block], free[:, block]
            )
            slope += matrix[:, :, block] @ change
    found = (now / lengths).round().mT * steps
    return torch.where(free.mT, found, target)


def _block(now: Tensor, slope: Tensor, matrix: Tensor, lengths: Tensor, free: Tensor) -> Tensor:
    """Improve some columns in place, [groups, columns, rows]; returns by how much they changed."""
    before = now.clone()
    for j in range(now.shape[1]):
        length = lengths[:, j]
        best = ((now[:, j] - slope[:, j]) / length).round().clamp_(-MOST_STEPS, MOST_STEPS) * length
        change = (best - now[:, j]) * free[:, j]
        now[:, j] += change
        slope[:, j + 1 :].addcmul_(matrix[:, j + 1 :, j, None], change.unsqueeze(1))
    return now - before


def _free(target: Tensor, steps: Tensor) -> Tensor:
    """The weights that can be whole steps."""
    return (target != 0) & (target.abs() <= MOST_STEPS * steps) & (steps > 0) & steps.isfinite()
