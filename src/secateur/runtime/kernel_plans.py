"""Which kernel each layer got for how many rows, and the times that decided it; plain data that can be saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from secateur.errors import FileError, InputError, listed
from secateur.measurement.timing import NO_DIFFERENCE, duration
from secateur.support import checks
from secateur.support.tables import Printed, Table, folded, percent, size

_VERSION = 1
_CLASSES = range(48)
_SCREEN = (100, 24)  # characters and lines where there is no terminal: most plans fit


@dataclass(frozen=True)
class Timing:
    """Times of a layer for inputs of one row class, in the model, with weights out of the cache.

    Attributes:
        bucket: row class: above 2**(bucket - 1) rows, up to 2**bucket.
        dense_seconds: median of torch's own layer.
        sparse_seconds: median of the sparse kernel.
        sparse: whether a sparse kernel was chosen.
        generated_seconds: median of generated code; None where none was tried.
        generated: whether that was chosen.
        within: the run or network that computes the layer for these inputs although it alone stays dense; or empty.
    """

    bucket: int
    dense_seconds: float
    sparse_seconds: float
    sparse: bool
    generated_seconds: float | None = None
    generated: bool = False
    within: str = ""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: what it is, what was measured, and why it is dense if it is.

    A run of layers that was tried as one call has a plan too: there dense means one layer after the other, each as it
    was chosen, and sparse means fused.

    Attributes:
        name: of the module; of a run, where it is ("head[1:4]", "layers.0[linear1:linear2]").
        kind: class of the module; of a run, that of which it is part; or "network of 20 convolutions".
        shape: of its largest weight; of a run, all widths.
        sparsity: share of zeros in its weight matrices.
        pattern: hash of where the zeros are; empty for a layer that was not tried.
        timings: one for each row class that the examples led to it.
        reason: why no kernel but the dense one is in use; empty where the sparse one is.
        packed_bytes: of its packed weights, which lie beside the dense ones.
        code_bytes: of generated code, with the weights in it.
        released_bytes: of its dense weights, if they were released (`keep_dense=False`); else 0.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    pattern: str = ""
    timings: tuple[Timing, ...] = ()
    reason: str = ""
    packed_bytes: int = 0
    code_bytes: int = 0
    released_bytes: int = 0

    @property
    def run(self) -> bool:
        """Whether it is of a run of layers."""
        return self.name.endswith("]")

    @property
    def choices(self) -> int:
        """Bit b: whether row class b is sparse; a class that was not measured is treated as the nearest one."""
        return self._classes(lambda timing: timing.sparse)

    @property
    def generated(self) -> int:
        """Bit b: whether row class b runs generated code."""
        return self._classes(lambda timing: timing.generated)

    def _classes(self, chosen: Callable[[Timing], bool]) -> int:
        if self.reason or not self.timings:
            return 0
        return sum(1 << b for b in _CLASSES if all(map(chosen, self._nearest(b))))

    def _nearest(self, bucket: int) -> list[Timing]:
        near = min(abs(t.bucket - bucket) for t in self.timings)
        return [t for t in self.timings if abs(t.bucket - bucket) == near]


@dataclass(frozen=True)
class Gain:
    """How many times faster the whole model became on one example: median and 95 % interval of paired blocks."""

    speedup: float
    least: float
    most: float

    @property
    def faster(self) -> bool:
        """Whether the interval leaves no doubt."""
        return self.least > 1

    @property
    def clear(self) -> bool:
        """Whether the times decide: faster, or not faster by more than a tenth."""
        return self.faster or self.most <= 1 + NO_DIFFERENCE

    def __str__(self) -> str:
        spread = f"{self.speedup:.2f}x, 95 % interval {self.least:.2f}x to {self.most:.2f}x"
        if self.faster:
            return f"faster: {spread}"
        unclear = "cannot tell whether it is faster, as the times vary too much"
        return f"{'no faster' if self.clear else unclear} ({spread}): left dense"


@dataclass(frozen=True)
class KernelPlan(Printed):
    """What `accelerate` decided; `str()` is a table that fits the terminal.

    Attributes:
        cpu: name of the processor on which it was measured.
        isa: instruction set of the native kernels; None without the native library.
        threads: CPU threads at the time.
        layers: one `LayerPlan` for each layer with a weight matrix, in the model's order, then runs and networks.
        gains: of the whole model, one for each example; a rejected one went back to dense. Fewer where the tuning was
            interrupted.
        values: dtype of the packed weights; "float16" and "bfloat16" are lossy. On a CUDA device they are
            those of the model.
        gpu: names of the model's CUDA devices; empty if there are none.
        examples: how many the model was tuned for.
        interrupted: whether the tuning was, before all was timed and compared.
        kept: which layers keep their dense weights in spite of `keep_dense=False`, and why; empty if none does.
    """

    cpu: str
    isa: str | None
    threads: int
    layers: tuple[LayerPlan, ...]
    gains: tuple[Gain, ...] = ()
    values: str = "float32"
    gpu: str = ""
    kept: str = ""
    examples: int = 0
    interrupted: bool = False

    @property
    def sparse(self) -> tuple[str, ...]:
        """Names of the layers that are sparse for some inputs."""
        return tuple(layer.name for layer in self.layers if layer.choices)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data for JSON."""
        return {"version": _VERSION, **asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> KernelPlan:
        """A plan from `to_dict()`, also after JSON.

        Raises:
            InputTypeError: no dict. FileError: it is no plan, or of another version.

        >>> plan = KernelPlan("cpu", "avx2", 1, (LayerPlan("0", "Linear", (4, 4), 0.5, reason="too dense"),))
        >>> KernelPlan.from_dict(plan.to_dict()) == plan
        True
        """
        if not isinstance(data, Mapping):
            raise checks.wrong("plan", data, "fast.plan, or its to_dict()")
        try:
            if data["version"] != _VERSION:
                raise ValueError(f"version {data['version']}")
            layers = tuple(_layer(layer) for layer in data["layers"])
            gains = tuple(Gain(**gain) for gain in data["gains"])
            later = {name: data[name] for name in ("gpu", "kept", "examples", "interrupted") if name in data}
            return KernelPlan(data["cpu"], data["isa"], data["threads"], layers, gains, data["values"], **later)
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"this is not a plan of this version of secateur: {error!r}. Tune again, without plan."
            ) from error

    def table(self) -> Table:
        """One row a layer and row class, or for all layers that are alike and were timed as one; notes below."""
        alike = folded((layer.name, (layer.kind, layer.shape, _timed(layer), layer.reason)) for layer in self.layers)
        groups = [(name or "(the model)", [self.layers[i] for i in places]) for name, places in alike]
        rows = [row for group in groups for row in _rows(*group)]
        lossy = "" if self.values == "float32" else f"; packed values: {self.values}, rounded"
        library = (
            f"native kernels: {self.isa}{lossy}" if self.isa else "no native library: torch's CSR and dense kernels"
        )
        kinds = "packed_bytes", "code_bytes", "released_bytes"
        packed, code, released = (sum(getattr(layer, kind) for layer in self.layers) for kind in kinds)
        if packed:
            also = f", generated code {size(code)}" if code else ""
            library += f"; beside the dense weights: packed {size(packed)}{also}"
            library += f"; dense weights released: {size(released)}" if released else ""
        kept = [self.kept] if self.kept else []
        notes = [*self._verdicts(), *kept, f"{library}; threads: {self.threads}; CPU: {self.cpu}"]
        if self.gpu:
            notes.append(f"GPU: {self.gpu}; sparse there: torch's semi-structured (2:4) products")
        runs = [name for name, (layer, *_) in groups if layer.run]
        if runs:
            notes.insert(0, f"{listed(runs)}: several layers; dense is one after the other, sparse is one call for all")
        networks = [name for name, (layer, *_) in groups if layer.kind.startswith("network")]
        if networks:
            notes.insert(0, f"{listed(networks)}: dense is as its layers run alone, sparse is one call for the network")
        header = ["layer", "kind", "weights", "zeros", "rows", "dense", "sparse", "generated", "runs"]
        if not any(row[7] for row in rows):  # nothing was generated
            header, rows = [*header[:7], header[8]], [[*row[:7], row[8]] for row in rows]
        if len(rows) > 1 and len({row[-1] for row in rows}) == 1:
            notes.insert(0, f"all of them run {rows[0][-1]}")
            header, rows = header[:-1], [row[:-1] for row in rows]
        return Table(header, rows, notes=notes, keys=(0, 4))

    def __str__(self) -> str:
        return self.table().text(shutil.get_terminal_size(_SCREEN).columns)

    def _verdicts(self) -> list[str]:
        many = max(self.examples, len(self.gains)) > 1
        told = [f"the whole model{f', example {i}' if many else ''}: {gain}" for i, gain in enumerate(self.gains)]
        left = [str(i) for i in range(len(self.gains), self.examples)]
        if not told and not self.sparse and not self.interrupted:
            return ["the whole model: no faster, all of it dense"]
        if not told or (left and self.interrupted):
            which = f", example{'s' if len(left) > 1 else ''} {', '.join(left)}" if told else ""
            dense = "" if self.sparse else "; all of it is dense"
            told.append(f"the whole model{which}: not compared, as the tuning was interrupted{dense}")
        return told


