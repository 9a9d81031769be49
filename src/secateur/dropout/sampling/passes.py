"""One model, its inputs and a seed: samples of it, in any way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.dropout.interception.discovery import Found, look
from secateur.dropout.interception.followers import Unsuitable
from secateur.dropout.interception.handlers import DropoutCall, Handler, handling
from secateur.dropout.interception.isolation import fresh, twin, written
from secateur.dropout.interception.listing import listed
from secateur.dropout.noise import require_rate
from secateur.dropout.sampling.generators import Streams
from secateur.dropout.sampling.prefix import Boundary, Prefix
from secateur.dropout.sampling.sampler import Sampler
from secateur.dropout.sampling.separation import Sized, separate
from secateur.dropout.sampling.strategies import Alone, Folded, Mapped, Outputs
from secateur.errors import InputError, InputTypeError
from secateur.support import checks
from secateur.support.inputs import Arguments
from secateur.support.tables import counted

WAYS = {"alone": Alone, "folded": Folded, "mapped": Mapped}
Output = Callable[[Any], Any]


@dataclass
class SamplingPlan:
    """How to take samples of one model for inputs of one shape.

    Attributes:
        found: the dropout calls.
        shapes: of the outputs.
        writes: the model writes into its inputs, so that each pass needs copies.
        way: a key of `WAYS`, or "exact": a full pass for each sample.
        chunk: samples a pass.
        made: the calls of a pass of one sample, for folded passes to be compared with.
    """

    found: Found
    calls: Sequence[DropoutCall]
    shapes: Sequence[torch.Size]
    writes: bool = False
    way: str = "exact"
    chunk: int = 1
    made: Sequence[Sized] | None = None


class Run:
    """A model, its inputs and a seed: computes samples in any way.

    Args:
        advance: is told how many samples have been taken.
    """

    plan: SamplingPlan

    def __init__(
        self,
        model: nn.Module,
        call: Arguments,
        output: Output | None,
        seed: int,
        shared: bool,
        advance: Callable[[float], None] = lambda done: None,
    ) -> None:
        self.model, self.call, self.output, self.seed, self.shared = model, call, output, seed, shared
        self.advance = advance
        self._prefix: Prefix | None = None
        self.recording = 0.0
        """Seconds that the recording of the prefix took."""

    def look(self) -> None:
        """Find the dropout calls, and the shapes of the outputs.

        Raises:
            InputError: there are none, or the model gives no tensor.
        """
        given = fresh(self.call)
        found, answer = look(self.model, given)
        writes = written(given, self.call)
        if not found.calls:
            raise InputError(_nothing(found))
        for one in found.calls:
            if one.rate is not None:
                require_rate(one.rate, f"the rate of {one.kind} in {one.path or 'the model'}")
        shapes = [output.shape for output in outputs_of(answer, self.output)]
        if not math.prod(shapes[0]):
            raise InputError(f"the model gives an output of shape {tuple(shapes[0])}, which is empty: give it inputs")
        self.plan = SamplingPlan(found, found.sequence, shapes, writes)
        if self.shared:
            self.plan.calls = _with_batch(self)

    def forward(self, handler: Handler, *, copies: bool = False) -> Outputs:
        """Run the model under a handler, if need be on copies of its inputs."""
        args, kwargs = fresh(self.call) if copies or self.plan.writes else self.call
        model = self.apart()
        with handling(handler):
            return outputs_of(model(*args, **kwargs), self.output)

    def apart(self) -> nn.Module:
        """Give the model or, if it writes into tensors that it holds, a fresh copy that shares its weights."""
        return twin(self.model, self.model.parameters()) if self.plan.found.writes else self.model

    def some(self, way: str, samples: Sequence[int], *, replay: bool = True) -> Outputs:
        """Compute a few samples in one pass: outputs `[samples, batch, ...]`.

        Raises:
            Unsuitable: the model cannot be sampled in this way.
        """
        streams = Streams(self.seed, samples)
        how = Alone(streams, exact=True) if way == "exact" else WAYS[way](streams)
        prefix = self.recorded() if replay and way != "exact" else None
        one = self.made() if way == "folded" else ()
        made: list[Sized] | None = [] if way == "folded" else None
        sampler = Sampler(how, self.plan.calls, prefix=prefix, shared=self.shared, made=made)
        outputs = how.run(lambda: self.forward(sampler, copies=way == "exact"), self.plan.shapes)
        if prefix is not None and not prefix.intact:
            self._prefix = None
        if made is not None and not separate(one, made, len(samples)):
            raise Unsuitable("samples that are folded into the batch do not stay apart")
        return outputs

    def made(self) -> Sequence[Sized]:
        """Give the calls that a pass of one sample makes; it is run if need be."""
        if self.plan.made is None:
            made: list[Sized] = []
            self.forward(Sampler(Alone(Streams(self.seed, [0])), self.plan.calls, shared=self.shared, made=made))
            self.plan.made = made
        return self.plan.made

    def samples(self, n: int, first: int = 0) -> Outputs:
        """Compute samples as planned, from `first` to `n`."""
        size = self.plan.chunk
        chunks = [range(i, i + size) for i in range(first, n, size)]  # the last too: other sizes were not tried
        pieces = []
        for chunk in chunks:
            outputs = self.some(self.plan.way, chunk, replay=len(chunks) > 1)
            pieces.append(tuple(output[: n - chunk.start] for output in outputs))
            self.advance(len(pieces[-1][0]))
        return joined(pieces)

    def recorded(self) -> Prefix:
        """Give what comes before the first dropout, to be played; it is computed if need be.

        Raises:
            Unsuitable: the model meets no dropout now.
        """
        if self._prefix is None:
            self._prefix, start = Prefix(), time.perf_counter()
            with suppress(Boundary):
                self.forward(Sampler(Alone(Streams(self.seed, [0])), self.plan.calls, prefix=self._prefix))
            self.recording = time.perf_counter() - start
            if not self._prefix.closed:
                raise Unsuitable("no dropout is met")
        self._prefix.rewind()
        return self._prefix


def joined(pieces: Sequence[Outputs]) -> Outputs:
    """Join samples that were computed in several passes."""
    return pieces[0] if len(pieces) == 1 else tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _with_batch(run: Run) -> Sequence[DropoutCall]:
    """Find the dimensions of each dropout call that grow with the batch: twice as large for twice the inputs.

    Raises:
        InputError: they cannot be told, or masks that repeat along them do not treat equal elements of a batch alike.
    """
    shape, calls = run.plan.shapes[0], run.plan.calls
    tensors = [leaf for leaf in tree_leaves(run.call) if isinstance(leaf, Tensor)]
    for axis in range(2):
        batch = next((t.shape[axis] for t in tensors if t.ndim > axis), 0)

        def each(change: Callable[[Tensor], Tensor], axis: int = axis, batch: int = batch) -> Arguments:
            def changed(leaf: Any) -> Any:
                fits = isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == batch
                return change(leaf) if fits else leaf

            found: Arguments = tree_map(changed, fresh(run.call))
            return found

        alike = Run(run.model, each(partial(_first_of_all, axis=axis)), run.output, run.seed, shared=True)
        try:
            lister, answer = listed(run.apart(), each(partial(_twice, axis=axis)))
            if outputs_of(answer, run.output)[0].shape != (2 * shape[0], *shape[1:]) or len(lister.calls) != len(calls):
                continue
            pairs = zip(calls, lister.calls, strict=True)
            found = [replace(call, repeats=_grown(call.shape, large.shape, batch)) for call, (large, _) in pairs]
            alike.plan = replace(run.plan, calls=found)
            outputs, *_ = joined([alike.some("exact", [i]) for i in range(_TRIED)])
        except Exception:  # the model takes no such inputs
            continue
        rows = outputs.double().nan_to_num()
        if torch.allclose(rows, rows[:, :1].expand_as(rows), rtol=1e-3, atol=1e-3 * float(rows.abs().max())):
            return found
    raise InputError(
        "shared=True needs to know where the batch is in each dropout call: in this model twice the inputs (along "
        "their first or second dimension) do not give twice the output, or it mixes the batch with other dimensions "
        "(packed sequences, time and batch flattened together); take samples with shared=False, or of padded sequences"
    )


_TRIED = 4  # samples: small masks may be equal by chance


def _twice(tensor: Tensor, axis: int) -> Tensor:
    return torch.cat([tensor, tensor], axis)


def _first_of_all(tensor: Tensor, axis: int) -> Tensor:
    return tensor.narrow(axis, 0, 1).expand_as(tensor).clone()


def _grown(small: torch.Size, large: torch.Size, batch: int) -> tuple[int, ...]:
    if len(small) != len(large):
        raise Unsuitable("a dropout call whose number of dimensions depends on the batch")
    return tuple(batch if b == 2 * a else 1 for a, b in zip(small, large, strict=True))


def outputs_of(answer: Any, output: Output | None) -> Outputs:
    """The tensor, or the pair of mean and variance, that samples are taken of."""
    found = answer if output is None else output(answer)
    pair = output is not None and isinstance(found, tuple) and len(found) == 2
    tensors: Outputs = found if pair else (found,)
    if all(isinstance(tensor, Tensor) for tensor in tensors):
        for tensor in tensors:
            if not tensor.dtype.is_floating_point:
                raise InputTypeError(
                    f"the output is {tensor.dtype}: samples are taken of floating-point numbers, so let output= give "
                    "what it was made of, logits rather than classes"
                )
        return tensors
    if output is not None:
        raise InputTypeError(
            f"output= gave {checks.kind(found)}: it must give a tensor, or a tuple of mean and variance"
        )
    holds = ", ".join(map(str, found)) if isinstance(found, Mapping) else ""
    raise InputError(
        f"the model returns {checks.kind(found)}{f' of {holds}' if holds else ''}, not a tensor: say what to take "
        "of it, such as output=lambda out: out" + (f"[{next(iter(found))!r}]" if holds else "[0]")
    )


def _nothing(found: Found) -> str:
    lost = "".join(f"; out of reach is {one}" for one in found.unreached)
    off = (
        f" ({counted(found.off, 'call drops', 'calls drop')} nothing: rate 0, or off in training too)"
        if found.off
        else ""
    )
    return (
        f"the model makes no dropout call{off}{lost}: there is no dropout to take samples of; "
        "train it with nn.Dropout, or with sc.dropout.concrete(model, n_data=...), which learns the rates"
    )
