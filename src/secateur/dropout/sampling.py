"""Monte-Carlo dropout: many samples of a model's output, of one pass or few, on a model that stays in `eval()`."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.costs import Call as Arguments
from secateur.costs import peak_bytes
from secateur.dropout.calls import Call, Sampler, handling
from secateur.dropout.noise import require_rate
from secateur.dropout.prefix import Boundary, Prefix, Unsuitable
from secateur.dropout.search import Found, at_rest, listed, look, require_rest
from secateur.dropout.streams import Streams
from secateur.dropout.uncertainty import Prediction
from secateur.dropout.ways import Alone, Folded, Mapped, Outputs
from secateur.errors import InputError, InputTypeError, warn
from secateur.measurement import arguments

__all__ = ["sample"]

WAYS = {"alone": Alone, "folded": Folded, "mapped": Mapped}
Output = Callable[[Any], Any]


@dataclass
class Plan:
    """How to take samples of one model for inputs of one shape.

    Attributes:
        found: the dropout calls.
        shapes: of the outputs.
        way: a key of `WAYS`, or "exact": a full pass for each sample.
        chunk: samples a pass.
    """

    found: Found
    calls: Sequence[Call]
    shapes: Sequence[torch.Size]
    way: str = "exact"
    chunk: int = 1


_PLANS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()


def sample(
    model: nn.Module,
    inputs: Any,
    *,
    n: int = 50,
    seed: int | None = 0,
    shared: bool = False,
    output: Output | None = None,
    max_memory: int = 2**30,
) -> Prediction:
    """Take samples of what a model answers with its dropout switched on: Monte-Carlo dropout (Gal & Ghahramani 2016).

    The model stays as it is, in `eval()`: normalisation is frozen, and nothing is patched. What comes before the first
    dropout is computed once. How samples are computed (mapped by vmap, folded into the batch, one by one) is found by
    trying, at the first call for a model and a shape of inputs, and each way is checked against plain passes.

    Args:
        model: in `eval()`.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        n: samples. The error of the standard deviation is about 24 % with 10, 10 % with 50, 5 % with 200.
        seed: the masks of sample i follow from the seed and i alone: the first 20 of 50 are the 20. None: another seed
            at each call, from torch's global generator.
        shared: one mask for the whole batch, that is one sub-network a sample, instead of one for each of its elements.
            The batch is the dimension of the inputs that is the first of the output.
        output: takes the tensor `[batch, ...]` out of what the model gives, if that is not a tensor; or a pair of mean
            and variance, for a model that predicts its own noise.
        max_memory: bytes that the samples of one pass may take above the start.

    Returns:
        A `Prediction`: `samples [n, batch, ...]`, `mean`, `std`, `interval(0.9)`, `entropy`, `mutual_information`.

    Raises:
        StateError: the model is in training mode.
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
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    with at_rest():
        run = _Run(model, call, output, seed, shared)
        plans = _PLANS.setdefault(model, {})
        chosen = getattr(output, "__code__", type(output))  # a lambda is a new one at each call
        key = (_fingerprint(model), _spec(call), chosen, n, shared, max_memory, torch.get_num_threads())
        if key in plans:
            run.plan = plans[key]
            outputs = run.samples(n)
        else:
            outputs = _first(run, n, max_memory)
            plans.clear()  # of another shape or state: the last one is enough
            plans[key] = run.plan
    for unreached in run.plan.found.unreached:
        warn(f"sample leaves noise out: {unreached}")
    prediction = Prediction(*outputs)
    _explain_zeros(prediction, run.plan.found)
    return prediction


class _Run:
    """A model, its inputs and a seed: computes samples in any way."""

    plan: Plan

    def __init__(self, model: nn.Module, call: Arguments, output: Output | None, seed: int, shared: bool) -> None:
        self.model, self.call, self.output, self.seed, self.shared = model, call, output, seed, shared
        self._prefix: Prefix | None = None

    def look(self) -> None:
        """Find the dropout calls, and the shapes of the outputs.

        Raises:
            InputError: there are none, or the model gives no tensor.
        """
        found, answer = look(self.model, self.call)
        if not found.calls:
            raise InputError(_nothing(found))
        for one in found.calls:
            if one.rate is not None:
                require_rate(one.rate, f"the rate of {one.kind} in {one.path or 'the model'}")
        shapes = [output.shape for output in _outputs(answer, self.output)]
        calls = _with_batch(self, found.sequence, shapes[0]) if self.shared else found.sequence
        self.plan = Plan(found, calls, shapes)

    def forward(self, sampler: Sampler) -> Outputs:
        """Run the model under a handler."""
        with handling(sampler):
            return _outputs(self.model(*self.call[0], **self.call[1]), self.output)

    def some(self, way: str, samples: Sequence[int], *, replay: bool = True) -> Outputs:
        """Compute a few samples in one pass: outputs `[samples, batch, ...]`.

        Raises:
            Unsuitable: the model cannot be sampled in this way.
        """
        streams = Streams(self.seed, samples)
        how = Alone(streams, exact=True) if way == "exact" else WAYS[way](streams)
        prefix = self._recorded() if replay and way != "exact" else None
        sampler = Sampler(how, self.plan.calls, prefix=prefix, shared=self.shared)
        outputs = how.run(lambda: self.forward(sampler), self.plan.shapes)
        if prefix is not None and not prefix.intact:
            self._prefix = None
        return outputs

    def samples(self, n: int, first: int = 0) -> Outputs:
        """Compute samples as planned, from `first` to `n`."""
        chunks = [range(i, min(i + self.plan.chunk, n)) for i in range(first, n, self.plan.chunk)]
        pieces = [self.some(self.plan.way, chunk, replay=len(chunks) > 1) for chunk in chunks]
        return _joined(pieces)

    def _recorded(self) -> Prefix:
        if self._prefix is None:
            self._prefix = Prefix()
            with suppress(Boundary):
                self.forward(Sampler(Alone(Streams(self.seed, [0])), self.plan.calls, prefix=self._prefix))
            if not self._prefix.closed:
                raise Unsuitable("no dropout is met")
        self._prefix.rewind()
        return self._prefix


