"""Honest measurement: how fast, how large and how sparse models really are.

Blocks of calls of all models are timed in turn within one process, A B then B A, so that whatever else the
machine does meets all of them alike. First call and warm-up are in no reported time, and a difference is
claimed only where the intervals show it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.errors import InputError, InputTypeError
from secateur.tables import Table, number, percent, size

__all__ = ["Comparison", "Measurement", "compare", "measure"]

_BLOCKS = 50  # the time is cut into about as many blocks, so that a stall of the machine spoils few of them
_FEWEST = 6  # blocks whose smallest and largest enclose the median in 95 % of cases
_Pair = tuple[float, float]
_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Measurement:
    """What one model costs; `str()` is a table.

    Attributes:
        block_seconds: seconds per call, one entry a block of `calls` calls, in the order they were run.
        calls: calls in a block.
        first_call_seconds: the first call, which is in no other time.
        threads: CPU threads that torch was given.
        device: devices of parameters and buffers, joined by "+".
        dtype: dtypes of the floating-point parameters, joined by "+".
        parameters: how many weights; tied ones count once.
        nonzeros: how many of them are not zero.
        denormals: how many are subnormal, which makes products up to a hundred times slower on many CPUs.
        flushed: whether the computing threads take subnormals for zero (`torch.set_flush_denormal`).
        macs: multiply-accumulates of a call in matrix products, convolutions and attention, recurrent
            layers included: FLOPs of `torch.utils.flop_counter` / 2. Elementwise work and `nn.Bilinear` are
            not counted. None after a quantized or custom operator, of which torch cannot tell.
        zero_macs: those of the MACs that meet a zero weight: a parameter, a buffer, or what is computed from
            these alone. None if `macs` is.
        file_bytes: size of the state_dict as a dense .safetensors file, tied tensors once. None if a tensor
            cannot be stored so (sparse, quantized).
        peak_bytes: the most that torch's allocator held above the start of a call, output included; weights,
            inputs and what kernel libraries allocate by themselves are not in it. None but on CPU or CUDA.
        metric: what the given `metric` returned, or None.
    """

    block_seconds: tuple[float, ...]
    calls: int
    first_call_seconds: float
    threads: int
    device: str
    dtype: str
    parameters: int
    nonzeros: int
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
        return _quantile(self.block_seconds, 0.5)

    @property
    def quartile_seconds(self) -> _Pair:
        """First and third quartile of the seconds of a call."""
        return _quantile(self.block_seconds, 0.25), _quantile(self.block_seconds, 0.75)

    @property
    def interval_seconds(self) -> _Pair:
        """95 % interval of the median: two order statistics, whatever the distribution."""
        return _interval(self.block_seconds)

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

    def markdown(self) -> str:
        """The table in Markdown."""
        return _table({"model": self}).markdown()

    def __str__(self) -> str:
        return _table({"model": self}).text()


@dataclass(frozen=True)
class Comparison:
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
        return _quantile(ratios, 0.5), _interval(ratios)

    def verdict(self, name: str) -> str:
        """Say "1.85x faster", "1.30x slower", "no difference" or "no verdict".

        A difference is one that both intervals show: that of the ratio leaves out 1, and those of the two
        times do not overlap. There is no verdict on times that subnormal weights may have spoiled.
        """
        base, model = self.measurements[self.baseline], self.measurements[name]
        if not (base.trusted and model.trusted):
            return "no verdict"
        ratio, (least, most) = self.speedup(name)
        if least > 1 and model.interval_seconds[1] < base.interval_seconds[0]:
            return f"{ratio:.2f}x faster"
        if most < 1 and base.interval_seconds[1] < model.interval_seconds[0]:
            return f"{1 / ratio:.2f}x slower"
        return "no difference"

    @property
    def summary(self) -> str:
        """One line for each model but the baseline: what was gained, in words."""
        return "\n".join(f"{name}: {self._gain(name)}" for name in self.others)

    def _gain(self, name: str) -> str:
        base, model = self.measurements[self.baseline], self.measurements[name]
        verdict = self.verdict(name)
        parts = [{"no difference": "no faster", "no verdict": "speed unknown (subnormals)"}.get(verdict, verdict)]
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

    def markdown(self) -> str:
        """The table in Markdown, the summary below."""
        return _table(self.measurements, self).markdown()

    def __str__(self) -> str:
        return _table(self.measurements, self).text()


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
            after two warm-up calls or more, so a model of `t` seconds a call needs at least `18 t`.

    Raises:
        InputTypeError: something is no module, or `inputs` is of another type.
        InputError: no models; a model without data (meta or lazy parameters); inputs on another device than
            a model; `seconds` not above 0; `threads` below 1.
        Exception: whatever a model or the metric raises, with a note that names the model.

    Example:
        >>> models = {"large": nn.LSTM(4, 400), "small": nn.LSTM(4, 4)}
        >>> result = compare(models, torch.zeros(50, 1, 4), seconds=0.01)  # print(result) shows a table
        >>> [one.macs for one in result.measurements.values()]
        [32320000, 6400]
    """
    call = _arguments(inputs)
    _check(models, call, threads, seconds)
    found = {}
    with _at_rest(models, threads or torch.get_num_threads()):
        first = {name: _first_call(name, model, call) for name, model in models.items()}
        blocks, calls = _time_blocks(models, call, seconds)
        for name, model in models.items():
            with _naming(name):
                found[name] = Measurement(
                    block_seconds=tuple(blocks[name]),
                    calls=calls[name],
                    first_call_seconds=first[name],
                    threads=torch.get_num_threads(),
                    **_weights(model),
                    **_work(model, call),
                    file_bytes=file_bytes(model),
                    peak_bytes=_peak_bytes(model, call),
                    metric=None if metric is None else float(metric(model)),
                )
    return Comparison(found)


