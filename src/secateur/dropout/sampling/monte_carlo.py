"""Monte-Carlo dropout: many samples of a model's output, of one pass or few, on a model that stays in `eval()`."""

from __future__ import annotations

import math
import threading
import time
import warnings
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from secateur.dropout.interception.discovery import Found
from secateur.dropout.interception.followers import Unsuitable
from secateur.dropout.interception.isolation import require_rest, undisturbed
from secateur.dropout.sampling.fingerprints import fingerprint, identity, spec
from secateur.dropout.sampling.passes import Output, Run, SamplingPlan, joined
from secateur.dropout.sampling.strategies import Outputs
from secateur.dropout.uncertainty.predictions import Prediction
from secateur.errors import InputError, warn
from secateur.measurement.costs import peak_bytes
from secateur.support import checks
from secateur.support.inputs import arguments
from secateur.support.progress import progress_bar

__all__ = ["sample"]


_PROFILER = threading.Lock()
_PLANS: weakref.WeakKeyDictionary[nn.Module, dict[Any, SamplingPlan]] = weakref.WeakKeyDictionary()


def sample(
    model: nn.Module,
    inputs: Any,
    *,
    n: int = 50,
    seed: int | None = 0,
    shared: bool = False,
    output: Output | None = None,
    max_memory: int = 2**30,
    progress: bool = False,
) -> Prediction:
    """Take samples of the output of a model with its dropout switched on: Monte-Carlo dropout (Gal & Ghahramani 2016).

    The model stays as it is, in `eval()`: normalisation is frozen, and nothing is patched. What comes before the first
    dropout is computed once. How samples are computed (mapped by vmap, folded into the batch, one by one) is found by
    trying, at the first call for a model and a shape of inputs, and each way is checked against plain passes.

    Args:
        model: in `eval()`.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        n: samples. The error of the standard deviation is about 24 % with 10, 10 % with 50, 5 % with 200.
        seed: the masks of sample i depend only on the seed and on i: n=20 gives the first 20 samples of n=50. None:
            another seed at each call, from torch's global generator.
        shared: one mask for the whole batch, so that a sample is one sub-network, instead of one mask for each element
            of the batch. The batch shares masks on weights (DropConnect, `recurrent` with `hidden` or `weight`) in any
            case. The batch is that dimension of the inputs which comes first in the output.
        output: a function that returns the tensor `[batch, ...]` from what the model returns, if that is not a tensor;
            or a pair of mean and variance, for a model that predicts its own noise.
        max_memory: bytes that the samples of one pass may take, beyond those in use before.
        progress: draw a bar on stderr.

    Returns:
        A `Prediction`: `samples [n, batch, ...]`, `mean`, `std`, `interval(0.9)`, `entropy`, `mutual_information`.

    Raises:
        StateError: the model is in training mode, or compiled code calls this: `torch.compile` cannot trace it.
        InputError: no dropout in the model, or none within reach; a rate outside [0, 1); too little memory for one
            sample; an output that is no tensor.

    Warns:
        SecateurWarning: noise that is out of reach; outputs that no dropout reaches, whose standard deviation is 0.

    >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)).eval()
    >>> p = sample(model, torch.randn(2, 4), n=20, seed=1)
    >>> p.samples.shape, p.std.shape, model.training
    (torch.Size([20, 2, 3]), torch.Size([2, 3]), False)
    """
    call = arguments(inputs)
    require_rest(model)
    _require(n, seed, max_memory)
    checks.flag("shared", shared)
    checks.flag("progress", progress)
    if output is not None:
        checks.function("output", output, "a function that takes the tensor out of what the model gives")
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    with undisturbed(), progress_bar("samples", n, shown=progress) as advance:
        run = Run(model, call, output, seed, shared, advance)
        plans = _PLANS.setdefault(model, {})
        key = (fingerprint(model), spec(call), identity(output), n, shared, max_memory, torch.get_num_threads())
        outputs: Outputs | None = None
        known = plans.get(key)  # another thread may clear them meanwhile
        if known is not None:
            run.plan = known
            with suppress(Unsuitable):  # something has changed that the key does not tell
                outputs = run.samples(n)
        if outputs is None:
            outputs = _first(run, n, max_memory)
            plans.clear()  # of another shape or state: the last one is enough
            plans[key] = run.plan
    for unreached in run.plan.found.unreached:
        warn(f"sample leaves noise out: {unreached}")
    prediction = Prediction(*outputs)
    _explain_zeros(prediction, run.plan.found)
    return prediction


def _first(run: Run, n: int, max_memory: int) -> Outputs:
    """Take the samples of a model that is seen for the first time, and find out how best to take more of them."""
    run.look()
    try:
        truth = joined([run.some("exact", [i]) for i in range(2)])
    except Unsuitable as error:
        raise InputError(f"no samples can be taken: {error}; its dropout must not depend on what is dropped") from error
    race = _Race(run, truth, n)
    race.enter("exact", 1)
    race.enter("alone", 1)
    room = _room(run, max_memory)
    for way in ("mapped", "folded"):
        chunk = min(2, room)
        while chunk > 1 and race.enter(way, _even(n, chunk)) and chunk < min(n, room):
            chunk = min(4 * chunk, n, room)
    run.plan.way, run.plan.chunk = race.winner()
    done = len(race.done[0])
    run.advance(done)
    return joined([race.done, run.samples(n, done)]) if done < n else race.done


def _even(n: int, chunk: int) -> int:
    """Samples a pass, if as many passes as `chunk` takes are equally large."""
    return math.ceil(n / math.ceil(n / chunk))