def _first(run: _Run, n: int, max_memory: int) -> Outputs:
    """Take the samples of a model that is seen for the first time, and find out how best to take more of them."""
    run.look()
    try:
        truth = _joined([run.some("exact", [i]) for i in range(2)])
    except Unsuitable as error:
        raise InputError(f"no samples can be taken: {error}; its dropout must not depend on what is dropped") from error
    race = _Race(run, truth)
    race.enter("exact", 1)
    race.enter("alone", 1)
    room = _room(run, max_memory)
    for way in ("mapped", "folded"):
        chunk = min(2, room)
        while chunk > 1 and race.enter(way, chunk) and chunk < min(n, room):
            chunk = min(4 * chunk, n, room)
    run.plan.way, run.plan.chunk = race.winner()
    return _joined([race.done, run.samples(n, len(race.done[0]))]) if len(race.done[0]) < n else race.done


class _Race:
    """Ways of sampling tried one after the other, each checked against the same samples taken exactly."""

    def __init__(self, run: _Run, truth: Outputs) -> None:
        self.done = truth
        """The first samples: as many as one of the tries has computed."""
        self._run, self._truth = run, truth
        self._seconds: dict[tuple[str, int], float] = {}
        """Of one sample, for each way and number of samples a pass."""

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
        if not _agree(outputs, self._truth):
            del self._seconds[way, chunk]
            return False
        if len(outputs[0]) > len(self.done[0]):
            self.done = outputs
        seconds = self._seconds[way, chunk]
        return seconds < 0.9 * before or seconds * chunk < _LONG

    def winner(self) -> tuple[str, int]:
        """The fastest way; those that are nearly as fast are timed once more."""
        fastest = min(self._seconds.values())
        near = [
            key for key, seconds in self._seconds.items() if seconds < 1.5 * fastest and seconds * key[1] < 5 * _LONG
        ]
        for way, chunk in near if len(near) > 1 else []:
            self._time(way, chunk)
        return min(self._seconds, key=lambda key: self._seconds[key])

    def _time(self, way: str, chunk: int) -> Outputs:
        """Take samples, note the seconds of one."""
        samples = range(max(chunk, len(self._truth[0])))
        passes = [samples] if chunk > 1 else [range(i, i + 1) for i in samples]
        for _ in range(_TRIES):
            start = time.perf_counter()
            outputs = _joined([self._run.some(way, one, replay=chunk == 1) for one in passes])
            spent = time.perf_counter() - start
            self._seconds[way, chunk] = min(self._seconds.get((way, chunk), math.inf), spent / len(samples))
            if spent > _LONG:
                break
        return outputs


_TRIES = 3  # at most, of each way: the first call of an operator takes longer
_LONG = 0.02  # seconds after which one try is enough


def _agree(outputs: Outputs, truth: Outputs) -> bool:
    """Equal but for rounding: other kernels run for other shapes."""
    for output, exact in zip(outputs, truth, strict=True):
        few = output[: len(exact)].double()
        accuracy = torch.finfo(exact.dtype).eps * (256 if exact.dtype.itemsize >= 4 else 16)
        if output.shape[1:] != exact.shape[1:] or output.dtype != exact.dtype:
            return False
        if not torch.allclose(few, exact.double(), rtol=0, atol=accuracy * float(exact.abs().max()), equal_nan=True):
            return False
    return True


def _joined(pieces: Sequence[Outputs]) -> Outputs:
    return pieces[0] if len(pieces) == 1 else tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _room(run: _Run, max_memory: int) -> int:
    """How many samples a pass may have."""

    class OneSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model

        def forward(self) -> Outputs:
            try:
                return run.some("alone", [0])
            except Unsuitable:
                return run.some("exact", [0])

    needed = peak_bytes(OneSample(), ((), {}))
    if needed is None:  # of this device torch does not know
        return 2**20
    if needed > max_memory:
        raise InputError(
            f"max_memory is {max_memory:,} bytes, and one sample takes {needed:,}: give more, or fewer inputs at a time"
        )
    return max_memory // max(needed, 1)


