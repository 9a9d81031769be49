"""Honest measurement: how fast, how large and how sparse models really are.

Blocks of calls of all models are timed in turn (A B, B A, ...) within one process, so that whatever else the
machine does meets all of them alike; the first call and the warm-up are never part of a reported time; and
no difference is claimed that the intervals do not show.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import InputError, InputTypeError
from secateur.tables import Table, number, percent, size

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

__all__ = ["Comparison", "Measurement", "compare", "measure"]

_BLOCKS = 50  # the time is cut into about as many blocks, so that a stall of the machine spoils few of them
_FEWEST = 6  # blocks whose smallest and largest enclose the median in 95 % of cases
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_Metric = Callable[[Any], float]


@dataclass(frozen=True)
class Measurement:
    """What one model costs; `str()` is a table, and `markdown()` and `to_dict()` are the other forms.

    Attributes:
        block_seconds: seconds per call, one entry a block of `calls` calls, in the order they were run.
        calls: calls in a block.
        first_call_seconds: the first call, apart; it is in no other time.
        threads: CPU threads that torch was given.
        dtype: dtypes of the floating-point parameters, joined by "+"; "none" without any.
        device: devices of parameters and buffers, joined by "+".
        parameters: how many weights, tied ones once.
        nonzeros: how many of them are not zero.
        denormals: how many are subnormal, which on many CPUs makes a product a hundred times slower.
        flushed: whether the computing threads take subnormals for zero (`torch.set_flush_denormal`).
        macs: multiply-accumulates of one call in matrix products, convolutions and attention, as
            `torch.utils.flop_counter` counts them (its FLOPs / 2), recurrent layers included. Not counted:
            elementwise work, `nn.Bilinear`, and the operators in `uncounted`.
        zero_macs: those of them whose weight is zero. A weight here is a parameter, a buffer, or a tensor
            computed from these alone; the padding of a convolution counts like any input.
        uncounted: quantized and custom operators that were called, whose MACs torch cannot tell.
        file_bytes: size of the state_dict as a dense .safetensors file, tied tensors once; None if one of
            them cannot be stored so (sparse, quantized).
        peak_bytes: the most that torch's allocator held at once above the start of a call, output included;
            weights, inputs and the private scratch of a kernel library are not in it. None where torch
            cannot tell (neither CPU nor CUDA).
        metric: what the given `metric` returned, or None.
    """

    block_seconds: tuple[float, ...]
    calls: int
    first_call_seconds: float
    threads: int
    dtype: str
    device: str
    parameters: int
    nonzeros: int
    denormals: int
    flushed: bool
    macs: int
    zero_macs: int
    uncounted: tuple[str, ...]
    file_bytes: int | None
    peak_bytes: int | None
    metric: float | None = None

    @property
    def seconds(self) -> float:
        """Median seconds of a call."""
        return median(self.block_seconds)

    @property
    def quartile_seconds(self) -> tuple[float, float]:
        """First and third quartile of the seconds of a call."""
        low, _, high = quantiles(self.block_seconds, n=4, method="inclusive")
        return low, high

    @property
    def interval_seconds(self) -> tuple[float, float]:
        """95 % interval of the median: two order statistics, whatever the distribution."""
        return _interval(self.block_seconds)

    @property
    def trusted(self) -> bool:
        """False if subnormal weights may have slowed the calls down: the time is not the model's speed."""
        return not self.denormals or self.flushed or "cpu" not in self.device

    def to_dict(self) -> dict[str, Any]:
        """All fields, and what follows from them, as plain data for JSON."""
        derived = ("seconds", "quartile_seconds", "interval_seconds", "trusted")
        data = {**vars(self), **{name: getattr(self, name) for name in derived}}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def markdown(self) -> str:
        """The table in Markdown."""
        return _table({"model": self}).markdown()

    def __str__(self) -> str:
        return _table({"model": self}).text()


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: median over the rounds, and its 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Models measured side by side, the first of them the baseline; `str()` is a table.

    Attributes:
        measurements: one `Measurement` a model. The i-th blocks of all models were run in the same round.
    """

    measurements: Mapping[str, Measurement] = field(repr=False)

    @property
    def baseline(self) -> str:
        """The name of the first model."""
        return next(iter(self.measurements))

    def speedup(self, name: str) -> Ratio:
        """Seconds of the baseline over seconds of `name`, paired round by round: above 1 is faster."""
        base, model = self.measurements[self.baseline], self.measurements[name]
        ratios = [b / m for b, m in zip(base.block_seconds, model.block_seconds, strict=True)]
        return Ratio(median(ratios), *_interval(ratios))

    def verdict(self, name: str) -> str:
        """Say "1.85x faster", "1.30x slower", "no difference" or "no verdict".

        A difference is one that both intervals show: that of the ratio leaves out 1, and those of the two
        times do not overlap. There is no verdict on times that subnormal weights may have spoiled.
        """
        base, model = self.measurements[self.baseline], self.measurements[name]
        if not (base.trusted and model.trusted):
            return "no verdict"
        ratio = self.speedup(name)
        (base_low, base_high), (low, high) = base.interval_seconds, model.interval_seconds
        if ratio.low > 1 and high < base_low:
            return f"{ratio.median:.2f}x faster"
        if ratio.high < 1 and base_high < low:
            return f"{1 / ratio.median:.2f}x slower"
        return "no difference"

    @property
    def summary(self) -> str:
        """One line for each model but the baseline: what it gained, in words."""
        return "\n".join(self._sentence(name) for name in list(self.measurements)[1:])

    def _sentence(self, name: str) -> str:
        base, model = self.measurements[self.baseline], self.measurements[name]
        verdict = self.verdict(name)
        speed = {"no difference": "no faster", "no verdict": "no verdict on speed (subnormal weights)"}.get(
            verdict, verdict
        )
        why = ""
        if verdict == "no difference" or "slower" in verdict:
            if model.zero_macs / max(model.macs, 1) > base.zero_macs / max(base.macs, 1):
                why = f", although {_share(model)} of its MACs meet a zero weight (dense kernels do not skip them)"
        parts = [speed + why, _smaller(base.file_bytes, model.file_bytes)]
        if base.metric is not None and model.metric is not None:
            parts.append(f"metric {model.metric:.4g} (was {base.metric:.4g})")
        return f"{name}: " + ", ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Measurements, speed ratios and verdicts as plain data for JSON."""
        others = list(self.measurements)[1:]
        return {
            "baseline": self.baseline,
            "measurements": {name: one.to_dict() for name, one in self.measurements.items()},
            "speedups": {name: vars(self.speedup(name)) for name in others},
            "verdicts": {name: self.verdict(name) for name in others},
            "summary": self.summary,
        }

    def markdown(self) -> str:
        """The table in Markdown, the summary below."""
        return _table(self.measurements, self).markdown()

    def __str__(self) -> str:
        return _table(self.measurements, self).text()


