"""The numbers of the runtime: how fast a pruned model runs, against torch and against what else there is.

    python benchmarks/runtime.py [linear] [conv] [models] [recurrent] [sparsity] [floor] [threads] [avx2] [masks]
                                 [packed] [checks] [generation] [tuning] [peers] [table] [all]
                                 [--json FILE] [--rounds N] [--only TEXT] [--kernel] [--quick]
                                 [--environments FOLDER] [--scratch FOLDER] [--cpu]

Every figure is a speed over torch eager, dense, float32, on the same pruned weights: eager's seconds over those of the
other, taken in one run with all sides in turn (A B A B ...), in blocks of at least 20 ms after one pass to warm up;
the median of the blocks' ratios, the smallest and the largest. Wall clock, one thread, `inference_mode`; layout and
bias are included; buffers are aligned to 64 bytes. Regimes: *hot* is one layer (or model) repeated, *steady* a chain
of distinct layers repeated, *evicted* the chain with 256 MB streamed through the cache before each pass (each pass
timed alone, a block being the median of ten). Models are pruned by `sc.prune(model, s, allocation="uniform")`.
Secateur's side is what a user gets from `sc.accelerate(model, x, threads=1)`, layers left dense included.

"Of roof" is how near a call is to what one core can do at all (runtime_roofs.py measures that): the multiply-adds that
meet no zero weight, over those that it could do in the same time; evicted, the bytes of weights that are not zero, over
those that it could read. "Generated over compiled" is the speed over the same with `generated=False`, taken in turn,
and empty where no code can run (without AVX-512).

On a machine that others use, too, `--cpu` takes seconds of CPU in place of the wall clock's. What is measured at the
moment is told on stderr.

`table` measures secateur against eager alone, with fewer rounds: all that matters of every section, or those that are
named behind it (`table conv tuning`).

"Best dense" is the fastest float32 of eager (convolutions: in both layouts), `torch.compile` (frozen or not) and ONNX
Runtime; OpenVINO has a column of its own. secateur's float16 values, bf16 and int8 are lossy, and shown with their
error. Eager convolutions get channels_last, the others the plain layout. 4096x4096 is a chain of two: more would not
fit in a cache, pruned.

`peers`, when named, creates an environment for each peer in FOLDER (default: `peers` beside this interpreter's `bin`).
Peers are measured there, over the torch eager of that environment. Without any name everything is measured, with those
peers that are installed; `all` is everything, and installs them. `--kernel` also times the C functions alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import runtime_cases as cases
import secateur as sc
from runtime_cases import Case, Encoder, Side, flat, in_turn, ratios, relative_error, yardstick
from runtime_models import Llama
from runtime_roofs import roofs
from secateur.measurement.costs import macs
from secateur.runtime import native, trust_weights
from secateur.support.machine import cpu_name
from secateur.support.tables import Table

HERE = Path(__file__).parent
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "SECATEUR_ISA": "avx2"}  # fmt: skip
COMPILED = "secateur, generated=False"
TOLERANCE = 1e-5  # of secateur, relative to float64
DENSE = "eager", "eager, plain layout", "torch.compile", "torch.compile, frozen", "onnxruntime, dense"
LOSSY = "secateur, float16", "bf16", "dynamic int8"

Row = dict[str, Any]
Found = dict[tuple[str, str], dict[str, dict[str, float]]]  # by case and regime, by "peer, side"

excluded: list[str] = []
notes: list[str] = []
peers_found: Found = {}
plans: dict[str, Any] = {}
tuned: dict[str, float] = {}  # seconds
arguments = argparse.Namespace()


# ---- the sides --------------------------------------------------------------------------------------------------


def pruned(case: Case) -> nn.Module:
    model = case.model()
    if case.sparsity:
        sc.prune(model, case.sparsity, allocation="uniform")
    return model


def secateur(case: Case, model: nn.Module) -> Callable[[], object]:
    x = case.example()
    start = time.perf_counter()
    fast = sc.accelerate(model, x, threads=1)
    plans[case.id], tuned[case.id] = fast.plan, time.perf_counter() - start
    return lambda: fast(x)


def without_code(case: Case, model: nn.Module) -> Callable[[], object]:
    """Today's compiled kernels, and no code made at run time."""
    if not native.generates():
        raise Unsuitable
    x = case.example()
    fast = sc.accelerate(model, x, threads=1, generated=False)
    return lambda: fast(x)


