"""What removed units gave is taken over by those that stay: the layers that read them are fitted anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from secateur import anatomy
from secateur.calibration.fidelity import Fidelity
from secateur.calibration.moments import Moments
from secateur.calibration.observation import completed
from secateur.calibration.statistics import Statistics
from secateur.errors import listed, warn
from secateur.structure.columns import Readers, damped, input_dims, layout
from secateur.structure.cut import Kept, named_tensors
from secateur.structure.plan import Plan


def compensate(model: nn.Module, small: nn.Module, plan: Plan, stats: Statistics) -> Plan:
    """Fit the layers of a smaller model that read removed units, by least squares on what stays, in place.

    Where the outputs come no nearer to those of the model, on batches that calibration held out, the small model stays
    as it was cut. Where they do, it is fitted once more with these batches in the sums too.

    Args:
        model: before it was cut.
        small: after.
        plan: what went.
        stats: of the model.

    Returns the plan with the names of the weights that were fitted.

    Warns:
        SecateurWarning: some readers have no statistics, or are tied, and stay as they were cut; or all do.

    Source: Meng et al. 2024, "OSSCAR", eq. 5; He et al. 2017, "Channel Pruning", eq. 2.
    """
    named, fitted = named_tensors(small), _names(model, plan.kept, stats)
    if unread := _unread(model, plan.kept, fitted):
        warn(
            f"{listed(unread)} ({len(unread)}) read units that went, and stay as they were cut: stats knows nothing of "
            "them, or they are tied to another weight. Fine-tuning makes up for it"
        )

    def write(names: Sequence[str], stats: Statistics) -> None:
        for name, tensor in fit(model, plan.kept, stats, names):
            named[name].data = plan.cut(name, tensor)

    judge = Fidelity(model, stats.checks).of if stats.checks else lambda model: 0.0  # without a check all are fitted
    best, refused = judge(small), list[str]()
    for names in _apart(model, fitted):
        before = {name: named[name].data for name in names}
        write(names, stats)
        now = judge(small)
        if now >= best:
            best = now
            continue
        refused += names
        for name, tensor in before.items():
            named[name].data = tensor
    if refused:
        warn(
            f"{listed(refused)} ({len(refused)}) are not fitted anew: on the batches to check on the outputs would be "
            "further from those of the model. Give sc.calibrate more batches"
        )
    fitted = [name for name in fitted if name not in refused]
    if fitted:
        write(fitted, completed(model, stats))
    return replace(plan, fitted=tuple(fitted))


def _apart(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Weights of recurrent layers, whose errors come back to them, and those of others: each may fail by itself."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for name in names:
        family = anatomy.family(model.get_submodule(name.rpartition(".")[0]))
        found[family in ("recurrent", "cell")].append(name)
    return [some for some in found.values() if some]


def fit(model: nn.Module, kept: Kept, stats: Statistics, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights of layers that read removed units, of their full size, those that read what went zero; by name.

    W H[:, kept] inv(H[kept, kept]) with a damped H: it gives on the samples, of all there are, what is nearest to
    what W gives; a damping of .01 holds it to W where the samples say little. One after another, so that memory holds
    one.

    Args:
        model: before it is cut.
        kept: positions that stay, by tensor and dimension.
        stats: of the model.
        names: of the weights.
    """
    readers = Readers(model, stats)
    concerned = [one for one in _reading(readers, kept) if set(one[0].names) <= set(names)]
    for own, parts in groupby(concerned, lambda one: one[0].names):  # a weight may be several matrices
        found = {name: readers.layouts[name].outputs_first(readers.tensors[name].detach()).clone() for name in own}
        for moments, gone in parts:
            matrix = readers.matrix(moments)
            for group, stays in enumerate(~gone.to(matrix.device)):
                matrix[group] = _fitted(matrix[group], moments.gram[group], stays)
            for (name, start, stop), rows in moments.parts(matrix, {n: t.shape for n, t in found.items()}):
                found[name][start:stop] = rows.to(found[name])
        for name, tensor in found.items():
            yield name, readers.layouts[name].as_stored(tensor, readers.tensors[name].shape)


def _reading(readers: Readers, kept: Kept) -> Iterator[tuple[Moments, Tensor]]:
    """The matrices that read removed units, and which of their columns go, [groups, inputs]."""
    goes = {
        (name, d): _others(kept[name][d], tensor.shape[d]).to(tensor.device)
        for name, tensor in readers.tensors.items()
        for d in input_dims(readers.layouts[name])
        if d in kept.get(name, {})
    }
    for moments in readers:
        gone = readers.columns(moments, goes, torch.zeros((), dtype=torch.bool))
        if gone.any():
            yield moments, gone


def _names(model: nn.Module, kept: Kept, stats: Statistics) -> list[str]:
    """The weights that can be fitted."""
    tied = _tied(model)
    read = [moments.names for moments, _ in _reading(Readers(model, stats), kept)]
    return list(dict.fromkeys(name for names in read if tied.isdisjoint(names) for name in names))


def _fitted(weights: Tensor, gram: Tensor, stays: Tensor) -> Tensor:
    """One matrix [rows, inputs], zero where columns go."""
    found = torch.zeros_like(weights)
    if bool(stays.any()):
        full = damped(gram)
        factor = torch.linalg.cholesky(full[stays][:, stays])
        found[:, stays] = torch.cholesky_solve(full[stays] @ weights.T, factor).T
    return found


def _others(kept: Sequence[int], size: int) -> Tensor:
    """The mask of the positions that are not kept."""
    found = torch.ones(size, dtype=torch.bool)
    found[list(kept)] = False
    return found


def _tied(model: nn.Module) -> set[str]:
    """Tensors with several names: what fits one of their uses would spoil the other."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), []).append(name)
    return {name for alike in names.values() if len(alike) > 1 for name in alike}


def _unread(model: nn.Module, kept: Kept, fitted: Collection[str]) -> list[str]:
    """Weights of which inputs went, and that were not fitted."""
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        if name in kept and name not in fitted and anatomy.is_weight(model.get_submodule(path), attribute):
            dims = input_dims(layout(model, name, parameter))
            found += [name] if any(d in kept[name] for d in dims) else []
    return found
