"""Honest measurement: how fast, how large and how sparse models really are.

Blocks of calls of all models are timed in turn within one process, A B then B A, so that other work on the machine
slows all of them alike. First call and warm-up are in no reported time, and a difference is claimed only where the
intervals show it.
"""

from __future__ import annotations

import math
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from secateur.computed_weights import weights_by_name
from secateur.errors import InputError, InputTypeError
from secateur.measurement.costs import (
    devices,
    file_bytes,
    is_plain,
    join,
    macs,
    peak_bytes,
    weight_facts,
)
from secateur.support import bits, checks
from secateur.support.inputs import Arguments, arguments
from secateur.support.tables import Printed, Table, number, percent, size

__all__ = ["Comparison", "Measurement", "compare", "measure"]

_BLOCKS = 50  # the time is cut into about as many blocks, so that a stall of the machine spoils few of them
_FEWEST = 6  # blocks whose smallest and largest enclose the median in 95 % of cases
_LONG = 0.2  # seconds of a call that needs no warm-up: to fill a cache again takes a few hundredths of them
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # quantile 0.975 for a mean of so many values
NO_DIFFERENCE = 0.1
"""Models count as equally fast if the whole interval of their speed ratio differs from 1 by less than this."""

_Pair = tuple[float, float]


@dataclass(frozen=True)
class Measurement(Printed):
    """What one model costs; `str()` is a table.

    Attributes:
        block_seconds: seconds per call, one entry a block of `calls` calls, in the order they were run.
        calls: calls in a block.
        first_call_seconds: the first call, which is in no other time.
        threads: CPU threads that torch was given.
        device: devices of parameters and buffers, joined by "+".
        dtype: dtypes of the floating-point parameters, joined by "+".
        parameters: how many weights; tied ones count once. None if some are no plain tensors: quantized, sparse,
            packed by a library, or constants of a frozen script.
        nonzeros: how many of them are not zero. None if `parameters` is.
        denormals: how many are subnormal, which makes products up to a hundred times slower on many CPUs.
        flushed: whether the computing threads take subnormals for zero (`torch.set_flush_denormal`).
        macs: multiply-accumulates of a call in matrix products, convolutions and attention, recurrent
            layers included: FLOPs of `torch.utils.flop_counter` / 2. Elementwise work and `nn.Bilinear` are
            not counted. None after a quantized or custom operator, of which torch cannot tell.
        zero_macs: those of the MACs that meet a zero weight: a parameter, a buffer, or what is computed from
            these alone. None if `macs` is.
        file_bytes: size of the state_dict as a dense .safetensors file, tied tensors once. None if `parameters` is,
            as such a file cannot hold these weights.
        peak_bytes: the most that torch's allocator held above the start of a call, output included; weights,
            inputs and what kernel libraries allocate by themselves are not in it. None except on CPU and CUDA.
        metric: what the given `metric` returned, or None.
    """

    block_seconds: tuple[float, ...]
    calls: int
    first_call_seconds: float
    threads: int
    device: str
    dtype: str
    parameters: int | None
    nonzeros: int | None
    denormals: int
    flushed: bool
    macs: int | None
    zero_macs: int | None
    file_bytes: int | None
    peak_bytes: int | None
    metric: float | None = None

    @property
    def seconds(self) -> float:
        """Median seconds of a call."""
        return quantile(self.block_seconds, 0.5)

    @property
    def quartile_seconds(self) -> _Pair:
        """First and third quartile of the seconds of a call."""
        return quantile(self.block_seconds, 0.25), quantile(self.block_seconds, 0.75)

    @property
    def interval_seconds(self) -> _Pair:
        """95 % interval of the median: two order statistics, whatever the distribution."""
        return interval(self.block_seconds)

    @property
    def zero_share(self) -> float:
        """Share of the MACs that meets a zero weight; 0 where there are none or torch cannot tell."""
        return (self.zero_macs or 0) / (self.macs or 1)

    @property
    def trusted(self) -> bool:
        """False if subnormal weights may have slowed the calls: then the time is not the model's speed."""
        return not self.denormals or self.flushed or "cpu" not in self.device

    def to_dict(self) -> dict[str, Any]:
        """All fields, and what follows from them, as plain data for JSON."""
        derived = ("seconds", "quartile_seconds", "interval_seconds", "zero_share", "trusted")
        data = {**vars(self), **{name: getattr(self, name) for name in derived}}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def table(self) -> Table:
        """One row a quantity."""
        return _table({"model": self})