def without(layer: LayerPlan, buckets: set[int], reason: str) -> LayerPlan:
    """A layer with some row classes back at dense; `reason` is told when no sparse one is left."""
    timings = tuple(replace(t, sparse=False, generated=False) if t.bucket in buckets else t for t in layer.timings)
    lost = not layer.reason and not any(t.sparse for t in timings)
    return replace(layer, timings=timings, reason=reason if lost else layer.reason)


def require_alike(plan: KernelPlan, here: KernelPlan) -> None:
    """Raise an InputError if a plan was measured elsewhere than another one, or is for other weights."""
    measured, now = ((one.cpu, one.isa, one.threads, one.gpu) for one in (plan, here))
    if measured != now:
        raise InputError(
            f"the plan was measured on {plan.cpu} with {plan.isa} kernels and {plan.threads} threads"
            f"{plan.gpu and f' on {plan.gpu}'}, and this is {', '.join(str(one) for one in now if one != '')}. "
            "Leave plan out, and the model is tuned here."
        )
    if plan.values != here.values:
        raise InputError(f"the plan is for values=torch.{plan.values}, and this call is for torch.{here.values}")
    planned, found = ({layer.name: layer for layer in one.layers} for one in (plan, here))
    for name in [*planned, *found]:
        old, new = planned.get(name), found.get(name)
        if old is None or new is None or _identity(old) != _identity(new):
            raise InputError(
                f"the plan is for another model: {name!r} is {_words(new)} here, and {_words(old)} in the plan. "
                "Leave plan out, and the model is tuned again."
            )


