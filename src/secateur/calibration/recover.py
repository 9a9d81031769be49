"""A pruned model learns anew what the dense one says, under its masks, in a few steps on unlabelled data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur import anatomy
from secateur import scope as scopes
from secateur.calibration import trees
from secateur.calibration.courses import Course
from secateur.calibration.padding import kept, real_positions, told
from secateur.calibration.spreads import Spreads
from secateur.errors import InputError, SecateurError, warn
from secateur.masks import Masks, as_masks
from secateur.scope import unwrap
from secateur.support import bits, checks
from secateur.support.inputs import arguments
from secateur.support.progress import progress_bar
from secateur.support.tables import counted

_CHECKS = 5  # on what is held out, while it is trained
_OF_FEW, _MOST_HELD = 5, 4  # one of five batches is held out, and four at most
_MEASURED = 32  # batches, at most, whose outputs tell how much an error weighs


def recover(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float = 0.02,
    masks: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> list[float]:
    """Train a pruned model, in place, to compute what the dense one does; pruned weights stay zero.

    Labels are not needed: the outputs of both, and those of each module that stands in a ModuleList or a Sequential,
    are compared on the same inputs, padding left out. All that requires a gradient is trained, embeddings aside, which
    few batches know too little of. Both models run in eval mode, so that BatchNorm keeps its statistics; see
    `recalibrate`. What else the model is, its gradients and modes among it, and torch's random numbers are as before.

    It does not make things worse: one of five batches, four at most, is held out and looked at six times on the way
    (fewer than five are all trained on, and looked at). Where the loss on them rises, training goes back to the best
    weights so far, with half the rate; in the end the model has the best, which may be those of before.

    Args:
        model: pruned.
        dense: what it was before: `copy.deepcopy(model)`, made then.
        batches: of inputs: a tensor, a tuple of positional or a dict of keyword arguments each. They are kept, and
            come again when there are fewer than steps; of more than can be used no more are taken.
        steps: of Adam, one a batch; the rate rises over the first tenth and falls to zero along a cosine.
        lr: how far a weight may move in a step, relative to the root mean square of the weights of its tensor that are
            not zero.
        masks: which weights stay; by default those of `sc.weights(model)` that are not zero.
        progress: draw a bar on stderr.

    Returns:
        The loss of each step before it was made: the squared distance of the outputs over their variance in the dense
        model, plus the mean of the same of the modules. The variance is that over the batches that are trained on (32
        of them at most); of outputs that hardly vary, a hundredth of their mean square.

    Warns:
        SecateurWarning: nothing was better than before on what is held out.

    Raises:
        InputTypeError: an argument of another type. UnknownNameError, MaskError: masks of another model.
        InputError: no batch, or one that the models do not take; a dense model that is the pruned one; outputs that
            differ in shape; nothing to train; weights that are sharded.
        NotFiniteError: a loss of NaN or inf in a step.
        In each case, and when interrupted, the weights are those of before.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; of the modules, Sun et al. 2019,
    "Patient Knowledge Distillation for BERT Model Compression", equation 6. Steps relative to the weights: Shazeer &
    Stern 2018, "Adafactor", section 8.

    >>> import copy
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> dense = copy.deepcopy(model)
    >>> masks = sc.prune(model, 0.5)
    >>> losses = recover(model, dense, [torch.randn(32, 8)], steps=20)
    >>> losses[-1] < losses[0], sc.check(model, masks)
    (True, {})
    """
    if not isinstance(dense, nn.Module):
        raise checks.wrong("dense", dense, "the model as it was before pruning, a torch.nn.Module")
    pupil, teacher = unwrap(model), unwrap(dense)
    checks.several("batches", batches, "an iterable of inputs, such as [x] or (x for x, y in loader)")
    checks.whole("steps", steps, 1, "a number of steps")
    checks.number("lr", lr, "a number above 0, such as 0.02")
    if not 0 < lr < math.inf:
        raise InputError(f"lr is {lr}: give a number above 0, such as 0.02")
    checks.flag("progress", progress)
    stay = Masks.from_zeros(scopes.weights(pupil)) if masks is None else as_masks(masks)
    masked = stay.writable(pupil)
    trained = _trained(pupil, teacher, masked)
    course = Course(trained, {id(weight): stay[name] for name, weight in masked.items()}, steps, lr)
    losses: list[float] = []
    with course, progress_bar("recovery", steps, shown=progress) as advance, _undisturbed(pupil, teacher):
        learned, checked = _divided(batches, steps)
        with _Listener(pupil) as said, _Listener(teacher) as wanted:
            spreads = _measured(pupil, teacher, wanted, learned)
            apart = partial(_loss, pupil, teacher, said, wanted, spreads)
            course.check(_mean(apart, checked))
            for number, batch in enumerate(islice(cycle(learned), steps), 1):
                losses.append(course.step(apart(batch)))
                if number % max(steps // _CHECKS, 1) == 0 or number == steps:
                    course.check(_mean(apart, checked))
                advance(1)
    stay.apply(pupil)
    if not course.gained:
        warn(
            f"recovery found nothing better in {counted(steps, 'step')}, so the weights are those of before: "
            "give more steps, or a lower lr"
        )
    return losses


def _divided(batches: Iterable[Any], steps: int) -> tuple[list[Any], list[Any]]:
    """What is trained on, and what is held out, spread over all: they may be sorted, by length for one."""
    found = list(islice(batches, steps + _MOST_HELD))
    if not found:
        raise InputError("no batch came: give an iterable of at least one batch (a generator runs only once)")
    count = min(len(found) // _OF_FEW, _MOST_HELD)
    held = {(2 * i + 1) * len(found) // (2 * count) for i in range(count)}
    checked = [found[i] for i in sorted(held)]
    return [one for i, one in enumerate(found) if i not in held], checked or found


@torch.no_grad()
def _mean(apart: Callable[[Any], Tensor], batches: list[Any]) -> float:
    return math.fsum(float(apart(batch)) for batch in batches) / len(batches)


def _trained(model: nn.Module, dense: nn.Module, masked: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that are trained; checks that both models can be."""
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if bits.is_sharded(parameter):
            raise InputError(f"{name} is sharded, and recover trains whole weights: recover before sharding")
    if {id(parameter) for parameter in own.values()} & {id(parameter) for parameter in dense.parameters()}:
        raise InputError(
            "dense shares parameters with the pruned model: give a copy that was made before pruning, "
            "dense = copy.deepcopy(model)"
        )
    looked_up = {
        id(parameter)
        for module in model.modules()
        if anatomy.family(module) == "embedding"
        for parameter in module.parameters(recurse=False)
    }
    chosen = {id(weight) for weight in masked.values()}
    found = {
        name: parameter
        for name, parameter in own.items()
        if parameter.requires_grad and (id(parameter) in chosen or id(parameter) not in looked_up)
    }
    if not found:
        raise InputError("no parameter that could be trained requires a gradient: call model.requires_grad_() first")
    return found


