"""The statistics of BatchNorm, estimated anew: after pruning, activations are no longer those it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import InputError, listed
from secateur.scope import unwrap
from secateur.support import checks
from secateur.support.inputs import arguments
from secateur.support.progress import progress_bar


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> list[str]:
    """Estimate the running means and variances of all BatchNorm layers anew, from a few batches, without training.

    A model that is pruned without it is judged by statistics of activations that it no longer has. Nothing else of the
    model changes: the layers see statistics of the batch as in training, all others, dropout among them, run as in
    eval mode. Each statistic is the mean over the batches (Izmailov et al. 2018, "Averaging Weights Leads to Wider
    Optima", section 3.2).

    Args:
        model: its mode afterwards is that of before.
        batches: of inputs: a tensor, a tuple of positional or a dict of keyword arguments each. A hundred batches of
            the size of training are plenty.
        progress: draw a bar on stderr.

    Returns the names of the layers that have new statistics: those that a batch reached; none of a model without any.

    Raises:
        InputTypeError: no iterable of inputs. InputError: no batch came; a batch gives statistics that are not finite;
            a BatchNorm of torch.jit. What the model itself raises passes on. In each case the statistics are those of
            before.
    """
    model = unwrap(model)
    checks.several("batches", batches, "an iterable of inputs, such as [x] or (x for x, y in loader)")
    checks.flag("progress", progress)
    scripted = [n for n, m in model.named_modules() if "BatchNorm" in getattr(m, "original_name", "")]
    if scripted:
        raise InputError(f"{listed(scripted)} is of torch.jit and cannot be reset: recalibrate the model before that")
    layers = counting(model)
    before = {layer: ({k: t.clone() for k, t in layer.named_buffers()}, layer.momentum) for layer in layers.values()}
    modes = {module: module.training for module in model.modules()}
    means = {layer: _Mean() for layer in layers.values()}
    hooks = [layer.register_forward_hook(mean) for layer, mean in means.items()]
    kept: set[str] = set()
    try:
        model.eval()
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = 1.0  # the statistics of one batch
            layer.train()
        total = len(batches) if isinstance(batches, Sized) else None
        with progress_bar("statistics", total, shown=progress) as advance:
            for batch in batches if layers else ():
                args, kwargs = arguments(batch)
                model(*args, **kwargs)
                advance(1)
        reached = {name for name, layer in layers.items() if means[layer].count}
        if layers and not reached:
            raise InputError(
                "no batch reached a BatchNorm: give at least one, as an iterable of inputs; a layer whose train() "
                "keeps it in eval mode has statistics that stay"
            )
        for name in reached:
            means[layers[name]].write(layers[name])
        bad = [name for name in reached if not all(t.isfinite().all() for t in layers[name].buffers())]
        if bad:
            raise InputError(
                f"the statistics of {listed(sorted(bad))} are not finite: look for NaN or inf in the batches"
            )
        kept = reached
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        for name, layer in layers.items():
            old, layer.momentum = before[layer]
            for key, t in old.items() if name not in kept else ():
                layer.get_buffer(key).copy_(t)
    return [name for name in layers if name in kept]


def counting(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers, by name, of which `recalibrate` estimates the statistics anew."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


class _Mean:
    """The mean of the statistics of a layer over its calls, in float64: in bf16 a running one stands still."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def __call__(self, layer: _BatchNorm, args: Any, out: Any) -> None:
        """After a call of the layer."""
        if layer.training:
            now = [t.double() for t in _statistics(layer)]
            self.sums = [old + new for old, new in zip(self.sums, now, strict=True)] if self.count else now
            self.count += 1

    def write(self, layer: _BatchNorm) -> None:
        """Put the means into the layer."""
        for running, total in zip(_statistics(layer), self.sums, strict=True):
            running.copy_(total / self.count)


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    return [t for t in (layer.running_mean, layer.running_var) if t is not None]
