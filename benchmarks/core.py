"""The numbers of the core: selection, re-masking, the forward while training, and the import.

    python benchmarks/core.py [selection] [remask] [forward] [import] [--json FILE]

Every figure is a ratio, taken in one run with both sides in turn (A B A B ...), on one thread, after a warm-up;
the median is shown, with the smallest and the largest. CPU time, except for the forward (wall clock). Memory is the
peak resident size above the start, in a fresh process for each method (Linux only: /proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import secateur as sc
from secateur.sparsity import fraction, half_up
from secateur.support.tables import Table

HERE = Path(__file__).parent
SIDE = 2048  # square matrices, 4.2 million weights each: the size of a layer of a mid-sized transformer


def linears(millions: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(round(millions * 1e6 / SIDE**2))))


# ---- selection: 90 % of all weights, with masks -----------------------------------------------------------------


def abs_sum(model: nn.Module) -> object:
    return sum(w.detach().abs().sum() for w in model.parameters())


def secateur_masks(model: nn.Module) -> object:
    """Choose the masks as `sc.prune` does, without writing the zeros: what the peers below do too."""
    from secateur import plan

    chosen = plan.make(model, 0.9, score="magnitude", allocation="global", pattern=None, scope=None)
    return chosen.masks(chosen.counts())


def global_unstructured(model: nn.Module) -> object:
    """torch.nn.utils.prune; run on a copy of the module list that shares the weights, so that the model stays."""
    copies = [nn.Linear(1, 1, bias=False) for _ in model]  # type: ignore[attr-defined]
    for copy, layer in zip(copies, model, strict=True):  # type: ignore[call-overload]
        copy.weight = layer.weight
    torch_prune.global_unstructured(
        [(copy, "weight") for copy in copies], pruning_method=torch_prune.L1Unstructured, amount=0.9
    )
    return [copy.weight_mask for copy in copies]


def cat_topk(model: nn.Module) -> object:
    """All magnitudes in one tensor, topk of the smaller side."""
    flat = torch.cat([w.detach().abs().flatten() for w in model.parameters()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.topk(flat, len(flat) - half_up(fraction(0.9) * len(flat))).indices] = True
    return mask


def cat_kthvalue(model: nn.Module) -> object:
    """All magnitudes in one tensor, kthvalue, then a comparison (ties make the count inexact)."""
    flat = torch.cat([w.detach().abs().flatten() for w in model.parameters()])
    kth = flat.kthvalue(int(0.9 * len(flat))).values
    return [w.detach().abs() > kth for w in model.parameters()]


def numpy_partition(model: nn.Module) -> object:
    """All magnitudes in one array, partition in place, then a comparison (ties make the count inexact)."""
    flat = np.concatenate([w.detach().abs().flatten().numpy() for w in model.parameters()])
    k = int(0.9 * len(flat))
    flat.partition(k)
    return [w.detach().abs() > float(flat[k]) for w in model.parameters()]


METHODS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "secateur": (secateur_masks, "exact"),
    "global_unstructured (L1)": (global_unstructured, "exact"),
    "cat + topk": (cat_topk, "exact"),
    "cat + kthvalue": (cat_kthvalue, "but for ties"),
    "numpy partition": (numpy_partition, "but for ties"),
}


def selection(rounds: int = 5) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for millions, names in ((10, list(METHODS)), (100, list(METHODS)), (400, ["secateur"])):
        model = linears(millions)
        timed = {name: METHODS[name][0] for name in names}
        ratios = in_turn({"base": abs_sum, **timed}, model, rounds=3 if millions == 100 else rounds)
        for name in names:
            peak = extra_memory(name, millions)
            rows.append({"million weights": millions, "method": name, "count": METHODS[name][1], **ratios[name],
                         "peak extra memory / model": peak})  # fmt: skip
        del model
        gc.collect()
    return rows


def in_turn(
    methods: dict[str, Callable[[nn.Module], object]], model: nn.Module, rounds: int
) -> dict[str, dict[str, float]]:
    """CPU seconds of each method over those of "base" in the same round."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        seconds = {}
        for name, method in methods.items():
            repeats = 5 if name == "base" else 1  # the yardstick is short: take its mean
            start = time.process_time()
            for _ in range(repeats):
                method(model)
            seconds[name] = (time.process_time() - start) / repeats
        if turn:  # the first round warms up
            for name in methods:
                found[name].append(seconds[name] / seconds["base"])
    return {name: spread(values) for name, values in found.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"ratio": statistics.median(values), "least": min(values), "most": max(values)}