def _measured(pupil: nn.Module, teacher: nn.Module, wanted: _Listener, batches: list[Any]) -> tuple[Spreads, Spreads]:
    """How much an error weighs, of the outputs and of those of the modules.

    The batches together tell it: one of a single row has no variance, by which an error would weigh without end.
    """
    ends, inside = Spreads(alike=False), Spreads(alike=True)
    for batch in batches[:: -(-len(batches) // _MEASURED)]:
        call = arguments(batch)
        with torch.no_grad(), _explained(batch), told(teacher) as masks:
            right = _numbers(teacher(*call[0], **call[1]))
        padding = [*real_positions(pupil, call), *masks.values()]
        for spreads, found in ((ends, dict(enumerate(right))), (inside, wanted.taken())):
            for place, one in found.items():
                spreads.note(place, _rows(one, _real(one, padding)))
    return ends, inside


def _loss(
    pupil: nn.Module,
    teacher: nn.Module,
    said: _Listener,
    wanted: _Listener,
    spreads: tuple[Spreads, Spreads],
    batch: Any,
) -> Tensor:
    """How far the outputs are apart, and those of the modules."""
    call = arguments(batch)
    with _explained(batch):
        with torch.no_grad():
            right = teacher(*call[0], **call[1])
        with told(pupil) as masks:
            out = pupil(*call[0], **call[1])
    padding = [*real_positions(pupil, call), *masks.values()]
    ends = list(zip(_numbers(out), _numbers(right), strict=False))
    if not ends or any(one.shape != other.shape for one, other in ends):
        raise InputError(
            f"the outputs are {trees.told(out)} and {trees.told(right)}: give the dense model of the pruned one, with "
            "outputs of floating-point numbers"
        )
    heard, asked = said.taken(), wanted.taken()
    outer, inner = spreads
    terms = [
        [_apart(*pair, padding, outer, place) for place, pair in enumerate(ends)],
        [
            _apart(one, asked[place], padding, inner, place)
            for place, one in heard.items()
            if place in asked and one.shape == asked[place].shape
        ],
    ]
    return sum((torch.stack(each).mean() for each in terms if each), start=torch.zeros(()))


@contextmanager
def _explained(batch: Any) -> Iterator[None]:
    """Says what a batch should be where a model fails on it."""
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        raise InputError(
            f"the models do not take a batch, {trees.told(batch)} ({type(error).__name__}: {error}): give each as a "
            "tensor, a tuple of positional or a dict of keyword arguments, without labels unless the model takes them, "
            "on the device of the model"
        ) from error


def _apart(said: Tensor, wanted: Tensor, padding: list[Tensor], spreads: Spreads, place: Hashable) -> Tensor:
    """The mean squared distance over the variance at a place, of samples [..., numbers] that are no padding."""
    real = _real(wanted, padding)
    said, wanted = _rows(said, real), _rows(wanted, real)
    spread = spreads.of(place, wanted)
    squares = (said - wanted).square().sum()
    if spread < torch.finfo(torch.float32).tiny:  # all is zero: there is nothing to measure an error by
        return squares * 0
    return squares / (spread * max(wanted.numel(), 1))


def _real(output: Tensor, padding: list[Tensor]) -> Tensor | None:
    return kept(padding, output.shape[:-1])


def _rows(output: Tensor, real: Tensor | None) -> Tensor:
    """In float32 [samples, numbers], those that are no padding."""
    rows = output.float().flatten(0, -2)
    return rows if real is None else rows[real]


def _numbers(output: Any) -> list[Tensor]:
    """The tensors in an output that can be compared."""
    return [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point() and one.ndim > 1]


class _Listener:
    """Hears what the modules of a ModuleList or a Sequential say, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.heard: dict[tuple[str, int], Tensor] = {}
        self._calls: Counter[str] = Counter()
        lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList | nn.Sequential)]
        self._modules = {f"{name}.{key}": module for name, one in lists for key, module in one.named_children()}

    def __enter__(self) -> _Listener:
        self._hooks = [module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def taken(self) -> dict[tuple[str, int], Tensor]:
        """What was heard since the last time, by the name of the module and the number of the tensor."""
        found, self.heard = self.heard, {}
        self._calls.clear()
        return found

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for one in _numbers(output):
                self.heard[name, self._calls[name]] = one
                self._calls[name] += 1

        return hook


@contextmanager
def _undisturbed(*models: nn.Module) -> Iterator[None]:
    """Eval mode with gradients; modes, buffers and random numbers are as before afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    devices = sorted({p.device.index for model in models for p in model.parameters() if p.device.type == "cuda"})
    fast = torch.backends.mha.get_fastpath_enabled()
    # without cuDNN, whose recurrent layers have no backward in eval mode; the fast path of attention skips modules
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for model in models:
                model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