@dataclass(frozen=True)
class Comparison(Printed):
    """Models measured side by side, the first of them the baseline; `str()` is a table.

    Attributes:
        measurements: one `Measurement` a model; the i-th blocks of all models were run in the same round.
    """

    measurements: Mapping[str, Measurement]

    @property
    def baseline(self) -> str:
        """The name of the first model."""
        return next(iter(self.measurements))

    @property
    def others(self) -> list[str]:
        """The names of all models but the first."""
        return list(self.measurements)[1:]

    def speedup(self, name: str) -> tuple[float, _Pair]:
        """How many times faster than the baseline: median over the rounds, and its 95 % interval."""
        base, model = self.measurements[self.baseline], self.measurements[name]
        ratios = [b / m for b, m in zip(base.block_seconds, model.block_seconds, strict=True)]
        return quantile(ratios, 0.5), interval(ratios)

    def verdict(self, name: str) -> str:
        """Say "1.85x faster", "1.30x slower", "no difference", "cannot tell" or "no verdict".

        A difference is one that both intervals show: that of the ratio leaves out 1, and those of the two
        times do not overlap. There is none if the interval of the ratio lies within a tenth of 1. In between nobody
        can tell, as the times vary too much: measure longer (`seconds=`), or when the machine is less busy. There is
        no verdict on times that subnormal weights may have spoiled.
        """
        base, model = self.measurements[self.baseline], self.measurements[name]
        if not (base.trusted and model.trusted):
            return "no verdict"
        ratio, (least, most) = self.speedup(name)
        if least > 1 and model.interval_seconds[1] < base.interval_seconds[0]:
            return f"{ratio:.2f}x faster"
        if most < 1 and base.interval_seconds[1] < model.interval_seconds[0]:
            return f"{1 / ratio:.2f}x slower"
        return "no difference" if least >= 1 - NO_DIFFERENCE and most <= 1 + NO_DIFFERENCE else "cannot tell"

    @property
    def summary(self) -> str:
        """One line for each model but the baseline: what was gained, in words."""
        return "\n".join(f"{name}: {self._gain(name)}" for name in self.others)

    def _gain(self, name: str) -> str:
        base, model = self.measurements[self.baseline], self.measurements[name]
        verdict, (least, most) = self.verdict(name), self.speedup(name)[1]
        unclear = f"cannot tell ({least:.2f}x to {most:.2f}x): the machine is busy, so measure longer (seconds=)"
        words = {"no difference": "no faster", "cannot tell": unclear, "no verdict": "speed unknown (subnormals)"}
        parts = [words.get(verdict, verdict)]
        if most > 2 * least and parts[0] == verdict:
            parts[0] += f" (a rough figure, {least:.2f}x to {most:.2f}x: the machine is busy)"
        if ("slower" in verdict or verdict == "no difference") and model.zero_share > base.zero_share:
            share = percent(model.zero_share)
            parts[0] += f" although {share} of its MACs meet a zero weight (dense kernels do not skip zeros)"
        if base.file_bytes and model.file_bytes:
            ratio = base.file_bytes / model.file_bytes
            change = f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x larger"
            parts.append(f"{'same size' if abs(ratio - 1) < 0.005 else change} as a dense file")
        if base.metric is not None and model.metric is not None:
            parts.append(f"metric {model.metric:.4g} (was {base.metric:.4g})")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Measurements, speed ratios and verdicts as plain data for JSON."""
        ratios = {name: self.speedup(name) for name in self.others}
        return {
            "baseline": self.baseline,
            "measurements": {name: one.to_dict() for name, one in self.measurements.items()},
            "speedup": {name: ratio for name, (ratio, _) in ratios.items()},
            "speedup_interval": {name: list(interval) for name, (_, interval) in ratios.items()},
            "verdict": {name: self.verdict(name) for name in self.others},
            "summary": self.summary,
        }

    def table(self) -> Table:
        """One row a quantity, one column a model; the summary is the notes."""
        return _table(self.measurements, self)


def measure(model: nn.Module, inputs: Any, *, threads: int | None = None, seconds: float = 1.0) -> Measurement:
    """Measure one model, as `compare` does several: same arguments, same errors.

    Example:
        >>> lstm = nn.LSTM(input_size=8, hidden_size=16)
        >>> got = measure(lstm, torch.zeros(5, 1, 8), seconds=0.01)  # 5 steps, 1 sequence, 8 features
        >>> got.parameters, got.macs  # 4 gates of 16 units see 8 inputs and 16 states, at 5 steps
        (1664, 7680)
    """
    return compare({"model": model}, inputs, threads=threads, seconds=seconds).measurements["model"]


def compare(
    models: Mapping[str, nn.Module],
    inputs: Any,
    *,
    metric: Callable[[Any], float] | None = None,
    threads: int | None = None,
    seconds: float = 1.0,
) -> Comparison:
    """Measure models side by side: time, memory, size and zeros. The first one is the baseline.

    All training flags are off and `torch.inference_mode()` is on meanwhile; flags, threads and torch's random
    state are put back.

    Args:
        models: name to model.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; the same for all.
        metric: called with each model for a number, such as its accuracy.
        threads: CPU threads for torch, at least 1; by default as many as it has now.
        seconds: about how long the timed blocks of one model last in all. At least six blocks are timed, each
            after two warm-up calls or more, or none where a call takes more than 0.2 seconds: so a model of `t`
            seconds a call needs at least `18 t`, and a slow one `9 t`.

    Raises:
        InputTypeError: something is no module, or `inputs` is of another type.
        InputError: no models; a model without data (meta or lazy parameters) or with sharded weights; inputs on another
            device than a model; `seconds` not above 0; `threads` below 1.
        Exception: whatever a model or the metric raises, with a note that names the model.

    Example:
        >>> models = {"large": nn.LSTM(4, 400), "small": nn.LSTM(4, 4)}
        >>> result = compare(models, torch.zeros(50, 1, 4), seconds=0.01)  # print(result) shows a table
        >>> [one.macs for one in result.measurements.values()]
        [32320000, 6400]
    """
    call = arguments(inputs)
    _check(models, call, metric, threads, seconds)
    found = {}
    with evaluating(models, threads or torch.get_num_threads()):
        first = {name: _first_call(name, model, call) for name, model in models.items()}
        blocks, calls = time_blocks(models, call, seconds)
        for name, model in models.items():
            with _naming(name):
                found[name] = Measurement(
                    block_seconds=tuple(blocks[name]),
                    calls=calls[name],
                    first_call_seconds=first[name],
                    threads=torch.get_num_threads(),
                    **weight_facts(model),
                    **macs(model, call),
                    file_bytes=file_bytes(model),
                    peak_bytes=peak_bytes(model, call),
                    metric=None if metric is None else _number(metric(model)),
                )
    return Comparison(found)


def _check(
    models: Mapping[str, nn.Module],
    call: Arguments,
    metric: Callable[[Any], float] | None,
    threads: int | None,
    seconds: float,
) -> None:
    if not isinstance(models, Mapping):
        raise InputTypeError(f'models is {checks.kind(models)}. Pass a dict such as {{"dense": model}}.')
    if not models:
        raise InputError("models is empty: there is nothing to measure. Pass at least one named model.")
    checks.threads(threads)
    if metric is not None:
        checks.function("metric", metric, "a function (model) -> float, or leave it out")
    checks.number("seconds", seconds, "a number above 0")
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds is {seconds}, in which nothing can be timed: give a number above 0")
    given = {t.device for t in tree_leaves(call) if isinstance(t, Tensor)}
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{name!r} is {checks.kind(model)}, not an nn.Module. Pass the model itself.")
        for key, tensor in (*weights_by_name(model).items(), *model.named_buffers()):
            if is_lazy(tensor) or tensor.is_meta:
                raise InputError(
                    f"{key!r} of model {name!r} has no data (it is lazy or on the meta device), so the model "
                    "cannot run. Call it once, or use `to_empty` and `load_state_dict`, before you measure."
                )
            if bits.is_sharded(tensor):
                raise InputError(
                    f"{key!r} of model {name!r} is sharded, and one process is measured: sc.save the model, and "
                    "measure it where it is whole, after sc.load. sc.report(model) counts the weights as they are."
                )
        if given and (there := devices(model)) and given.isdisjoint(there):
            raise InputError(
                f"inputs are on {join(given)}, but model {name!r} is on {join(there)}. Move one of them by `.to()`."
            )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let an error through with a note that names the model."""
    try:
        yield
    except Exception as error:  # add_note() needs Python 3.11; the attribute that it fills does not
        notes = [*getattr(error, "__notes__", ()), f"secateur was measuring the model {name!r}"]
        error.__dict__["__notes__"] = notes
        raise