def extra_memory(name: str, millions: int) -> float:
    code = f"import core; core.report_memory({name!r}, {millions})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE)
    return float(done.stdout.split()[-1])


def report_memory(name: str, millions: int) -> None:
    torch.set_num_threads(1)
    METHODS[name][0](linears(5))  # imports and workspaces are not the method's
    model = linears(millions)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    METHODS[name][0](model)
    print((_resident("VmHWM") - before) / sum(4 * w.numel() for w in model.parameters()))


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# ---- re-masking, over one Adam step -----------------------------------------------------------------------------


def remask(rounds: int = 9) -> list[dict[str, object]]:
    models = {
        "16 Linear 2048x2048 (67M)": linears(67),
        "LSTM 2x512 (3.7M)": nn.LSTM(256, 512, 2),
        "LSTM 8-128 (0.07M), the demo's": nn.LSTM(8, 128),
    }
    rows: list[dict[str, object]] = []
    for title, model in models.items():
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        pruner = sc.Pruner(model, 0.9)
        pruner.step()  # one shot
        for kind, options in (("Adam", {}), ("Adam, foreach", {"foreach": True}), ("Adam, fused", {"fused": True})):
            adam = torch.optim.Adam(parameters, lr=1e-6, **options)  # type: ignore[arg-type]
            repeats = max(1, round(2e6 / sum(p.numel() for p in parameters)))
            sides = {"base": lambda _: [adam.step() for _ in range(repeats)],  # noqa: B023
                     "remask": lambda _: [pruner.step() for _ in range(repeats)]}  # fmt: skip  # noqa: B023
            rows.append({"model": title, "over": kind, **in_turn(sides, model, rounds)["remask"]})
    return rows


# ---- the forward while training ---------------------------------------------------------------------------------


def forward(rounds: int = 9) -> list[dict[str, object]]:
    cases: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
        "Linear 1024x1024, batch 1": (lambda: nn.Linear(1024, 1024), torch.randn(1, 1024)),
        "Linear 1024x1024, batch 32": (lambda: nn.Linear(1024, 1024), torch.randn(32, 1024)),
        "LSTM 2x512, 50 steps, batch 16": (lambda: nn.LSTM(256, 512, 2), torch.randn(50, 16, 256)),
    }
    rows: list[dict[str, object]] = []
    for title, (make, x) in cases.items():
        dense, ours, theirs = make(), make(), make()
        pruner = sc.Pruner(ours, 0.9)
        pruner.attach(torch.optim.SGD(ours.parameters(), lr=0.1))
        for name in [name for name, p in theirs.named_parameters() if p.ndim > 1]:
            torch_prune.l1_unstructured(theirs, name, amount=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ratios = interleaved({"base": dense, "secateur": ours, "torch.nn.utils.prune": theirs}, x, rounds)
        rows += [{"forward in train() mode": title, "method": name, **ratios[name]} for name in list(ratios)[1:]]
    return rows


def interleaved(models: dict[str, nn.Module], x: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = {name: [] for name in models}
    repeats = 1
    while _seconds(models["base"], x, repeats) < 0.05:
        repeats *= 2
    for turn in range(rounds + 1):
        names = list(models) if turn % 2 else list(models)[::-1]
        seconds = {name: _seconds(models[name], x, repeats) for name in names}
        if turn:
            for name in models:
                found[name].append(seconds[name] / seconds["base"])
    return {name: spread(values) for name, values in found.items()}


def _seconds(model: nn.Module, x: torch.Tensor, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        model(x)
    return time.perf_counter() - start


# ---- the import -------------------------------------------------------------------------------------------------


def importing(rounds: int = 7) -> list[dict[str, object]]:
    code = "import time, torch; start = time.perf_counter(); import secateur; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(rounds)]
    seconds = [float(run.stdout) for run in runs]
    return [{"import secateur, beyond import torch": "seconds", **spread(seconds)}]


BENCHMARKS = {"selection": selection, "remask": remask, "forward": forward, "import": importing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in arguments.which:
        found[name] = rows = BENCHMARKS[name]()
        header = list(rows[0])
        cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        print(f"\n{name}\n{Table(header, cells).text(None)}", flush=True)
    print(
        "\nExcluded: at 400 million weights the peers, which need 2 to 13 times the model's 1.6 GB. "
        f"torch {torch.__version__}, one thread."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