def _arguments(inputs: Any) -> _Call:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor | nn.utils.rnn.PackedSequence):  # the latter is a tuple, but one argument
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    raise InputTypeError(
        f"inputs is a {type(inputs).__name__}: it is not clear how to call a model with it. "
        "Pass a tensor, a tuple of positional arguments, or a dict of keyword arguments."
    )


def _check(models: Mapping[str, nn.Module], call: _Call, threads: int | None, seconds: float) -> None:
    if not isinstance(models, Mapping):
        raise InputTypeError(f'models is a {type(models).__name__}. Pass a dict such as {{"dense": model}}.')
    if not models:
        raise InputError("models is empty: there is nothing to measure. Pass at least one named model.")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, but a model needs one at least. Leave it out for torch's own.")
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds is {seconds}, in which nothing can be timed. Pass a number above 0.")
    given = {t.device for t in tree_leaves(call) if isinstance(t, Tensor)}
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{name!r} is a {type(model).__name__}, not an nn.Module. Pass the model itself.")
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor) or tensor.is_meta:
                raise InputError(
                    f"{key!r} of model {name!r} has no data (it is lazy or on the meta device), so the model "
                    "cannot run. Call it once, or use `to_empty` and `load_state_dict`, before you measure."
                )
        if given and (there := _devices(model)) and given.isdisjoint(there):
            raise InputError(
                f"inputs are on {_join(given)}, but model {name!r} is on {_join(there)}. Move one of them by `.to()`."
            )


def _devices(model: nn.Module) -> set[torch.device]:
    return {t.device for t in (*model.parameters(), *model.buffers())}


def _join(things: set[Any]) -> str:
    return "+".join(sorted(str(thing).removeprefix("torch.") for thing in things))


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
def _at_rest(models: Mapping[str, nn.Module], threads: int) -> Iterator[None]:
    """Evaluation mode, no gradients, `threads` threads; they and the random state are put back."""
    flags = [(module, module.training) for model in models.values() for module in model.modules()]
    cuda = {device for model in models.values() for device in _devices(model) if device.type == "cuda"}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for module, _ in flags:  # not by eval(), which a model may override and an exported one refuses
            module.training = False
        with torch.random.fork_rng(devices=list(cuda)), torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        for module, training in flags:
            module.training = training


