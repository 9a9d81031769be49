"""How much each tensor matters to the user's own metric: it alone is pruned, more and more; and so is the whole."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur import patterns, plan
from secateur import scope as scopes
from secateur.allocation import Allocation, Counts, global_
from secateur.calibration.trials import Evaluate, chosen, tried
from secateur.errors import FileError, InputError, InputTypeError, PatternError, StateError, UnknownNameError, nearest
from secateur.patterns import Pattern, Picked
from secateur.plan import Plan
from secateur.scope import Scope
from secateur.scores import Score
from secateur.sparsity import fraction
from secateur.support import bits, checks
from secateur.support.files import replacing, require_file, require_place
from secateur.support.progress import progress_bar
from secateur.support.tables import Printed, Table, number

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95)
_FORMAT = "secateur.scan 1"
_WHOLE, _DENSE = "", ("", 0.0)
_STEPS = 200  # a curve is read at as many sparsities
_EVEN = 0.01  # how much an even share counts beside the falls: it decides where they are equal

_Trial = tuple[str, float]
"""A tensor (`_WHOLE`: all of them) and its sparsity."""


@dataclass(frozen=True)
class Scan(Printed):
    """What a metric (higher is better) gives with each tensor alone pruned, and with the whole; prints as a table.

    Attributes:
        sparsities: the levels, rising.
        dense: the metric of the model as it is.
        whole: the metric at each level, all tensors ranked together.
        tensors: for each tensor the metric at each level, the others as they are.
        weights: of each tensor, those that may be pruned.
        made: of what, and how: fingerprints of model, masks and metric, names of metric, score and pattern.
    """

    sparsities: tuple[float, ...]
    dense: float
    whole: tuple[float, ...]
    tensors: Mapping[str, tuple[float, ...]]
    weights: Mapping[str, int]
    made: Mapping[str, str]

    def falls(self, name: str) -> tuple[float, ...]:
        """How far the metric falls with a tensor pruned alone, level by level; negative where it rises."""
        return tuple(self.dense - metric for metric in self.tensors[name])

    def table(self) -> Table:
        """One row a tensor: how far the metric falls at each level; then the whole."""
        rows = [(name, n, self.tensors[name]) for name, n in self.weights.items()]
        rows.append(("all together", sum(self.weights.values()), self.whole))
        cells = [[name, number(n), *(f"{self.dense - metric:.3g}" for metric in metrics)] for name, n, metrics in rows]
        title = f"How far the metric falls from {self.dense:.4g}, with each tensor alone pruned to a sparsity"
        return Table(["tensor", "weights", *(f"{level:g}" for level in self.sparsities)], cells, title)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def allocation(self) -> Allocation:
        """The allocation that the curves suggest: the sum of the falls of all tensors is the least for its count.

        The falls are interpolated between levels, and no fall is below one at a lower sparsity. Beyond the highest
        level a tensor is taken to lose as much again as the worst trial of all. Where falls are equal, the same
        fraction goes. Within a tensor the scores choose. It takes the tensors that were scanned.
        """
        return Allocation(self.share, shapes_only=True)

    def share(self, weights: Mapping[str, Tensor], count: int) -> Counts:
        """Say how many weights to prune in each tensor, `count` in all: the rule of `allocation()`.

        Lagrange's condition for convex costs: the last weight of each tensor costs the same.

        Raises:
            InputError, UnknownNameError: tensors that were not scanned, or not in these sizes.
        """
        self.require({name: weight.numel() for name, weight in weights.items()})
        sizes = {name: self.weights[name] for name in weights}
        worst = max(0.0, *(fall for name in sizes for fall in self.falls(name)), self.dense - min(self.whole))
        steps = np.arange(_STEPS + 1) / _STEPS
        even = -np.log1p(-steps * (1 - 1 / _STEPS)) * _EVEN / sum(sizes.values())  # a weight, at one sparsity for all
        pieces = []
        for name, size in sizes.items():
            falls = np.maximum.accumulate([0.0, *self.falls(name)]) / (worst or 1.0)
            convex = _below([0.0, *self.sparsities, 1.0], [*falls, falls[-1] + 1.0], steps)
            bounds = np.arange(_STEPS + 1) * size // _STEPS
            prices = np.diff(convex + even * size) * _STEPS / size
            pieces += [(float(price), name, int(n)) for price, n in zip(prices, np.diff(bounds), strict=True)]
        counts = dict.fromkeys(sizes, 0)
        for _, name, n in sorted(pieces, key=lambda piece: piece[0]):  # stable: of one tensor they stay in order
            taken = min(n, count)
            counts[name] += taken
            count -= taken
        return counts

    def require(self, sizes: Mapping[str, int]) -> None:
        """See that these tensors were scanned, in these sizes.

        Raises:
            UnknownNameError, InputError: they were not.
        """
        for name, size in sizes.items():
            if name not in self.weights:
                raise UnknownNameError(f"the scan has no {name}: scan this model; {nearest(name, self.weights)}")
            if self.weights[name] != size:
                raise InputError(
                    f"the scan is of another model: its {name} has {self.weights[name]:,} weights, and yours {size:,}; "
                    "scan yours"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file that `load` reads, and with which `sc.scan(path=...)` goes on.

        Raises:
            WriteError: the system refuses to write.
        """
        results = {_DENSE: self.dense} | {(_WHOLE, s): m for s, m in zip(self.sparsities, self.whole, strict=True)}
        for name, metrics in self.tensors.items():
            results |= {(name, s): m for s, m in zip(self.sparsities, metrics, strict=True)}
        _write(path, _Settings(self.sparsities, self.weights, self.made), results)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scan:
        """Read what `save` or `sc.scan(path=...)` wrote.

        Raises:
            InputError: there is no such file. FileError: it holds no scan, or one that is not finished.
        """
        settings, results = _read(path)
        missing = len(settings.trials()) - len(results)
        if missing:
            raise FileError(f"{path} lacks {missing} results: let sc.scan(..., path=...) finish it")
        return _result(settings, results)


