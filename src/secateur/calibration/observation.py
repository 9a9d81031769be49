"""One pass over some batches: what the layers of a model read is summed up while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur import scope as scopes
from secateur.calibration import products as products  # what the listener hears
from secateur.calibration import trees
from secateur.calibration.listening import Listener
from secateur.calibration.padding import real_positions
from secateur.calibration.statistics import Statistics
from secateur.errors import InputError, listed, warn
from secateur.scope import Scope, unwrap
from secateur.scores import GradientScore, one_number
from secateur.support import bits, checks
from secateur.support.inputs import arguments
from secateur.support.progress import progress_bar
from secateur.support.tables import counted

EVERY = 5
"""One batch of so many is held out, to check on."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[..., Tensor] | None = None,
    scope: Mapping[str, nn.Parameter] | None = None,
    progress: bool = False,
) -> Statistics:
    """Run a model on some batches and sum up what its weights read: X^T X of each input X, in float64.

    A few hundred examples without labels are enough. The model runs in eval mode, whatever its mode, because dropout
    would falsify the sums; its mode, buffers, gradients and hooks, and torch's random numbers, are as before
    afterwards. Weights are recognised in the functions of torch that they are given to, so that a layer of the user's
    own counts too. Positions that a mask in the batch marks as padding are left out; those that a mask made inside
    the model marks, from the attention of torch.nn on that is given it. Of the large maps of a
    convolution some positions are left out, see `patches.patches`. An expert of a mixture reads the tokens that it is
    given, among which may be padding, because they are dealt out without their mask.

    Every fifth batch is held out of the sums, and kept, so that what is made of them can be checked; of fewer than
    five batches none is held out, and all are kept. Inputs of LSTM, GRU and RNN modules are kept whole, since these are
    solved on sequences.

    Args:
        model: the dense one.
        batches: of inputs: a tensor, a tuple of positional or a dict of keyword arguments each; with a loss whatever
            that takes.
        loss: `loss(model, batch)` -> scalar Tensor: its squared gradients are summed up too.
        scope: the weights; by default `sc.weights(model)`.
        progress: draw a bar on stderr.

    Warns:
        SecateurWarning: a weight of the scope was never reached, or read fewer samples than it has inputs.

    Raises:
        InputTypeError: an argument of another type.
        InputError: no batch came, or one that the model does not take; a sharded model; no weight was reached.
        NotFiniteError: a layer reads NaN or inf. What `loss` raises passes on.
    """
    model = unwrap(model)
    checks.several("batches", batches, "an iterable of inputs, such as [x] or (x for x, y in loader)")
    if loss is not None:
        checks.function("loss", loss, "a function (model, batch) that returns a scalar Tensor")
    checks.flag("progress", progress)
    chosen = scopes.resolve(model, scope)
    _require_here(chosen)
    run = _Pass(model, chosen, loss)
    total = len(batches) if isinstance(batches, Sized) else None
    with progress_bar("calibration", total, shown=progress) as advance, undisturbed(model):
        for batch in batches:
            run.take(batch)
            advance(1)
    return run.statistics()


def completed(model: nn.Module, stats: Statistics) -> Statistics:
    """The statistics with the batches in the sums, too, that were held out: for what no check is to follow.

    Args:
        model: of which they are; as it was afterwards.
        stats: stay as they are. Batches for a loss are left out.
    """
    if not stats.held or not stats.checks:
        return stats
    listener = Listener(scopes.weights(model, only=list(stats.shapes)).members, model)
    with undisturbed(model):
        for batch in stats.held:
            call = arguments(batch)
            with listener.forward(real_positions(model, call)):
                model(*call[0], **call[1])
    more = replace(stats, moments=tuple(listener.moments()), held=[], kept=[], runs=listener.runs)
    return stats.merge(more)


class _Pass:
    """One pass over the batches."""

    def __init__(self, model: nn.Module, scope: Scope, loss: Callable[..., Tensor] | None) -> None:
        self._model, self._scope, self._loss = model, scope, loss
        self._listener = Listener(scope.members, model)
        self._squares = GradientScore("gradients", lambda weight, gradient: gradient.abs().square(), forget=False)
        self._trained = {name: weight for name, weight in scope.items() if weight.requires_grad}
        if loss is not None and not self._trained:
            raise InputError(
                "every tensor in scope is frozen, so that none gets a gradient: call requires_grad_() first"
            )
        self._seen = 0
        self._held: list[Any] = []
        self._kept: list[Any] = []

    def take(self, batch: Any) -> None:
        """Sum up a batch, or hold it out."""
        self._seen += 1
        if self._seen % EVERY == 0:
            self._held.append(batch)
            self._kept = []
            return
        if not self._held:
            self._kept.append(batch)
        if self._loss is None:
            self._run(batch)
        else:
            self._learn(batch, self._loss)

    def _run(self, batch: Any) -> None:
        call = arguments(batch)
        with trees.taken(batch, self._seen), self._listener.forward(real_positions(self._model, call)):
            self._model(*call[0], **call[1])

    def _learn(self, batch: Any, loss: Callable[..., Tensor]) -> None:
        masks = real_positions(self._model, ((), dict(batch))) if isinstance(batch, Mapping) else []
        with torch.enable_grad():
            with self._listener.forward(masks):
                value = loss(self._model, batch)
            found = torch.autograd.grad(one_number(value), list(self._trained.values()), allow_unused=True)
        self._squares.observe(self._trained, dict(zip(self._trained, found, strict=True)))

    def statistics(self) -> Statistics:
        """What the batches told."""
        if not self._seen:
            raise InputError("no batch came: give an iterable of at least one batch (a generator runs only once)")
        found = self._listener.moments()
        reached = {name for one in found for name in one.names}
        unreached = [name for name in self._scope if name not in reached]
        if not reached:
            raise InputError(
                f"no batch reached a weight in scope ({listed(unreached)}): give inputs that do, or another scope"
            )
        if unreached:
            warn(
                f"{listed(unreached)} ({counted(len(unreached), 'tensor')}) read nothing on these batches, or in a way "
                "that secateur does not know, and cannot be pruned by them: give batches that reach them, or leave "
                f"them out: sc.weights(model, skip={unreached[:1]!r})"
            )
        few = [one for one in found if int(one.count.min()) < one.inputs]
        if few:
            least = min(few, key=lambda one: int(one.count.min()) / one.inputs)
            warn(
                f"{listed([one.names[0] for one in few])} ({counted(len(few), 'matrix', 'matrices')}) saw fewer "
                f"samples than inputs (of {least.names[0]} {int(least.count.min())} for {least.inputs}), so that what "
                "is computed of them rests on damping: give more batches"
            )
        shapes = {name: weight.shape for name, weight in self._scope.items()}
        return Statistics(tuple(found), shapes, self._held, self._kept, self._listener.runs, self._squares.sums)


def _require_here(scope: Scope) -> None:
    for name, weight in scope.items():
        if bits.is_sharded(weight):
            raise InputError(
                f"{name} is sharded, and sums over its inputs are taken of whole weights: calibrate before sharding; "
                "give each process a whole model and its share of the batches, and add up with reduced()"
            )
        if weight.is_complex():
            raise InputError(f"{name} is complex: leave it out, scope=sc.weights(model, skip=[{name!r}])")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes, buffers and random numbers are as before afterwards."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad(), ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # compiled code shows no calls; without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, own in buffers:
                module._buffers.update(own)
            for buffer, value in values:
                buffer.copy_(value)