def rounded(case: Case, model: nn.Module) -> Callable[[], object]:
    x = case.example()
    fast = sc.accelerate(model, x, threads=1, values=torch.float16)
    return lambda: fast(x)


def plain_layout(case: Case, model: nn.Module) -> Callable[[], object]:
    if not case.channels_last:
        raise Unsuitable
    x = case.example()
    return lambda: model(x)


def compiled(case: Case, model: nn.Module, freezing: bool = False) -> Callable[[], object]:
    if any(isinstance(m, nn.RNNBase) for m in model.modules()):
        raise Unsuitable  # it calls eager's
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    x, fast = case.example(), model
    if isinstance(model, cases.Stream):
        model.cell.compile(dynamic=False)  # as one who streams would; all frames in one graph take minutes
    else:
        fast = torch.compile(model, dynamic=False)
    with inductor.patch(freezing=freezing), torch.inference_mode():
        fast(x)
        fast(x)
    return lambda: fast(x)


def frozen(case: Case, model: nn.Module) -> Callable[[], object]:
    """Inductor may lay the weights out as it likes."""
    return compiled(case, model, freezing=True)


class SparseLinear(nn.Module):
    """A Linear layer on torch's CSR, in the faster of the ways to write it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach().to_sparse_csr(), layer.bias.detach()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.weight, x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])


def torch_csr(case: Case, model: nn.Module) -> Callable[[], object]:
    if not swap(model, nn.Linear, SparseLinear):
        raise Unsuitable
    x = case.example()

    @torch.no_grad()
    @torch.inference_mode(False)  # under which it raises
    def call() -> object:
        return model(x)

    return call


def swap(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> bool:
    found = [(parent, name) for parent in model.modules() for name, m in parent.named_children() if type(m) is kind]
    for parent, name in found:
        setattr(parent, name, make(getattr(parent, name)))
    return bool(found)


def bf16(case: Case, model: nn.Module) -> Callable[[], object]:
    x = case.example()
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16) if x.is_floating_point() else x
    if case.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return lambda: model(x)


def int8(case: Case, model: nn.Module) -> Callable[[], object]:
    kinds = {nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
    if not any(type(m) in kinds for m in model.modules()):
        raise Unsuitable
    x, holder = case.example(), nn.ModuleList([model])  # a bare LSTM has no parent that could hold its successor
    holder = torch.ao.quantization.quantize_dynamic(holder, kinds, torch.qint8)
    return lambda: holder[0](x)


SIDES: dict[str, Callable[[Case, nn.Module], Callable[[], object]]] = {
    "eager": yardstick, "secateur": secateur, COMPILED: without_code, "eager, plain layout": plain_layout,
    "torch.compile": compiled, "torch.compile, frozen": frozen,
    "torch CSR": torch_csr, "secateur, float16": rounded, "bf16": bf16, "dynamic int8": int8,
}  # fmt: skip
LITTLE = "eager", "secateur"
TABLE = "eager", "secateur", COMPILED


class Unsuitable(Exception):
    """This side has nothing to offer for this model."""


def measure(case: Case, names: tuple[str, ...] = tuple(SIDES)) -> list[Row]:
    """One row a regime: the speed of every side over eager."""
    if arguments.only and arguments.only not in case.point:
        return []
    print(f"{case.point}, {case.sparsity:.0%} pruned", file=sys.stderr, flush=True)
    model, calls, errors = pruned(case), {}, {}
    names = names if not arguments.table else tuple(name for name in names if name in TABLE)
    with torch.inference_mode():
        x = case.example()
        reference = flat(copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x))
    if arguments.kernel:
        import runtime_kernels

        SIDES["the C function"] = runtime_kernels.call
        names = (*names, "the C function")
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                calls[name] = SIDES[name](case, copy.deepcopy(model))
                with torch.inference_mode():
                    errors[name] = relative_error(calls[name](), reference)
        except (Unsuitable, NotImplementedError):
            calls.pop(name, None)
        except Exception as error:
            calls.pop(name, None)
            leave_out(f"{name} on {case.point}", f"{type(error).__name__}: {error}")
    if errors.get("secateur", 0) > TOLERANCE:
        leave_out(f"secateur on {case.point}", f"is wrong by {errors['secateur']:.2g}")
    rows = []
    for regime, goal in case.goals.items():
        with torch.inference_mode():
            seconds = in_turn({name: Side(call) for name, call in calls.items()}, regime, rounds(regime))
        found = ratios(seconds)
        code = ratios(seconds, COMPILED)["secateur"]["ratio"] if {COMPILED, "secateur"} <= set(seconds) else None
        for name, figures in found.items():
            figures["error"] = errors[name]
        rows.append({"id": case.id, "point": case.point, "sparsity": case.sparsity, "regime": regime,
                     "eager us": 1e6 * statistics.median(seconds["eager"]), "sides": found, "goal": goal,
                     "of roof": of_roof(case, model, regime, seconds), "generated over compiled": code,
                     "sparse layers": sparse_layers(case), "tuned": tuned.get(case.id)})  # fmt: skip
    return rows


def sparse_layers(case: Case) -> str | None:
    """How many of the layers with a weight matrix are sparse for this input."""
    plan = plans.get(case.id)
    if plan is None:
        return None
    layers = [layer for layer in plan.layers if not layer.run and not layer.kind.startswith("network")]
    fused = ", fused" if any(layer.choices for layer in plan.layers if layer not in layers) else ""
    return f"{sum(bool(layer.choices) for layer in layers)} of {len(layers)}{fused}"


def of_roof(case: Case, model: nn.Module, regime: str, seconds: Mapping[str, list[float]]) -> float | None:
    """How near secateur's fastest block is to the roof of its regime, which is of the fastest, too."""
    if roofs() is None or "secateur" not in seconds:
        return None
    if regime == "evicted":
        weights = sum(int(w.count_nonzero()) for w in model.parameters() if w.dim() > 1)
        work = 0.0, (5 if native.isa() == "avx512" else 6) * weights  # the value, and a byte or two that say where
    else:
        counted = macs(model, ((case.example(),), {}))
        work = (counted["macs"] or 0) - (counted["zero_macs"] or 0), 0.0
    return roofs().share(*work, min(seconds["secateur"]))  # type: ignore[union-attr]