@dataclass(frozen=True)
class _Settings:
    """What two scans must have in common to go on with each other."""

    sparsities: tuple[float, ...]
    weights: Mapping[str, int]
    made: Mapping[str, str]

    def trials(self) -> list[_Trial]:
        return [_DENSE, *((name, level) for name in (_WHOLE, *self.weights) for level in self.sparsities)]


def scan(
    model: nn.Module,
    evaluate: Evaluate,
    sparsities: Sequence[float] = LEVELS,
    *,
    score: str | Score | Mapping[str, Tensor] = "magnitude",
    pattern: str | Pattern | None = None,
    scope: Mapping[str, nn.Parameter] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    processes: int = 1,
) -> Scan:
    """Prune each tensor alone, and all together, to each of some sparsities, and see what the metric says.

    The model is bit for bit as it was after each trial, also after an error or an interruption. A scan makes
    `1 + levels * (tensors + 1)` evaluations.

    Args:
        model: given to `evaluate`.
        evaluate: `model -> float`, higher is better; for a loss return its negative. A tensor of one number is taken.
            It may change the model, train it for a while or call `sc.recalibrate`: that is undone. torch's random
            numbers are the same ones in each trial.
        sparsities: the levels, 0 < s < 1.
        score, pattern, scope: as for `prune`.
        path: a JSON file in which each result is written when it is there. A second call with it makes only the
            trials that it lacks. It knows `evaluate` by its name, its code and the defaults of its arguments, and not
            by the data that it reads: for other data give another path.
        progress: draw a bar on stderr.
        processes: evaluate in so many new processes, each with a copy of the model and its share of torch's threads.
            Then all that is given must be picklable, and a script needs `if __name__ == "__main__":`.

    Raises:
        InputError, InputTypeError: a level or an argument that cannot be used; a sharded model; a metric that is not
            one finite number, with the tensor and the level; a `path` of another model, metric, score, pattern or
            levels.
        FileError: a `path` that holds no scan. WriteError: one that cannot be written. StateError: processes that died.
        And as `prune`.

    >>> model = nn.Linear(8, 4)
    >>> result = scan(model, lambda model: model.weight.abs().sum(), [0.5, 0.9])
    >>> list(result.tensors), len(result.whole)
    (['weight'], 2)
    """
    checks.function("evaluate", evaluate, "a function (model) -> float, higher is better")
    checks.flag("progress", progress)
    checks.whole("processes", processes, 1)
    work = _Work(model, evaluate, score, pattern, scopes.resolve(model, scope))
    for name in work.scope:
        if bits.is_sharded(work.scope[name]):
            raise InputError(
                f"{name} is sharded: scan the whole model on one process, and give allocation=scan.allocation() for "
                "the sharded one"
            )
    if isinstance(patterns.resolve(pattern), Picked):
        raise PatternError(
            "the groups of this pattern span tensors, which are scanned one by one: give another pattern"
        )
    levels = _levels(sparsities)
    for name in (_WHOLE, *work.scope):
        for level in levels:
            work.plan(name, level)  # what cannot be done is refused now
    if path is not None:
        require_place(checks.path("path", path))
    settings = work.settings(levels)
    results = {} if path is None else _resumed(path, settings)
    left = [trial for trial in settings.trials() if trial not in results]
    payload = _pickled((work, torch.get_rng_state())) if processes > 1 else b""
    with progress_bar("scanning", len(left), shown=progress) as advance:
        for trial, metric in _metrics(work, left, payload, processes):
            results[trial] = metric
            if path is not None:
                _write(path, settings, results)
            advance(1)
    return _result(settings, results)


