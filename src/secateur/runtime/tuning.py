"""Times dense and sparse layers on what they are given in the model, with weights out of the cache.

The model runs once, and then its layers, one after the other: passes alternate, dense, sparse, sparse, dense, and every
layer takes its own time meanwhile. What looks faster must be so again in a second, independent measurement.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from secateur.measurement.costs import devices
from secateur.measurement.timing import evaluating, interval, quantile, time_blocks
from secateur.runtime import native, products
from secateur.runtime.kernel_plans import Gain, Timing
from secateur.runtime.networks import SparseNetwork
from secateur.runtime.packed_layers import PackedLayers
from secateur.runtime.swapping import Sparse
from secateur.support import bits
from secateur.support.inputs import Arguments
from secateur.support.machine import cpu_name

_MARGIN = 1.05  # sparse must win by so much, twice
_SECONDS = 1.0  # of a measurement, of which there are two for each example
_ROUNDS = range(4, 10)  # of four passes each; at least, at most
_TOGETHER = 0.1  # seconds of a dense pass from which on further layers are timed apart
_CACHE_BYTES = 48 << 20  # streamed through the cache before each pass
_GAIN = ((0.2, 3), (1.0, 6))
"""Seconds of each of the two models compared in the end, and blocks at least; the latter if the first cannot tell."""
cpu = functools.cache(cpu_name)
_CACHE: dict[tuple[Any, ...], Timing] = {}
Tried = Sparse | PackedLayers | SparseNetwork
"""What is timed: a layer dense or sparse, a run or a network singly or as one call."""
Seen = dict[str, set[int]]
"""Row classes that an example led to each layer, by the name of the layer."""


class Recorder:
    """Stands before the forward of a layer and times it, dense or sparse; of a run or network, singly or as one."""

    def __init__(self, name: str, layer: Tried) -> None:
        self.name, self.layer = name, layer
        self.mode = "dense"
        self.seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.clock = _clock(layer)
        self.inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] | None = None
        """The first input of each row class, while these are collected."""

    @property
    def modes(self) -> tuple[str, ...]:
        """What can be timed of it."""
        return ("dense", "sparse", "generated") if self.layer.has_code else ("dense", "sparse")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        sparse = self.mode in ("sparse", "generated")
        kind: Any = type(layer) if sparse else layer.plain
        layer.choose(products.ALL if sparse else 0, products.ALL if self.mode == "generated" else 0)
        if self.mode == "look":
            layer.observe(*args, **kwargs)
        start = self.clock()
        out = kind.forward(layer, *args, **kwargs)
        spent = self.clock() - start
        bucket = products.bucket(layer.rows(*args, **kwargs))
        self.seconds[self.mode, bucket].append(spent)
        if self.inputs is not None:
            self.inputs.setdefault(bucket, (args, kwargs))
        return out


Given = list[tuple[Recorder, tuple[Any, ...], dict[str, Any]]]
"""Inputs of layers."""


@contextmanager
def recording(layers: Mapping[str, Tried]) -> Iterator[list[Recorder]]:
    """Put a recorder before each layer; they and the choices go at the end."""
    recorders = [Recorder(name, layer) for name, layer in layers.items()]
    try:
        for recorder in recorders:
            recorder.layer.__dict__["forward"] = recorder
        yield recorders
    finally:
        for recorder in recorders:
            recorder.layer.__dict__.pop("forward", None)
            recorder.layer.choose(0)


def look(model: nn.Module, recorders: Sequence[Recorder], call: Arguments) -> Seen:
    """Run an example once, dense: which layers it reaches, with how many rows."""
    _run(model, recorders, call, "look")
    seen = {r.name: {bucket for _, bucket in r.seconds} for r in recorders if r.seconds}
    _forget(recorders)
    return seen


def times(model: nn.Module, given: Given) -> dict[tuple[str, int], tuple[float, ...]]:
    """Median seconds of each layer and row class, on these inputs: dense, sparse and, if it has some, by its code."""
    recorders = list({id(recorder): recorder for recorder, *_ in given}.values())
    modes = max((r.modes for r in recorders), key=len, default=())
    for mode in modes:  # the first pass of each is not counted
        _replay(given, mode)
    _forget(recorders)
    streams = [torch.zeros(_CACHE_BYTES // 4, device=device) for device in devices(model)]
    start = time.perf_counter()
    for i in range(_ROUNDS.stop):
        if i >= _ROUNDS.start and time.perf_counter() - start > _SECONDS:
            break
        first = i % len(given)  # each has its turn, as the first one waits for all code that has left the cache
        for mode in (*modes, *reversed(modes)):
            for stream in streams:
                stream.add_(1)
            _replay(given[first:] + given[:first], mode)
    found = {
        (r.name, b): tuple(median(r.seconds[mode, b]) for mode in r.modes)
        for r in recorders
        for b in {b for _, b in r.seconds}
        if all((mode, b) in r.seconds for mode in r.modes)
    }
    _forget(recorders)
    return found


def choose(
    model: nn.Module, recorders: Sequence[Recorder], call: Arguments, seen: Seen, patterns: Mapping[str, str]
) -> Iterator[tuple[str, Timing]]:
    """Time what an example reaches and choose: from memory where the same was measured before in this process.

    Yields:
        The name of a layer and what was chosen for a row class of it, once it is known: an interrupt loses the rest.
    """
    keys = {(r.name, b): _key(r.layer, patterns[r.name], b) for r in recorders for b in seen.get(r.name, ())}
    for (name, _), key in keys.items():
        if key in _CACHE:
            yield name, _CACHE[key]
    unknown = {place for place, key in keys.items() if key not in _CACHE}
    for group in groups(model, recorders, call, unknown) if unknown else ():
        for (name, bucket), timing in _choose(model, group):
            _CACHE[keys[name, bucket]] = timing
            yield name, timing


def _choose(model: nn.Module, given: Given) -> Iterator[tuple[tuple[str, int], Timing]]:
    """Time some layers together and choose, by name and row class: what is faster must be so twice."""
    first = times(model, given)
    second = times(model, given) if any(map(_wins, first.values())) else first
    for place in [place for place in first if place in second]:
        both = first[place], second[place]
        dense, sparse, *code = ((a + b) / 2 for a, b in zip(*both, strict=True))
        won = all(map(_wins, both))
        generated = won and bool(code) and all(seconds[2] < seconds[1] for seconds in both)
        yield place, Timing(place[1], dense, sparse, won, code[0] if code else None, generated)


def gain(plain: nn.Module, fast: nn.Module, call: Arguments) -> Gain:
    """How much faster the whole model is than the plain one: blocks of calls in turn, in steady state."""
    models = {"plain": plain, "fast": fast}
    with evaluating(models, torch.get_num_threads()):
        for seconds, fewest in _GAIN:
            blocks, _ = time_blocks(models, call, seconds, fewest)
            ratios = [a / b for a, b in zip(blocks["plain"], blocks["fast"], strict=True)]
            found = Gain(quantile(ratios, 0.5), *interval(ratios))
            if found.clear:
                break
    return found


def gpus(model: nn.Module) -> str:
    """Names of the CUDA devices that a model is on; empty if there are none."""
    return " + ".join(sorted({torch.cuda.get_device_name(one) for one in devices(model) if one.type == "cuda"}))


def pattern(weights: Sequence[Tensor], values: torch.dtype = torch.float32, words: str = "") -> str:
    """Hash of where the zeros of some weights are, of what the others are rounded to, and of further words."""
    digest = hashlib.blake2b(b"" if values is torch.float32 else str(values).encode(), digest_size=16)
    digest.update(words.encode())
    for weight in weights:
        exact = weight.dtype is torch.float32
        digest.update(f"{tuple(weight.shape)}{'' if exact else weight.dtype}".encode())
        digest.update(bits.pack(weight.detach().bool()).cpu().numpy().tobytes())
    return digest.hexdigest()


def _key(layer: Tried, hashed: str, bucket: int) -> tuple[Any, ...]:
    machine = cpu(), native.isa(), torch.get_num_threads(), gpus(layer) if isinstance(layer, Sparse) else ""
    return *machine, type(layer).__name__, repr(layer), layer.has_code, hashed, bucket


def _clock(layer: Tried) -> Callable[[], float]:
    """Seconds; on a CUDA device once all that it was told is done."""
    if not isinstance(layer, Sparse) or layer.device == "cpu":
        return time.perf_counter
    from torch.utils.benchmark import timer

    return timer


def _wins(seconds: tuple[float, ...]) -> bool:
    return seconds[0] > _MARGIN * min(seconds[1:])


def groups(
    model: nn.Module, recorders: Sequence[Recorder], call: Arguments, wanted: Collection[tuple[str, int]]
) -> list[Given]:
    """What layers are given in the model, once for each row class that is wanted of them.

    Those of a group are timed together, so that fast ones take no longer than need be, and slow ones are soon known.
    """
    for recorder in recorders:
        recorder.inputs = {}
    _run(model, recorders, call, "dense")
    found: list[Given] = []
    seconds = _TOGETHER
    for r in recorders:
        for bucket, given in (r.inputs or {}).items():
            if (r.name, bucket) in wanted:
                if seconds >= _TOGETHER:
                    found.append([])
                    seconds = 0.0
                found[-1].append((r, *given))
                seconds += r.seconds["dense", bucket][0]
    for recorder in recorders:
        recorder.inputs = None
    _forget(recorders)
    return found


def _replay(given: Given, mode: str) -> None:
    for recorder, args, kwargs in given:
        recorder.mode = "sparse" if mode == "generated" and not recorder.layer.has_code else mode
        recorder(*args, **kwargs)


def _run(model: nn.Module, recorders: Sequence[Recorder], call: Arguments, mode: str) -> None:
    for recorder in recorders:
        recorder.mode = mode
    model(*call[0], **call[1])


def _forget(recorders: Sequence[Recorder]) -> None:
    for recorder in recorders:
        recorder.seconds.clear()