def _identity(layer: LayerPlan) -> tuple[Any, ...]:
    return layer.kind, layer.shape, layer.pattern


def _words(layer: LayerPlan | None) -> str:
    if layer is None:
        return "missing"
    return f"{layer.kind} {' x '.join(map(str, layer.shape))} with zeros {layer.pattern[:8] or '(not tried)'}"


def _layer(data: Mapping[str, Any]) -> LayerPlan:
    timings = tuple(Timing(**timing) for timing in data["timings"])
    return LayerPlan(**{**data, "shape": tuple(data["shape"]), "timings": timings})


def _timed(layer: LayerPlan) -> tuple[Timing, ...]:
    """The timings, alike for layers that are each in a run of their own."""
    return tuple(replace(timing, within="a run" if timing.within else "") for timing in layer.timings)


def _rows(name: str, layers: Sequence[LayerPlan]) -> list[list[str]]:
    layer = layers[0]
    shape = ("-" if layer.run else " x ").join(map(str, layer.shape))
    least, most = (percent(bound([one.sparsity for one in layers])) for bound in (min, max))
    start = [name, layer.kind, shape, most if least == most else f"{least[:-2]}-{most}"]
    if not layer.timings:
        return [[*start, "", "", "", "", f"dense: {layer.reason}"]]
    rows = []
    for i, timing in enumerate(layer.timings):
        runs = "dense" + (f": {layer.reason}" if layer.reason else "")
        if timing.within:
            hosts = dict.fromkeys(one.timings[i].within for one in layers)
            runs = f"in {listed([name for name, _ in folded((host, 0) for host in hosts)])}"
        if timing.sparse:
            runs = "generated" if timing.generated else "sparse"
        tried = (timing.dense_seconds, timing.sparse_seconds, timing.generated_seconds)
        rows.append([*start, _span(timing.bucket), *("" if t is None else duration(t) for t in tried), runs])
        start = ["", "", "", ""]
    return rows


def _span(bucket: int) -> str:
    least, most = (1 << bucket >> 1) + 1, 1 << bucket
    return str(most) if bucket < 2 else f"{least}-{most}"