def _first_call(name: str, model: nn.Module, call: _Call) -> float:
    from torch.utils.benchmark import timer

    with _naming(name):
        start = timer()  # waits for the accelerator, as Timer does
        model(*call[0], **call[1])
        return timer() - start


def _time_blocks(
    models: Mapping[str, nn.Module], call: _Call, seconds: float
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call of each block, and calls in a block, by model; the order rotates with the rounds."""
    from torch.utils.benchmark import Timer

    timers, calls = {}, {}
    for name, model in models.items():
        scope = {"model": model, "args": call[0], "kwargs": call[1]}
        timers[name] = Timer("model(*args, **kwargs)", globals=scope, num_threads=torch.get_num_threads())
        with _naming(name):
            calls[name] = _calls_in(seconds / _BLOCKS, timers[name])
    blocks: dict[str, list[float]] = {name: [] for name in models}
    order, spent = list(models), 0.0
    while spent < seconds * len(order) or len(blocks[order[0]]) < _FEWEST:
        for name in order:
            with _naming(name):
                blocks[name].append(timers[name].timeit(calls[name]).median)
            spent += calls[name] * blocks[name][-1]
        order = order[1:] + order[:1]
    return blocks, calls


def _calls_in(seconds: float, timer: Any) -> int:
    """How many calls fill a block; looked at twice, as the first look may meet a stall of the machine."""
    once = timer.timeit(1).median
    if once < seconds:
        once = min(once, timer.timeit(max(1, int(seconds / once / 4))).median)
    return max(1, int(seconds / once))


def _quantile(values: Sequence[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _interval(values: Sequence[float]) -> _Pair:
    """95 % interval of the median: the k-th smallest and k-th largest value, for the largest k that will do."""
    ordered, n = sorted(values), len(values)
    k, outside = 1, 2 * 0.5**n  # outside = P(at most k - 1 of n values fall on one side of the median)
    while outside + 2 * math.comb(n, k) * 0.5**n <= 0.05:
        outside += 2 * math.comb(n, k) * 0.5**n
        k += 1
    return ordered[k - 1], ordered[-k]


def _weights(model: nn.Module) -> dict[str, Any]:
    """The fields of a Measurement that can be read off the parameters."""
    weights = list(model.parameters())
    return {
        "device": _join(_devices(model)) or "cpu",
        "dtype": _join({w.dtype for w in weights if w.is_floating_point()}) or "none",
        "parameters": sum(w.numel() for w in weights),
        "nonzeros": sum(int(w.count_nonzero()) for w in weights),
        "denormals": sum(_denormals(w.detach()) for w in weights if w.is_floating_point()),
        "flushed": _flushed(),
    }


def _denormals(values: Tensor) -> int:
    """Count subnormals by their bits: a comparison would miss them where they are flushed to zero."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    normal = torch.tensor(torch.finfo(values.dtype).tiny, dtype=values.dtype).view(integer).item()
    magnitude = values.view(integer) & torch.iinfo(integer).max  # all but the sign
    return int(((magnitude > 0) & (magnitude < normal)).sum())


def _flushed() -> bool:
    """Whether every thread of torch takes subnormals for zero: ask all of them for one times 1.4e-45."""
    tiny = torch.ones(2**16 * torch.get_num_threads(), dtype=torch.int32).view(torch.float32)
    return not (tiny * 1.0).view(torch.int32).any()


def _work(model: nn.Module, call: _Call) -> dict[str, Any]:
    """The MACs of a call, and those that meet a zero weight."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]

    missing = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    model = getattr(model, "_orig_mod", model)  # as it was before torch.compile
    counter = FlopCounterMode(display=False, custom_mapping=missing)
    with _plain_kernels(), _ZeroMeter(model) as meter, counter:
        model(*call[0], **call[1])
    if meter.blind:
        return {"macs": None, "zero_macs": None}
    return {"macs": counter.get_total_flops() // 2, "zero_macs": round(meter.zero_macs)}


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch off the fused kernels (LSTM, transformer layer) that hide their matrix products."""
    fused: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before, fast = [one.enabled for one in fused], torch.backends.mha.get_fastpath_enabled()
    try:
        for one in fused:
            one.enabled = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        for one, enabled in zip(fused, before, strict=True):
            one.enabled = enabled
        torch.backends.mha.set_fastpath_enabled(fast)


class _ZeroMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs whose weight is zero, operator by operator.

    A weight is a tensor in one of the storages `fixed`: at first those of parameters and buffers, then also
    those of results computed from nothing else (a transpose, a cast, a weight times a mask).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fixed = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self.zero_macs = 0.0
        self.blind = False  # an operator was called whose MACs torch cannot tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.blind |= func.namespace not in ("aten", "prim", "prims") or name.startswith("quantized_")
        if formula := flop_registry.get(func.overloadpacket):
            added = name in ("addmm", "baddbmm")  # their first tensor is no factor
            weights = [t for t in args[added : added + 2] if _storage(t) in self.fixed]
            density = math.prod(int(t.count_nonzero()) / max(t.numel(), 1) for t in weights)
            self.zero_macs += formula(*args, **(kwargs or {}), out_val=out) / 2 * (1 - density)
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = {_storage(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.fixed = self.fixed | results if given and given <= self.fixed else self.fixed - results
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def file_bytes(model: nn.Module) -> int | None:
    """Size of the state_dict as a dense .safetensors file, tied tensors once; it is built in memory to be counted."""
    from safetensors.torch import save

    tensors: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):  # an `_extra_state` need not be one
            if tensor.layout is not torch.strided or tensor.is_quantized:
                return None
            same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            tensors.setdefault(same if tensor.numel() else name, (name, tensor.contiguous()))
    return len(save(dict(tensors.values())))


def _peak_bytes(model: nn.Module, call: _Call) -> int | None:
    devices = _devices(model) or {torch.device("cpu")}
    if {device.type for device in devices} == {"cpu"}:
        return _cpu_peak(model, call)
    if {device.type for device in devices} != {"cuda"}:
        return None
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(torch.cuda.memory_allocated(device) for device in devices)
    model(*call[0], **call[1])
    return int(sum(torch.cuda.max_memory_allocated(device) for device in devices) - before)


def _cpu_peak(model: nn.Module, call: _Call) -> int:
    from torch.autograd.profiler import profile

    level = os.environ.get("KINETO_LOG_LEVEL")  # read once, at the first profile of the process:
    os.environ["KINETO_LOG_LEVEL"] = level or "6"  # torch 2.13 would print at each start and stop
    try:
        with profile(profile_memory=True) as profiler:
            model(*call[0], **call[1])
    finally:
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _table(measurements: Mapping[str, Measurement], comparison: Comparison | None = None) -> Table:
    """One column a model; with a comparison, its verdicts and summary too."""
    words: dict[str, Callable[[Measurement], str]] = {
        "time of a call": lambda m: _duration(m.seconds),
        "  95 % interval": lambda m: " to ".join(map(_duration, m.interval_seconds)),
        "  quartiles": lambda m: " to ".join(map(_duration, m.quartile_seconds)),
        "blocks x calls": lambda m: f"{len(m.block_seconds)} x {m.calls}",
        "first call (apart)": lambda m: _duration(m.first_call_seconds),
        "parameters": lambda m: number(m.parameters),
        "  not zero": lambda m: f"{number(m.nonzeros)} ({percent(m.nonzeros / max(m.parameters, 1))})",
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
        notes.append(comparison.summary)
    return Table(["", *measurements], [row for row in rows if any(row[1:])], notes=notes)


def _duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