@dataclass(frozen=True)
class _Work:
    """What a process needs for a trial."""

    model: nn.Module
    evaluate: Evaluate
    score: str | Score | Mapping[str, Tensor]
    pattern: str | Pattern | None
    scope: Scope

    def plan(self, name: str, level: float) -> Plan:
        scope, allocation = self.scope, global_()
        if name != _WHOLE:
            scope = Scope({name: scope.members[name]}, {}, scope.parameters)
            allocation = global_(allow_empty=True)  # a level is met to the weight, in the smallest tensor too
        return plan.make(self.model, level, score=self.score, allocation=allocation, pattern=self.pattern, scope=scope)

    def metric(self, name: str, level: float) -> float:
        if (name, level) == _DENSE:
            return tried(self.model, self.evaluate, "the model as it is")
        where = f"{name or 'all tensors together'} at sparsity {level:g}"
        return tried(self.model, self.evaluate, where, self.plan(name, level))

    def settings(self, levels: tuple[float, ...]) -> _Settings:
        highest = self.plan(_WHOLE, levels[-1])
        masks = chosen(highest)
        named = highest.settings()
        inner = scopes.unwrap(self.model)
        state = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
        made = {
            "model": _hash({name: bits.plain(tensor.detach()) for name, tensor in state.items()}, _layers(inner)),
            "metric": _named(self.evaluate),
            "score": named["score"],
            "pattern": named["pattern"],
            "masks": _hash({name: masks.packed(name) for name in masks}),
        }
        return _Settings(levels, {name: member.free for name, member in self.scope.members.items()}, made)


def _named(evaluate: Evaluate) -> str:
    """The name of a metric and a digest of what it does, since all lambdas have one name."""
    inner: Any = evaluate
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return f"{name} {hashlib.sha256(repr(_recipe(evaluate)).encode()).hexdigest()[:12]}"


def _recipe(thing: Any) -> object:
    """What a function does, as plain data: its code, and the plain values that it was made with; no line numbers."""
    if isinstance(thing, str | bytes | int | float | None):
        return thing
    if isinstance(thing, tuple):
        return [_recipe(one) for one in thing]
    if isinstance(thing, dict):
        return [(key, _recipe(value)) for key, value in thing.items()]
    if isinstance(thing, CodeType):
        return [thing.co_code, thing.co_names, _recipe(thing.co_consts)]
    if isinstance(thing, functools.partial):
        return [_recipe(thing.func), _recipe(thing.args), _recipe(thing.keywords)]
    function = getattr(thing, "__wrapped__", getattr(thing, "__func__", thing))
    if not isinstance(function, FunctionType):
        return type(thing).__qualname__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]  # numbers in them may count calls
    inside = [one if isinstance(one, str) else getattr(one, "__qualname__", type(one).__qualname__) for one in cells]
    made = function.__code__, function.__defaults__, function.__kwdefaults__
    return [function.__qualname__, inside, *map(_recipe, made)]


def _levels(sparsities: Sequence[float]) -> tuple[float, ...]:
    checks.several("sparsities", sparsities, "some fractions, such as (0.5, 0.9)")
    levels = tuple(sorted({float(fraction(level)) for level in sparsities}))
    if not levels or levels[0] == 0 or levels[-1] == 1:
        raise InputError(f"sparsities are {list(levels)}: give at least one, each above 0 and below 1")
    return levels


def _layers(model: nn.Module) -> str:
    """What a model prints, without places in memory: equal weights under another activation are another model."""
    return re.sub("0x[0-9a-fA-F]+", "", repr(model))


def _hash(tensors: Mapping[str, Tensor], words: str = "") -> str:
    """SHA-256 of names, dtypes, shapes and bytes, and of some words."""
    found = hashlib.sha256(words.encode())
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for _, piece in bits.chunks(tensor.reshape(-1)):
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


# ---- trials in this process, or in others ------------------------------------------------------------------------