def _with_batch(run: _Run, calls: Sequence[Call], shape: torch.Size) -> Sequence[Call]:
    """Find the dimensions of each dropout call that grow with the batch: twice as large for twice the inputs."""
    tensors = [leaf for leaf in tree_leaves(run.call) if isinstance(leaf, Tensor)]
    for axis in range(2):
        sizes = {t.shape[axis] for t in tensors if t.ndim > axis}
        batch = next(iter(sizes), 0)

        def twice(leaf: Any, axis: int = axis, batch: int = batch) -> Any:
            fits = isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == batch
            return torch.cat([leaf, leaf], axis) if fits else leaf

        try:
            lister, answer = listed(run.model, tree_map(twice, run.call))
            first = _outputs(answer, run.output)[0].shape
        except Exception:
            continue
        if first == (2 * shape[0], *shape[1:]) and len(lister.calls) == len(calls):
            grown = [call.shape for call, _ in lister.calls]
            repeats = (
                tuple(batch if large == 2 * small else 1 for large, small in zip(new, call.shape, strict=True))
                for new, call in zip(grown, calls, strict=True)
            )
            return [replace(call, repeats=found) for call, found in zip(calls, repeats, strict=True)]
    raise InputError(
        "shared=True needs to know the batch: no dimension of the inputs is the first of the output, "
        "so that twice the inputs give twice the outputs; arrange them so with output="
    )


def _outputs(answer: Any, output: Output | None) -> Outputs:
    """The tensor, or the pair of mean and variance, that samples are taken of."""
    found = answer if output is None else output(answer)
    if isinstance(found, Tensor):
        return (found,)
    if (
        output is not None
        and isinstance(found, tuple)
        and len(found) == 2
        and all(isinstance(t, Tensor) for t in found)
    ):
        return found
    if output is not None:
        raise InputTypeError(
            f"output= gave a {type(found).__name__}: it must give a tensor, or a tuple of mean and variance"
        )
    holds = ", ".join(map(str, found)) if isinstance(found, Mapping) else ""
    raise InputError(
        f"the model gives a {type(found).__name__}{f' of {holds}' if holds else ''} and no tensor: say what to take of "
        "it, such as output=lambda out: out" + (f"[{next(iter(found))!r}]" if holds else "[0]")
    )


def _nothing(found: Found) -> str:
    lost = "".join(f"; out of reach is {one}" for one in found.unreached)
    off = f" ({found.off} calls drop nothing: their rate is 0, or they are off in training too)" if found.off else ""
    return (
        f"the model has no dropout to take samples of{off}{lost}; "
        "train it with nn.Dropout, or with sc.dropout.concrete(model, n_data=...), which learns the rates"
    )


def _require(n: int, seed: int | None, max_memory: int) -> None:
    for name, value, least in (("n", n, 2), ("max_memory", max_memory, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputTypeError(f"{name} is {value!r}: give a whole number")
        if value < least:
            raise InputError(f"{name} is {value}: give {least} or more")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputTypeError(f"seed is {seed!r}: give a whole number, or None for a new one at each call")
    if seed is None and torch.compiler.is_compiling():
        raise InputError("seed=None under torch.compile would be one seed for all calls: give a seed")


def _explain_zeros(prediction: Prediction, found: Found) -> None:
    samples = prediction.samples
    same = (samples == samples[:1]).all(0)
    zeros = int(same.sum())
    if len(samples) == 1 or not zeros:
        return
    why = (
        "none of the dropout that was found has a way to them"
        if zeros == same.numel()
        else "no dropout has a way to them, or it is cut off on it (by ReLU, by rounding, by padding)"
    )
    calls = ", ".join(sorted({f"{call.kind} in {call.path or 'the model'}" for call in found.calls})[:5])
    warn(f"the standard deviation of {zeros:,} of {same.numel():,} outputs is exactly 0: {why}; found: {calls}")


def _spec(call: Arguments) -> Any:
    """What a plan depends on of the inputs."""
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x) for x in tree_leaves(call))


def _fingerprint(model: nn.Module) -> int:
    """What a plan depends on of the model: modules and hooks, and the plain values that these and their config hold."""
    seen: set[int] = set()
    found: list[Any] = []
    queue: list[Any] = [module for _, module in model.named_modules()]
    for thing in queue:
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        found.append((id(thing), type(thing)))
        for name, value in vars(thing).items():
            if isinstance(value, (bool, int, float, str, type(None))):
                found.append((name, value))
            elif name in ("_forward_hooks", "_forward_pre_hooks"):
                queue.extend(hook for hook in value.values() if hasattr(hook, "__dict__"))
            elif name == "config":
                queue.append(value)
    return hash(tuple(found))