def measure(model: nn.Module, inputs: Any, *, threads: int | None = None, seconds: float = 1.0) -> Measurement:
    """Measure the time, memory, size and zeros of a model; see `compare`, which does it for several.

    Raises:
        InputTypeError, InputError: as `compare`.

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
    metric: _Metric | None = None,
    threads: int | None = None,
    seconds: float = 1.0,
) -> Comparison:
    """Measure models side by side; the first is the baseline.

    The models run in `eval()` under `torch.inference_mode()`. Afterwards their training flags, torch's
    threads and the random state are as before.

    Args:
        models: name to model.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; the same for all.
        metric: called with each model, for a number such as its accuracy.
        threads: CPU threads for torch, at least 1; by default as many as it has now.
        seconds: roughly how long the timed blocks of the slowest model last in all. At least six blocks are
            timed, and each is preceded by two warm-up calls or more.

    Raises:
        InputTypeError: something is no module, or `inputs` is of another type.
        InputError: no models; a model without data (meta or lazy parameters); inputs on another device than
            a model; `seconds` not above 0; `threads` below 1.
        Exception: whatever a model or the metric raises, with a note that names the model.

    Example:
        >>> small, large = nn.Linear(4, 4), nn.Linear(900, 900)
        >>> models = {"large": nn.Sequential(nn.Linear(4, 900), large), "small": small}
        >>> compare(models, torch.zeros(1, 4), seconds=0.01).verdict("small")  # doctest: +ELLIPSIS
        '...x faster'
    """
    call = _arguments(inputs)
    _check(models, call, threads, seconds)
    with _at_rest(models, threads or torch.get_num_threads()):
        firsts = {name: _first_call(name, model, call) for name, model in models.items()}
        blocks, calls = _time_blocks(models, call, seconds)
        found = {}
        for name, model in models.items():
            with _naming(name):
                found[name] = Measurement(
                    block_seconds=tuple(blocks[name]),
                    calls=calls[name],
                    first_call_seconds=firsts[name],
                    threads=torch.get_num_threads(),
                    **_weights(model),
                    **_work(model, call),
                    file_bytes=_file_bytes(model),
                    peak_bytes=_peak_bytes(model, call),
                    metric=None if metric is None else float(metric(model)),
                )
    return Comparison(found)


# Checks and the state that is put back ---------------------------------------------------------------------


def _arguments(inputs: Any) -> _Call:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor) or hasattr(inputs, "batch_sizes"):  # a PackedSequence is a tuple, but one argument
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    raise InputTypeError(
        f"inputs is a {type(inputs).__name__}: it is not clear how to call the model with it. "
        "Pass a tensor, a tuple of positional arguments, or a dict of keyword arguments."
    )


def _check(models: Mapping[str, nn.Module], call: _Call, threads: int | None, seconds: float) -> None:
    if not isinstance(models, Mapping):
        raise InputTypeError(
            f'models is a {type(models).__name__}. Pass a dict such as {{"dense": dense, "pruned": pruned}}.'
        )
    if not models:
        raise InputError("models is empty: there is nothing to measure. Pass at least one named model.")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, but a model needs at least 1. Leave it out for torch's own.")
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds is {seconds}, which leaves no time to measure. Pass a number above 0.")
    given = {t.device for t in tree_leaves(call) if isinstance(t, Tensor)}
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{name!r} is a {type(model).__name__}, not an nn.Module. Pass the model itself.")
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor) or tensor.is_meta:
                raise InputError(
                    f"{key!r} of model {name!r} has no data ({'lazy' if is_lazy(tensor) else 'meta device'}), so "
                    "the model cannot run. Initialise it (one call, `to_empty`, `load_state_dict`) first."
                )
        there = _devices(model)
        if given and there and given.isdisjoint(there):
            raise InputError(
                f"inputs are on {_join(given)}, but model {name!r} is on {_join(there)}. "
                "Move one to the other with `.to(device)`."
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
    except Exception as error:  # add_note() is of Python 3.11; the attribute it fills works everywhere
        notes = [*getattr(error, "__notes__", ()), f"secateur was measuring the model {name!r}"]
        error.__dict__["__notes__"] = notes
        raise


@contextmanager
def _at_rest(models: Mapping[str, nn.Module], threads: int) -> Iterator[None]:
    """Evaluation mode, no gradients, `threads` threads; all of it and the random state put back afterwards."""
    flags = [(module, module.training) for model in models.values() for module in model.modules()]
    before = torch.get_num_threads()
    cuda = {d for model in models.values() for d in _devices(model) if d.type == "cuda"}
    try:
        torch.set_num_threads(threads)
        for model in models.values():
            for module in model.modules():  # as eval() does, but without what a model's own train() may do
                module.training = False
        with torch.random.fork_rng(devices=list(cuda)), torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        for module, training in flags:
            module.training = training


# Time ------------------------------------------------------------------------------------------------------


def _first_call(name: str, model: nn.Module, call: _Call) -> float:
    from torch.utils.benchmark import timer

    with _naming(name):
        start = timer()  # waits for the accelerator, as Timer does
        model(*call[0], **call[1])
        return timer() - start


def _time_blocks(
    models: Mapping[str, nn.Module], call: _Call, seconds: float
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call of each block, and calls in a block, by model; the order rotates with each round."""
    from torch.utils.benchmark import Timer

    timers = {
        name: Timer(
            "model(*args, **kwargs)",
            globals={"model": model, "args": call[0], "kwargs": call[1]},
            num_threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }
    calls = {name: _calls_in(seconds / _BLOCKS, timer) for name, timer in timers.items()}
    blocks: dict[str, list[float]] = {name: [] for name in models}
    order, spent = list(models), 0.0
    while spent < seconds or len(blocks[order[0]]) < _FEWEST:
        taken = []
        for name in order:
            blocks[name].append(timers[name].timeit(calls[name]).median)
            taken.append(calls[name] * blocks[name][-1])
        spent += max(taken)
        order = order[1:] + order[:1]
    return blocks, calls


def _calls_in(seconds: float, timer: Timer) -> int:
    """How many calls fill a block of so many seconds; measured twice, as one look may meet a stall."""
    once = timer.timeit(1).median
    if once < seconds:
        once = min(once, timer.timeit(max(1, int(seconds / once / 4))).median)
    return max(1, round(seconds / once))


def _interval(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    """The 95 % interval of the median: the k-th smallest and the k-th largest, with the largest fit k."""
    ordered, n = sorted(values), len(values)
    k, tail = 0, 0.5**n  # tail = P(at most k of n values lie below the median)
    while tail <= 0.025:
        k += 1
        tail += math.comb(n, k) * 0.5**n
    k = max(k, 1)
    return ordered[k - 1], ordered[-k]


# Size and work ---------------------------------------------------------------------------------------------


def _weights(model: nn.Module) -> dict[str, Any]:
    """The fields of a `Measurement` that can be read off the parameters."""
    weights = list(model.parameters())
    devices = _devices(model)
    denormals = sum(_denormals(weight) for weight in weights)
    return {
        "dtype": _join({w.dtype for w in weights if w.is_floating_point()}) or "none",
        "device": _join(devices) or "cpu",
        "parameters": sum(weight.numel() for weight in weights),
        "nonzeros": sum(_nonzeros(weight) for weight in weights),
        "denormals": denormals,
        "flushed": _flushed(),
    }


def _values(tensor: Tensor) -> Tensor:
    """The stored values of a tensor: all of them, or those of a sparse one."""
    tensor = tensor.detach()
    if tensor.layout is torch.strided:
        return tensor
    return tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()


def _nonzeros(tensor: Tensor) -> int:
    return int(_values(tensor).count_nonzero())


def _denormals(tensor: Tensor) -> int:
    """Subnormal values, by their bits: a comparison would miss them where they are flushed to zero."""
    values = _values(tensor)
    if not values.is_floating_point():
        return 0
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    smallest = torch.tensor(torch.finfo(values.dtype).tiny, dtype=values.dtype).view(integer).item()
    magnitude = values.view(integer) & torch.iinfo(integer).max  # without the sign
    return int(((magnitude > 0) & (magnitude < smallest)).sum())


def _flushed() -> bool:
    """Whether every computing thread takes subnormals for zero."""
    tiny = torch.ones(2**16 * torch.get_num_threads(), dtype=torch.int32).view(torch.float32)  # all 1.4e-45
    return not (tiny * 1.0).view(torch.int32).any()


class _ZeroMeter(TorchDispatchMode):
    """Counts the MACs whose weight is zero, operator by operator, and names those it cannot judge.

    A weight is a tensor in a storage of `fixed`: that of a parameter or buffer at first, and then that of
    each result computed from such tensors alone (a mask times a weight, a cast, a transpose).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.fixed = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self.zero_macs = 0.0
        self.foreign: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            adds = func.overloadpacket.__name__ in ("addmm", "baddbmm")  # whose first tensor is only added
            density = 1.0
            for operand in args[adds : adds + 2]:
                if _storage(operand) in self.fixed:
                    density *= _nonzeros(operand) / max(operand.numel(), 1)
            self.zero_macs += formula(*args, **kwargs, out_val=out) / 2 * (1 - density)
        elif func.namespace not in ("aten", "prim", "prims") or "quantized_" in func.__name__:
            self.foreign.add(str(func.overloadpacket))
        given = [_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = {_storage(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        if given and self.fixed.issuperset(given):
            self.fixed |= results
        else:
            self.fixed -= results
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch off the fused kernels that hide their matrix products (LSTM, transformer layer)."""
    backends = torch.backends
    before = backends.mkldnn.enabled, backends.cudnn.enabled, backends.mha.get_fastpath_enabled()
    try:
        backends.mkldnn.enabled = backends.cudnn.enabled = False
        backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        backends.mkldnn.enabled, backends.cudnn.enabled = before[:2]
        backends.mha.set_fastpath_enabled(before[2])


def _work(model: nn.Module, call: _Call) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps, as it is
    with _plain_kernels(), _ZeroMeter(model) as meter, FlopCounterMode(display=False) as counter:
        model(*call[0], **call[1])
    return {
        "macs": counter.get_total_flops() // 2,
        "zero_macs": round(meter.zero_macs),
        "uncounted": tuple(sorted(meter.foreign)),
    }


def _file_bytes(model: nn.Module) -> int | None:
    from safetensors.torch import save

    tensors: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue  # an `_extra_state`
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return None
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        tensors.setdefault(same if tensor.numel() else name, (name, tensor.contiguous()))
    return len(save(dict(tensors.values())))


def _peak_bytes(model: nn.Module, call: _Call) -> int | None:
    devices = {device.type for device in _devices(model)} or {"cpu"}
    if devices == {"cuda"}:
        return sum(_cuda_peak(model, call, device) for device in _devices(model))
    return _cpu_peak(model, call) if devices == {"cpu"} else None


def _cuda_peak(model: nn.Module, call: _Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(*call[0], **call[1])
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(model: nn.Module, call: _Call) -> int:
    from torch.autograd.profiler import profile

    with _quiet_kineto(), profile(profile_memory=True) as profiler:
        output = model(*call[0], **call[1])
    del output
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Torch 2.13's profiler writes to stderr each time it starts and stops, unless told not to at first use."""
    key = "KINETO_LOG_LEVEL"
    unset = key not in os.environ
    os.environ.setdefault(key, "6")
    try:
        yield
    finally:
        if unset:
            del os.environ[key]


# Words -----------------------------------------------------------------------------------------------------


def _table(measurements: Mapping[str, Measurement], comparison: Comparison | None = None) -> Table:
    """One column a model; with a comparison, its verdicts and summary too."""
    rows: dict[str, Callable[[Measurement], str]] = {
        "time of a call": lambda m: _duration(m.seconds),
        "  95 % interval": lambda m: _range(m.interval_seconds),
        "  quartiles": lambda m: _range(m.quartile_seconds),
        "blocks x calls": lambda m: f"{len(m.block_seconds)} x {m.calls}",
        "first call (apart)": lambda m: _duration(m.first_call_seconds),
        "parameters": lambda m: number(m.parameters),
        "not zero": lambda m: f"{number(m.nonzeros)} ({percent(m.nonzeros / max(m.parameters, 1))})",
        "denormals": lambda m: number(m.denormals),
        "MACs": lambda m: number(m.macs),
        "meet a zero weight": _share,
        "dense file": lambda m: "unknown" if m.file_bytes is None else size(m.file_bytes),
        "peak memory": lambda m: "unknown" if m.peak_bytes is None else size(m.peak_bytes),
        "metric": lambda m: "" if m.metric is None else f"{m.metric:.4g}",
        "device, dtype": lambda m: f"{m.device}, {m.dtype}",
        "threads": lambda m: str(m.threads),
    }
    cells = [[label, *(word(m) for m in measurements.values())] for label, word in rows.items()]
    notes = [note for name, measured in measurements.items() for note in _warnings(name, measured)]
    if comparison and len(measurements) > 1:
        others = list(measurements)[1:]
        ratios = [comparison.speedup(name) for name in others]
        cells[3:3] = [
            ["speed", "baseline", *(comparison.verdict(name) for name in others)],
            ["  95 % interval", "", *(f"{r.low:.2f}x to {r.high:.2f}x" for r in ratios)],
        ]
        notes.append(comparison.summary)
    return Table(["", *measurements], [row for row in cells if any(row[1:])], notes=notes)


def _warnings(name: str, measured: Measurement) -> Iterator[str]:
    if not measured.trusted:
        yield (
            f"{name}: {number(measured.denormals)} weights are subnormal, so do not take this time for the "
            "model's speed. Set them to zero, or call torch.set_flush_denormal(True) before the first use of "
            "torch, and measure again."
        )
    if measured.uncounted:
        yield f"{name}: MACs leave out {', '.join(measured.uncounted)}, which torch cannot count."


def _share(measured: Measurement) -> str:
    return percent(measured.zero_macs / max(measured.macs, 1))


def _smaller(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return ""
    if abs(before - after) < 0.005 * before:
        return "same size as a dense file"
    return f"a dense file is {before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"


def _range(pair: tuple[float, float]) -> str:
    return f"{_duration(pair[0])} to {_duration(pair[1])}"


def _duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")