@contextmanager
def evaluating(models: Mapping[str, nn.Module], threads: int) -> Iterator[None]:
    """Evaluation mode, no gradients, `threads` threads; they and the random state are put back."""
    modules = (module for model in models.values() for module in model.modules())
    flags = [(module, module.training) for module in modules if hasattr(module, "training")]  # a frozen script has none
    cuda = {device for model in models.values() for device in devices(model) if device.type == "cuda"}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for module, _ in flags:  # not by eval(), which a model may override and an exported one refuses
            module.training = False
        # in inference mode no model runs whose weights are sparse, or quantized by torchao
        plain = all(is_plain(weight) for model in models.values() for weight in model.parameters())
        with torch.random.fork_rng(devices=list(cuda)), torch.inference_mode() if plain else torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
        for module, training in flags:
            module.training = training


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"metric gave {checks.told(value)}: let it return one number") from error


def _first_call(name: str, model: nn.Module, call: Arguments) -> float:
    from torch.utils.benchmark import timer

    with _naming(name):
        start = timer()  # waits for the accelerator, as Timer does
        model(*call[0], **call[1])
        return timer() - start


def time_blocks(
    models: Mapping[str, nn.Module], call: Arguments, seconds: float, fewest: int = _FEWEST
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call of each block, and calls in a block, by model; the order rotates with the rounds."""
    repeated = {name: _Repeated(model, call) for name, model in models.items()}
    calls = {}
    for name, one in repeated.items():
        with _naming(name):
            calls[name] = one.calls_in(seconds / _BLOCKS)
    blocks: dict[str, list[float]] = {name: [] for name in models}
    order, spent = list(models), 0.0
    while spent < seconds * len(order) or len(blocks[order[0]]) < fewest:
        for name in order:
            with _naming(name):
                blocks[name].append(repeated[name].timeit(calls[name]))
            spent += calls[name] * blocks[name][-1]
        order = order[1:] + order[:1]
    return blocks, calls


class _Repeated:
    """Blocks of calls of a model, each after calls to warm up that are not counted, unless one takes long."""

    def __init__(self, model: nn.Module, call: Arguments) -> None:
        from torch.utils.benchmark import timer  # waits for the accelerator

        scope = {"model": model, "args": call[0], "kwargs": call[1]}
        self._timer = timeit.Timer("model(*args, **kwargs)", globals=scope, timer=timer)
        self._long = False

    def calls_in(self, seconds: float) -> int:
        """How many calls fill a block; looked at twice, as the first look may meet a stall of the machine."""
        once = min(self._timer.timeit(1), self._timer.timeit(1))
        self._long = once >= _LONG
        if once < seconds:
            once = min(once, self.timeit(max(1, int(seconds / once / 4))))
        return max(1, int(seconds / once))

    def timeit(self, calls: int) -> float:
        """Seconds a call of a block."""
        if not self._long:
            self._timer.timeit(max(2, calls // 100))
        return self._timer.timeit(calls) / calls


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def interval(values: Sequence[float]) -> _Pair:
    """95 % interval of the median: the k-th smallest and k-th largest value, for the largest k that will do.

    Of fewer than six values none will do: then Student's, of their logarithms (Biometrika 6, 1908).
    """
    ordered, n = sorted(values), len(values)
    if n < _FEWEST:
        logs = [math.log(value) for value in values]
        middle, reach = statistics.mean(logs), _STUDENT[n] * statistics.stdev(logs) / math.sqrt(n)
        return math.exp(middle - reach), math.exp(middle + reach)
    k, outside = 1, 2 * 0.5**n  # outside = P(at most k - 1 of n values fall on one side of the median)
    while outside + 2 * math.comb(n, k) * 0.5**n <= 0.05:
        outside += 2 * math.comb(n, k) * 0.5**n
        k += 1
    return ordered[k - 1], ordered[-k]


def _table(measurements: Mapping[str, Measurement], comparison: Comparison | None = None) -> Table:
    """One column a model; with a comparison, its verdicts and summary too."""
    words: dict[str, Callable[[Measurement], str]] = {
        "time of a call": lambda m: duration(m.seconds),
        "  95 % interval": lambda m: " to ".join(map(duration, m.interval_seconds)),
        "  quartiles": lambda m: " to ".join(map(duration, m.quartile_seconds)),
        "blocks x calls": lambda m: f"{len(m.block_seconds)} x {m.calls}",
        "first call (apart)": lambda m: duration(m.first_call_seconds),
        "parameters": lambda m: "unknown" if m.parameters is None else number(m.parameters),
        "  not zero": _nonzeros,
        "  denormal": lambda m: number(m.denormals),
        "MACs": lambda m: "unknown" if m.macs is None else number(m.macs),
        "  meeting a zero": lambda m: "unknown" if m.macs is None else percent(m.zero_share),
        "dense file": lambda m: "unknown" if m.file_bytes is None else size(m.file_bytes),
        "peak memory": lambda m: "unknown" if m.peak_bytes is None else size(m.peak_bytes),
        "metric": lambda m: "" if m.metric is None else f"{m.metric:.4g}",
        "device, dtype": lambda m: f"{m.device}, {m.dtype}",
        "threads": lambda m: str(m.threads),
    }
    rows = [[label, *map(word, measurements.values())] for label, word in words.items()]
    notes = [
        f"{name}: do not take this time for the model's speed, as {number(m.denormals)} weights are subnormal. "
        "Zero them, or call torch.set_flush_denormal(True) before any other use of torch; then measure again."
        for name, m in measurements.items()
        if not m.trusted
    ]
    if comparison and comparison.others:
        intervals = [comparison.speedup(name)[1] for name in comparison.others]
        rows[3:3] = [
            ["speed", "baseline", *map(comparison.verdict, comparison.others)],
            ["  95 % interval", "", *(f"{least:.2f}x to {most:.2f}x" for least, most in intervals)],
        ]
        notes += comparison.summary.split("\n")
    return Table(["", *measurements], [row for row in rows if any(row[1:])], notes=notes)


def _nonzeros(m: Measurement) -> str:
    if m.nonzeros is None or m.parameters is None:
        return "unknown"
    return f"{number(m.nonzeros)} ({percent(m.nonzeros / max(m.parameters, 1))})"


def duration(seconds: float) -> str:
    """A time in words: three digits of s, ms or µs."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