class _Race:
    """Ways of sampling tried one after the other, each checked against the same samples taken exactly."""

    def __init__(self, run: Run, truth: Outputs, n: int) -> None:
        self.done = truth
        """The first samples: as many as one of the tries has computed."""
        self._run, self._truth, self._n = run, truth, n
        self._seconds: dict[tuple[str, int], float] = {}
        """Of all n samples, for each way and number of samples a pass."""

    def enter(self, way: str, chunk: int) -> bool:
        """Try a way; True if it is worth trying with more samples a pass."""
        before = min(self._seconds.values(), default=math.inf)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.vmap, where it has no rule for an operator
                outputs = self._time(way, chunk)
        except InputError:
            raise
        except Exception:  # whatever a model says to shapes that it does not expect
            return False
        if way != "exact" and not _agree(outputs, self._truth):  # a model may be random by itself
            del self._seconds[way, chunk]
            return False
        if len(outputs[0]) > len(self.done[0]):
            self.done = outputs
        seconds = self._seconds[way, chunk]
        return seconds < 0.9 * before or seconds * chunk / self._n < _LONG

    def winner(self) -> tuple[str, int]:
        """The fastest way; those that are nearly as fast are timed once more."""
        fastest = min(self._seconds.values())
        near = [
            key
            for key, seconds in self._seconds.items()
            if seconds < 1.5 * fastest and seconds * key[1] / self._n < 5 * _LONG
        ]
        for way, chunk in near if len(near) > 1 else []:
            self._time(way, chunk)
        return min(self._seconds, key=lambda key: self._seconds[key])

    def _time(self, way: str, chunk: int) -> Outputs:
        """Take some samples, note the seconds that all take, with what comes before the first dropout."""
        replay = chunk < self._n and way != "exact"
        if replay:
            self._run.recorded()
        if way == "folded":
            self._run.made()
        samples = range(max(chunk, len(self._truth[0])))
        passes = [samples] if chunk > 1 else [range(i, i + 1) for i in samples]
        for _ in range(_TRIES):
            start = time.perf_counter()
            outputs = joined([self._run.some(way, one, replay=replay) for one in passes])
            spent = time.perf_counter() - start
            total = spent * self._n / len(samples) + (self._run.recording if replay else 0.0)
            self._seconds[way, chunk] = min(self._seconds.get((way, chunk), math.inf), total)
            if spent > _LONG:
                break
        return outputs


_TRIES = 3  # at most, of each way: the first call of an operator takes longer
_LONG = 0.02  # seconds after which one try is enough


def _agree(outputs: Outputs, truth: Outputs) -> bool:
    """Equal but for rounding, as other kernels run for other shapes: in each column far nearer than two samples are."""
    for output, exact in zip(outputs, truth, strict=True):
        if output.shape[1:] != exact.shape[1:] or output.dtype != exact.dtype:
            return False
        right = exact.double().reshape(2, -1, exact.shape[-1] if exact.ndim > 1 else 1)
        few = output[:2].double().reshape(right.shape)
        finite = right.isfinite()
        if not torch.equal(finite, few.isfinite()) or not torch.equal(
            few[~finite].nan_to_num(), right[~finite].nan_to_num()
        ):
            return False
        right, few = right.where(finite, 0.0), few.where(finite, 0.0)
        error, size = (few - right).abs(), right.abs()
        accuracy = torch.finfo(exact.dtype).eps * (256 if exact.dtype.itemsize >= 4 else 16)
        spread = (right[1] - right[0]).square().mean(0).sqrt()
        near = error.square().mean((0, 1)).sqrt() <= 0.02 * spread
        if bool((error.amax((0, 1)) > accuracy * size.amax((0, 1))).any()) or bool((~near & (spread > 0)).any()):
            return False
    return True


def _room(run: Run, max_memory: int) -> int:
    """How many samples a pass may have."""

    class OneSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model

        def forward(self) -> Outputs:
            try:
                return run.some("alone", [0])
            except Exception:  # not this way
                return run.some("exact", [0])

    with _PROFILER:
        busy = torch.autograd.profiler._is_profiler_enabled  # there can be one only, and it is somebody else's
        needed = None if busy else peak_bytes(OneSample(), ((), {}))
    if needed is None:  # of this device torch does not know, or cannot be asked
        return 2**20
    if needed > max_memory:
        raise InputError(
            f"max_memory is {max_memory:,} bytes, and one sample takes {needed:,}: give more, or fewer inputs at a time"
        )
    return max_memory // max(needed, 1)


def _require(n: int, seed: int | None, max_memory: int) -> None:
    checks.whole("n", n, 2)
    checks.whole("max_memory", max_memory, 1)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise checks.wrong("seed", seed, "a whole number, or None for a new one at each call")


def _explain_zeros(prediction: Prediction, found: Found) -> None:
    samples = prediction.samples
    same = (samples == samples[:1]).all(0)
    zeros = int(same.sum())
    if len(samples) == 1 or not zeros:
        return
    why = "they do not depend on any dropout that was found"
    if zeros < same.numel():
        why = (
            "they do not depend on dropout, or something after it hides what was dropped (a ReLU, rounding, padding), "
            "or in so few samples nothing was dropped that they depend on"
        )
    calls = ", ".join(sorted({f"{call.kind} in {call.path or 'the model'}" for call in found.calls})[:5])
    warn(f"the standard deviation of {zeros:,} of {same.numel():,} outputs is exactly 0: {why}; found: {calls}")