def rounds(regime: str) -> int:
    if arguments.table:
        return 5
    return 3 if arguments.quick else max(3, arguments.rounds // 3) if regime == "evicted" else arguments.rounds


def leave_out(what: str, why: str) -> None:
    excluded.append(f"{what} ({' '.join(why.split())[:160]})")


# ---- sections ---------------------------------------------------------------------------------------------------


def linear() -> list[Row]:
    return [row for case in cases.linear_cases() for row in measure(case)]


def conv() -> list[Row]:
    return [row for case in cases.conv_cases() for row in measure(case)]


def models() -> list[Row]:
    return [row for case in cases.model_cases() for row in measure(case)]


def recurrent() -> list[Row]:
    return [row for case in cases.recurrent_cases() for row in measure(case)]


def sparsity() -> list[Row]:
    return [row for case in cases.sparsity_cases() for row in measure(case)]


def floor() -> list[Row]:
    return [row for s in (0.0, 0.3, 0.5, 0.6) for case in cases.floor_cases(s) for row in measure(case, LITTLE)]


def threads() -> list[Row]:
    """Two threads over one, of secateur and of eager."""
    rows = []
    if (os.cpu_count() or 1) < 2:
        leave_out("threads", "one core")
        return rows
    if arguments.cpu:
        leave_out("threads", "two take as many seconds of CPU as one")
        return rows
    for case in (case for case in cases.thread_cases() if arguments.only in case.point):
        x, model, sides = case.example(), pruned(case), {}
        for count in (1, 2):
            torch.set_num_threads(count)
            sides[f"eager, {count}"] = Side(yardstick(case, copy.deepcopy(model)), count)
            try:
                fast = sc.accelerate(model, x, threads=count)
                sides[f"secateur, {count}"] = Side(lambda fast=fast, x=x: fast(x), count)
            except Exception as error:
                leave_out("secateur on threads", f"{type(error).__name__}: {error}")
        torch.set_num_threads(1)
        for regime, goal in case.goals.items():
            with torch.inference_mode():
                seconds = in_turn(sides, regime, rounds(regime))
            for name in ("secateur", "eager"):
                if f"{name}, 2" in seconds:
                    two_over_one = ratios(seconds, f"{name}, 1")[f"{name}, 2"]
                    rows.append({"point": case.point, "regime": regime, "two threads over one, of": name,
                                 **two_over_one, "goal": goal if name == "secateur" else None})  # fmt: skip
    return rows


def avx2() -> list[Row]:
    """In a process of its own, in which torch, MKL, oneDNN and secateur are held to AVX2."""
    if os.environ.get("SECATEUR_ISA") == "avx2":
        return [row for case in cases.avx2_cases() for row in measure(case, LITTLE)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "avx2.json")
        options = ["--json", str(file), "--rounds", str(arguments.rounds), "--only", arguments.only]
        options += [f"--{name}" for name in ("quick", "cpu") if getattr(arguments, name)]
        subprocess.run([sys.executable, __file__, "avx2", *options], env={**os.environ, **AVX2}, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        found = json.loads(file.read_text())
    excluded.extend(f"AVX2: {what}" for what in found["settings"]["excluded"])
    notes.append(f"AVX2: {found['settings']['machine']}. MKL ignores its variable on processors that are not Intel's.")
    return found["avx2"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def instructions(name: str) -> Iterator[bool]:
    """Whether there are kernels for an instruction set, which are then used."""
    library, before = native.library(), native.isa()
    if library is None or before is None or library.secateur_set_isa(name.encode()):
        yield False
        return
    try:
        yield True
    finally:
        library.secateur_set_isa(before.encode())


def blob(name: str, weight: Tensor, values: torch.dtype) -> Tensor | None:
    """A matrix packed for an instruction set, if there are kernels for it."""
    with instructions(name) as there:
        return native.pack(weight, values=values) if there else None


def masks() -> list[Row]:
    """One input on AVX2: the C function on matrices packed with masks, over the same on panels alone, in turn."""
    rows: list[Row] = []
    library, x, y = native.library(), torch.randn(1, 1024), torch.empty(1, 1024)
    for sparsity in (0.5, 0.7):
        weight = pruned(cases.linear(1024, 1024, 1, 1, {}, sparsity)).layers[0].weight  # type: ignore[union-attr, index]
        for values in native.VALUES:
            panels, masked = (blob(name, weight, values) for name in ("portable", "avx2"))
            if library is None or panels is None or masked is None:
                leave_out("masks", "no AVX2 kernels")
                return rows
            sides = {name: Side(functools.partial(library.secateur_linear, one.data_ptr(), None, x.data_ptr(), 1, None,
                                                  y.data_ptr(), 1))
                     for name, one in (("panels", panels), ("masks", masked))}  # fmt: skip
            with instructions("avx2"):
                found = ratios(in_turn(sides, "hot", rounds("hot")), "panels")["masks"]
            rows.append({"1024x1024": f"{sparsity:.0%} pruned, {values}", "masks over panels": found["ratio"],
                         "least": found["least"], "most": found["most"]})  # fmt: skip
    return rows


def packed() -> list[Row]:
    """Bytes of packed weights: AVX-512 has tiles beside panels, AVX2 masks where enough weights are left."""
    rows: list[Row] = []
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        weight = pruned(cases.linear(1024, 1024, 1, 1, {}, sparsity)).layers[0].weight  # type: ignore[union-attr, index]
        count, dense = int(weight.count_nonzero()), 4 * weight.numel()
        for values in native.VALUES:
            found = {name: blob(name, weight, values) for name in ("portable", "avx512", "avx2")}
            size = {name: None if one is None else one.numel() for name, one in found.items()}
            both = found["avx512"]
            panels = size["portable"] if both is None else int(both[104:112].view(torch.int64))  # tiles lie behind them
            rows.append({"1024x1024": f"{sparsity:.0%} pruned, {values}",
                         "panels, bytes a non-zero": panels and panels / count,
                         "tiles": both if both is None or panels is None else (both.numel() - panels) / count,
                         **{f"{name}, over dense float32": one and one / dense
                            for name, one in size.items()}})  # fmt: skip
    return rows


def checks() -> list[Row]:
    """What the search for edited weights costs: accelerated models that look, over copies that trust, in turn."""
    rows: list[Row] = []
    for count in (1, 24):
        case = cases.linear(1024, 1024, 1, count, {})
        x = case.example()
        fast = sc.accelerate(pruned(case), x, threads=1)
        trusting = copy.deepcopy(fast)
        trust_weights(trusting)
        sides = {"eager": Side(lambda: trusting(x)), "looks": Side(lambda: fast(x))}  # noqa: B023
        with torch.inference_mode():
            seconds = in_turn(sides, "steady", 3 * rounds("steady"))
        cost = sorted(b / a - 1 for a, b in zip(seconds["eager"], seconds["looks"], strict=True))
        rows.append({"chain of Linear 1024x1024, N=1, 90 % pruned": count,
                     "trusting us": 1e6 * statistics.median(seconds["eager"]),
                     "looking costs %": 100 * statistics.median(cost), "first quartile": 100 * cost[len(cost) // 4],
                     "third": 100 * cost[-len(cost) // 4]})  # fmt: skip
    return rows


def generation() -> list[Row]:
    """What code costs to make, and to hold: at load, on one thread; it is made here even where it cannot run."""
    rows: list[Row] = []
    if native.library() is None:
        leave_out("generation", "no native library")
        return rows
    for side in (512, 1024, 2048):
        weight = pruned(cases.linear(side, side, 1, 1, {})).layers[0].weight  # type: ignore[union-attr, index]
        blob, count, seconds = native.pack(weight), int(weight.count_nonzero()), []
        for _ in range(4 * rounds("hot")):
            start = time.process_time()
            code = native.generate(blob, run=0)
            seconds.append(time.process_time() - start)
        rows.append({"90 % pruned": f"Linear {side}x{side}", "ns a non-zero": 1e9 * statistics.median(seconds) / count,
                     "least": 1e9 * min(seconds) / count, "must": 60, "aim": 45,
                     "bytes a non-zero: code": code.bytes / count, "packed": blob.numel() / count,
                     "in all": (code.bytes + blob.numel()) / count, "must ": 20, "aim ": 16})  # fmt: skip
    return rows


def tuning() -> list[Row]:
    """How long `accelerate` takes for a large model, by the clock and by the CPU."""
    torch.manual_seed(0)
    model = Llama().eval()
    sc.prune(model, 0.9, allocation="uniform")
    wall, cpu = time.perf_counter(), time.process_time()
    fast = sc.accelerate(model, [torch.randint(0, 8192, (1, count)) for count in (1, 32)], threads=1)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gains = " and ".join(f"{gain.speedup:.2f}" for gain in fast.plan.gains)
    return [{"Llama of 24 layers, 333 million weights, 90 % pruned": "1 and 32 tokens", "seconds": wall,
             "of CPU": cpu, "must": 20, "aim": 10, "speed over eager": gains}]  # fmt: skip


# ---- peers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """What to install, which rows it can run, and which of its sides are sparse or dense float32."""

    packages: tuple[str, ...]
    takes: Callable[[Case], bool] = lambda case: True
    python: tuple[int, int] | None = None  # the newest that it has wheels for


HUGGING_FACE = "transformers"
PEERS = {
    "onnxruntime": Peer(("onnxruntime", "onnx", HUGGING_FACE)),
    "openvino": Peer(("openvino", HUGGING_FACE)),
    "deepsparse": Peer(("deepsparse==1.8.0", HUGGING_FACE), python=(3, 11)),
    "mkl": Peer(("mkl",), lambda case: case.point.startswith(("Linear", "conv 1x1"))),
}
OPSETS = {"onnxruntime": 17, "openvino": 17, "deepsparse": 13}


def peers(install: bool) -> list[Row]:
    environments = {name: python for name in PEERS if (python := environment(name, install)) is not None}
    if not environments:
        return []
    wanted = [case for case in cases.goal_cases() if arguments.only in case.point]
    with tempfile.TemporaryDirectory(prefix="secateur-bench-", dir=arguments.scratch) as folder:
        asked = {case.id: prepared(case, Path(folder)) for case in wanted}
        by_id = {case.id: case for case in wanted}
        rows = []
        for name, python in environments.items():
            mine = [asked[case.id] for case in wanted if PEERS[name].takes(case)]
            for line in answers(name, python, mine, Path(folder, "request.json")):
                if "cannot" in line:
                    leave_out(f"{name} on {by_id[line['id']].point}", line["cannot"])
                    continue
                rows.append({"peer": name, "point": by_id[line["id"]].point, "sparsity": by_id[line["id"]].sparsity,
                             **line})  # fmt: skip
                sides = {f"{name}, {side}": figures for side, figures in line["sides"].items() if side != "eager"}
                peers_found.setdefault((line["id"], line["regime"]), {}).update(sides)
    return rows


def environment(name: str, install: bool) -> Path | None:
    """The interpreter of a peer's environment, which is made on request."""
    folder, peer = arguments.environments / name, PEERS[name]
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    if not install:
        leave_out(name, "not installed: python benchmarks/runtime.py peers")
        return None
    base = sys.executable
    if peer.python is not None and sys.version_info[:2] > peer.python:
        base = shutil.which("python{}.{}".format(*peer.python)) or ""
        if not base:
            leave_out(name, "needs Python {}.{}".format(*peer.python))
            return None
    same = {HUGGING_FACE: f"{HUGGING_FACE}=={version(HUGGING_FACE)}"}
    packages = [same.get(package, package) for package in peer.packages]
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(HERE.parent / "constraints.txt"), "numpy", "torch"]
    try:
        subprocess.run([base, "-m", "venv", str(folder)], check=True, capture_output=True, text=True)
        subprocess.run([*pip, *packages], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        leave_out(name, f"cannot be installed: {error.stderr[-300:]}")
        return None
    done.touch()
    return python


def prepared(case: Case, folder: Path) -> dict[str, Any]:
    """The pruned weights and the ONNX files of a case, for all peers."""
    model, x = pruned(case), case.example()
    state = folder / f"{case.id}.pt"
    torch.save(model.state_dict(), state)
    if isinstance(model, Encoder):
        model.bert.set_attn_implementation("eager")  # in operators that engines know how to fuse
    files = {}
    for opset in sorted(set(OPSETS.values())):
        files[str(opset)] = str(folder / f"{case.id}-{opset}.onnx")
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), files[str(opset)], dynamo=False, opset_version=opset, input_names=["x"])
    return {"id": case.id, "state": str(state), "onnx": files}


def answers(name: str, python: Path, asked: list[dict[str, Any]], request: Path) -> list[dict[str, Any]]:
    """What a peer's process prints; one that dies is started again behind the case it died of."""
    lines = []
    while asked:
        request.write_text(json.dumps({"rounds": {r: rounds(r) for r in ("hot", "steady", "evicted")}, "cases": [
            {**one, "onnx": one["onnx"].get(str(OPSETS.get(name)))} for one in asked]}))  # fmt: skip
        command = [str(python), "-W", "ignore", str(HERE / "runtime_peers.py"), name, str(request)]
        done = subprocess.run(command, capture_output=True, text=True)
        said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        lines += [line for line in said if "begun" not in line]
        if done.returncode == 0:
            break
        begun = [line["id"] for line in said if "begun" in line]
        if not begun:
            leave_out(name, f"does not start: {done.stderr[-160:]}")
            break
        if begun[-1] not in {line["id"] for line in lines}:
            lines.append({"id": begun[-1], "cannot": f"its process ended with {done.returncode}"})
        asked = asked[[one["id"] for one in asked].index(begun[-1]) + 1 :]
    return lines


# ---- tables -----------------------------------------------------------------------------------------------------


def speeds(rows: list[Row]) -> list[Row]:
    """Secateur over eager and over the best dense, beside the best sparse peer and the goals."""
    shown = []
    for row in rows:
        ours, others = row["sides"].get("secateur", {}), rivals(row)
        dense = {name: others[name]["ratio"] for name in DENSE if name in others}
        sparse = {name: figures["ratio"] for name, figures in others.items()
                  if name.startswith(("torch CSR", "deepsparse", "mkl, layout"))}  # fmt: skip
        best = max(dense, key=dense.__getitem__)
        peer = max(sparse, key=sparse.__getitem__, default=None)
        speed = ours.get("ratio")
        openvino = max((others[name]["ratio"] for name in others if name.startswith("openvino")), default=None)
        shown.append({**named(row), "eager us": row["eager us"], "secateur": speed, "least": ours.get("least"),
                      "most": ours.get("most"), "generated over compiled": row["generated over compiled"],
                      "of roof": row["of roof"], "sparse layers": row["sparse layers"],
                      "over best dense": speed and speed / dense[best], "which is": best,
                      "over OpenVINO": speed and openvino and speed / openvino,
                      "best sparse peer": sparse.get(peer), "which is ": peer,  # type: ignore[arg-type]
                      **goals(row), **kernel(row), "error": ours.get("error"), "tuned in s": row["tuned"]})  # fmt: skip
    return shown


def rivals(row: Row) -> dict[str, dict[str, float]]:
    return {**row["sides"], **peers_found.get((row["id"], row["regime"]), {})}


def named(row: Row) -> Row:
    return {f"{row['sparsity']:.0%} pruned": row["point"], "regime": row["regime"]}


def goals(row: Row) -> Row:
    must, aim = row["goal"] or (None, None)
    return {"must": must, "aim": aim}


def kernel(row: Row) -> Row:
    side = row["sides"].get("the C function")
    return {"the C function": side and side["ratio"]} if arguments.kernel else {}


def below(row: Row) -> bool:
    return row["goal"] is not None and row["sides"].get("secateur", {}).get("ratio", 0) < row["goal"][0]


def lossy(rows: list[Row]) -> list[Row]:
    """Dense rivals that give up accuracy: their speed over eager, and their error."""
    shown = []
    for row in rows:
        others = rivals(row)
        line = {**named(row), "secateur": others.get("secateur", {}).get("ratio")}
        for name in (*LOSSY, "onnxruntime, dynamic int8"):
            side = others.get(name, {})
            line |= {name: side.get("ratio"), f"error of {name}": side.get("error")}
        shown.append(line)
    return shown


def all_peers(rows: list[Row]) -> list[Row]:
    """Each side of each peer: its speed over the torch eager of its own environment."""
    return [
        {**named(row), "peer": row["peer"], "side": side, "eager us": 1e6 * row["eager"], "speed": figures["ratio"],
         "least": figures["least"], "most": figures["most"], "error": figures.get("error")}
        for row in rows for side, figures in row["sides"].items() if side != "eager"
    ]  # fmt: skip


def two_threads(rows: list[Row]) -> list[Row]:
    return [{**{k: v for k, v in row.items() if k != "goal"}, **goals(row)} for row in rows]


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "linear": linear, "conv": conv, "models": models, "recurrent": recurrent, "sparsity": sparsity, "floor": floor,
    "threads": threads, "avx2": avx2, "masks": masks, "packed": packed, "checks": checks,
    "generation": generation, "tuning": tuning,
}  # fmt: skip


SHOWN: dict[str, Callable[[list[Row]], list[Row]]] = {
    "threads": two_threads,
    "masks": list,
    "packed": list,
    "checks": list,
    "generation": list,
    "tuning": list,
}  # others: as speeds


def show(title: str, rows: list[Row]) -> None:
    """Print rows as one table; those of another sparsity under a header of their own."""
    for header in dict.fromkeys(tuple(row) for row in rows):
        chosen = [row for row in rows if tuple(row) == header]
        filled = [name for name in header if any(row[name] is not None for row in chosen)]
        cells = [[cell(row[name]) for name in filled] for row in chosen]
        print(f"\n{title}\n{Table([name.strip() for name in filled], cells).text(None)}", flush=True)


def cell(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=[], help=", ".join([*SECTIONS, "peers", "table"]))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=21, help="blocks of each side (21; evicted: a third)")
    parser.add_argument("--only", default="", help="rows whose name has this")
    parser.add_argument("--kernel", action="store_true", help="also time the C functions alone")
    parser.add_argument("--quick", action="store_true", help="three rounds: does everything run?")
    parser.add_argument("--environments", type=Path, default=Path(sys.prefix, "peers"), help="of the peers")
    parser.add_argument("--scratch", type=Path, help="a folder for 8 GB of models; default: that of temporary files")
    parser.add_argument("--cpu", action="store_true", help="seconds of CPU, not of the wall clock")
    parser.parse_args(namespace=arguments)
    if arguments.cpu:
        cases.clock = time.process_time
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if native.isa() is None:
        leave_out("secateur's kernels", "not built: secateur's figures are those of torch")
    found: dict[str, Any] = {}
    everything = [*SECTIONS, "peers"]
    install = bool({"peers", "all"} & set(arguments.which))
    chosen = everything if arguments.which in ([], ["all"]) else arguments.which
    arguments.table = arguments.which[:1] == ["table"]
    if arguments.table:
        chosen = chosen[1:] or [name for name in SECTIONS if name not in ("avx2", "masks", "packed", "checks")]
    if unknown := set(chosen) - set(everything):
        parser.error(f"no section is named {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    if "peers" in chosen:  # first: the tables below show them
        found["peers"] = peers(install)
        show("peers, over the torch eager of their own environment", all_peers(found["peers"]))
    for name in chosen:
        if name == "peers":
            continue
        found[name] = rows = SECTIONS[name]()
        show(name, SHOWN.get(name, speeds)(rows))
        if name not in ("floor", "avx2", *SHOWN) and not arguments.table:
            show(f"{name}: lossy rivals, dense", lossy(rows))
    missed = [f"{row['point']}, {row['sparsity']:.0%} pruned, {row['regime']}" for name in found
              if name in SECTIONS and name not in SHOWN for row in found[name] if below(row)]  # fmt: skip
    print("\nBelow must:", "\n- ".join(["", *missed]) if missed else "none.")
    print("\nExcluded:", "\n- ".join(["", *excluded]) if excluded else "nothing.")
    print(
        "\n".join(
            [f"One thread but for the section on threads. {machine()}.", f"{roofs() or 'No roofs: no cc'}.", *notes]
        )
    )
    if arguments.json:
        settings = {
            "machine": machine(),
            "rounds": arguments.rounds,
            "quick": arguments.quick,
            "excluded": excluded,
            "notes": notes,
        }
        arguments.json.write_text(json.dumps({"settings": settings, **found}, indent=1))


def machine() -> str:
    return (f"{cpu_name()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, torch {torch.__version__} "
            f"({torch.backends.cpu.get_cpu_capability()}), secateur's kernels: {native.isa()}")  # fmt: skip


if __name__ == "__main__":
    main()