_HERE: list[_Work] = []  # of a process that was started for a scan: its copy


def _metrics(work: _Work, trials: Sequence[_Trial], payload: bytes, processes: int) -> Iterator[tuple[_Trial, float]]:
    if processes == 1 or trials[:1] == [_DENSE]:  # the first one shows whether the metric is one
        here = trials if processes == 1 else trials[:1]
        for trial in here:
            yield trial, work.metric(*trial)
        trials = trials[len(here) :]
    if not trials:
        return
    threads = max(1, torch.get_num_threads() // processes)
    started = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, started, _begin, (payload, threads)) as pool:
        try:
            futures = {pool.submit(_metric_here, *trial): trial for trial in trials}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise StateError(
                "a process of the scan could not start, or died (what it said is on stderr): evaluate must stand in a "
                "module or in a script with `if __name__ == '__main__':`, and memory must hold a copy of the model for "
                "each; or leave processes at 1"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(payload: bytes, threads: int) -> None:
    torch.set_num_threads(threads)
    work, random = pickle.loads(payload)
    torch.set_rng_state(random)
    _HERE.append(work)


def _metric_here(name: str, level: float) -> float:
    return _HERE[0].metric(name, level)


def _pickled(work: tuple[_Work, Tensor]) -> bytes:
    try:
        return pickle.dumps(work)
    except Exception as error:  # whatever a user's __reduce__ raises
        raise InputTypeError(
            f"what was given cannot go to other processes ({error}): define evaluate, and a score, with `def` at the "
            "top of a module; or leave processes at 1"
        ) from error


# ---- files -------------------------------------------------------------------------------------------------------


def _write(path: str | os.PathLike[str], settings: _Settings, results: Mapping[_Trial, float]) -> None:
    rows = [[name, level, metric] for (name, level), metric in results.items()]
    data = {"format": _FORMAT, **asdict(settings), "results": rows}
    with replacing(checks.path("path", path)) as temporary:
        temporary.write_text(json.dumps(data, indent=1), "utf-8")


def _read(path: str | os.PathLike[str]) -> tuple[_Settings, dict[_Trial, float]]:
    require_file(checks.path("path", path))
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        if data["format"] != _FORMAT:
            raise ValueError("another format")
        weights = {str(name): int(size) for name, size in data["weights"].items()}
        made = {str(key): str(value) for key, value in data["made"].items()}
        settings = _Settings(tuple(map(float, data["sparsities"])), weights, made)
        results = {(str(name), float(level)): float(metric) for name, level, metric in data["results"]}
        if not set(results) <= set(settings.trials()) or not all(map(math.isfinite, results.values())):
            raise ValueError("results of nothing that was asked")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path} holds no scan ({error}): give another path, or remove it") from error
    return settings, results


def _resumed(path: str | os.PathLike[str], settings: _Settings) -> dict[_Trial, float]:
    """The results of a file that is there, if it is of the same scan."""
    if not os.path.lexists(path):
        return {}
    before, results = _read(path)
    words = {
        "model": "another model",
        "metric": "another metric",
        "score": "another score",
        "pattern": "another pattern",
    }
    differ = [word for key, word in words.items() if before.made.get(key) != settings.made[key]]
    differ += ["other tensors"] if dict(before.weights) != dict(settings.weights) else []
    differ += [f"other levels {list(before.sparsities)}"] if before.sparsities != settings.sparsities else []
    if not differ and before.made != settings.made:
        differ = ["other scores"]
    if differ:
        raise InputError(f"{path} holds a scan of {' and '.join(differ)}: give another path, or remove it")
    return results


def _result(settings: _Settings, results: Mapping[_Trial, float]) -> Scan:
    def at_levels(name: str) -> tuple[float, ...]:
        return tuple(results[name, level] for level in settings.sparsities)

    tensors = {name: at_levels(name) for name in settings.weights}
    return Scan(settings.sparsities, results[_DENSE], at_levels(_WHOLE), tensors, settings.weights, settings.made)


def _below(x: Sequence[float], y: Sequence[float], at: Any) -> Any:
    """The largest convex function below some points (x rising), at other places."""
    hull: list[tuple[float, float]] = []
    for c in zip(x, y, strict=True):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (b[1] - a[1]) * (c[0] - b[0]) < (c[1] - b[1]) * (b[0] - a[0]):  # it turns up in b
                break
            hull.pop()
        hull.append(c)
    return np.interp(at, [one[0] for one in hull], [one[1] for one in hull])
