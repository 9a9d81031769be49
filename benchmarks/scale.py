"""What choosing and holding masks costs where a model is sharded (FSDP2), on 1, 2 and 4 processes of this machine.

    python benchmarks/scale.py [--millions N ...] [--ranks N ...] [--rounds N] [--quick] [--json FILE]

The model is a stack of linear layers of 1,000 x 1,000, each under `fully_shard`, and is trained with Adam on 64 rows.
One step in two changes the masks ("update"), the others hold them ("held"), so that all is measured in turn. Times are
CPU seconds of a process on one thread, the median of the rounds, of the slowest process; what it waits for the others
is not in them, and so neither is the time on the wire. "update / Adam" is a change of the masks over the step of the
optimizer just before it; "held / step" is what the hooks of the Pruner take in a step that changes nothing, over the
whole step: forward, backward, communication, Adam. Bytes are those of the tensors that a process hands to
`all_reduce` while masks change, counted. "extra" is the peak memory of a change above that before it, over the bytes of
the weights that are there (Linux only).
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import secateur as sc
from secateur.support.tables import Table

SIDE = 1000
KINDS = {
    "fp32": (torch.float32, {"foreach": True}),
    "fp32, fused": (torch.float32, {"fused": True}),
    "bf16": (torch.bfloat16, {"foreach": True}),
    "bf16, fused": (torch.bfloat16, {"fused": True}),
}
Row = dict[str, Any]


def projected(tensors: int, *, each: bool = False, dimensions: int = 1, ties: int = 0) -> int:
    """Bytes, at most, that a process hands to `all_reduce` for a change of the masks, whatever the size of the model.

    Where the sample misleads, which it seldom does, some rounds are made again.

    Args:
        tensors: in scope.
        each: each tensor has a threshold of its own (`uniform`, `erk`), and not all of them one.
        dimensions: of the mesh, those of more than one process; each adds up by itself.
        ties: bits of the largest index of a tensor, where weights are equal to the threshold (bf16); else 0.
    """
    digit = 4 if each else 10
    sample = 2 * _parts(18, digit)  # both ends of the bracket, among 2^18 cells
    census = _parts(20, digit) + 2**digit  # the last for bins that hold several values
    split = _parts(ties, digit) if ties else 0
    thresholds = tensors if each else 1
    # of each: what it loses, and is zero; its masks and their sums, three times; its ties
    counts = (2 + 6 + bool(ties)) * tensors
    settings = 1_000 * 8  # digests by which the processes agree, and places for errors
    return dimensions * (8 * (thresholds * (sample + census + split) + counts) + settings)


def _parts(bits: int, digit: int) -> int:
    """Counts that are added up to find a number digit by digit."""
    whole, rest = divmod(bits, digit)
    return whole * 2**digit + (2**rest if rest else 0)


class Clock:
    """CPU seconds and bytes between hooks of the optimizer, step by step."""

    def __init__(self) -> None:
        self.hooks: list[float] = []
        self.adam: list[float] = []
        self.sent: list[int] = []
        self.calls: list[int] = []
        self._since = 0.0
        self._counting = False
        add_up = distributed.all_reduce

        def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if self._counting:
                self.sent[-1] += tensor.nbytes
                self.calls[-1] += 1
            return add_up(tensor, *arguments, **options)

        distributed.all_reduce = counted

    def began(self, *_: object) -> None:
        for of in (self.hooks, self.adam, self.sent, self.calls):
            of.append(0)
        self._enter()

    def stepping(self, *_: object) -> None:
        self.hooks[-1] += self._lap()
        self._counting = False

    def stepped(self, *_: object) -> None:
        self.adam[-1] += self._lap()
        self._enter()

    def ended(self, *_: object) -> None:
        self.hooks[-1] += self._lap()
        self._counting = False

    def _enter(self) -> None:
        self._lap()
        self._counting = True

    def _lap(self) -> float:
        before, self._since = self._since, time.process_time()
        return self._since - before


def measured(
    rank: int, ranks: int, port: int, millions: float, kind: str, allocation: str, rounds: int, to: str
) -> None:
    """One process of the group: trains, and writes what it took."""
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    mesh, (dtype, options), clock = init_device_mesh("cpu", (ranks,)), KINDS[kind], Clock()
    torch.manual_seed(0)
    with torch.device("meta"):
        layers = max(1, round(millions * 1e6 / SIDE**2))
        model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, dtype=dtype) for _ in range(layers)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh).to_empty(device="cpu")
    for weight in model.parameters():
        nn.init.normal_(weight.to_local(), 0, SIDE**-0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, **options)
    last = 2 * rounds + 2
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(start=1, stop=last, every=2), allocation=allocation)
    optimizer.register_step_pre_hook(clock.began)
    optimizer.register_step_post_hook(clock.stepped)
    pruner.attach(optimizer)
    optimizer.register_step_pre_hook(clock.stepping)
    optimizer.register_step_post_hook(clock.ended)
    rows, steps, extra = torch.randn(64, SIDE, dtype=dtype), [], 0.0
    for step in range(last + 1):
        start = time.process_time()
        (model(rows).square().mean() * 1000).backward()
        if step == last - 1:  # a change of the masks, whose memory is seen
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
        optimizer.step()
        if step == last - 1:
            extra = max(0, _resident("VmHWM") - before)
        optimizer.zero_grad()
        steps.append(time.process_time() - start)
    masks = pruner.finish()
    assert masks.pruned == round(0.9 * masks.size), masks
    changed = [k for k, sent in enumerate(clock.hooks) if _changes(k)][1:]
    still = [k for k in range(3, last) if not _changes(k)]
    here = sum(weight.to_local().nbytes for weight in model.parameters())
    found = {
        "update": statistics.median(clock.hooks[k] for k in changed),
        "over Adam": statistics.median(clock.hooks[k] / clock.adam[k] for k in changed),
        "held over step": statistics.median(clock.hooks[k] / steps[k] for k in still),
        "adam": statistics.median(clock.adam[k] for k in changed),
        "step": statistics.median(steps[k] for k in still),
        "sent": max(clock.sent[k] for k in changed),
        "calls": max(clock.calls[k] for k in changed),
        "extra": extra / here,
        "resident": _resident("VmRSS"),
    }
    Path(f"{to}/{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def _changes(step: int) -> bool:
    """Whether the masks change in a step: the schedule begins at 1, and goes on every 2."""
    return step % 2 == 0


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run(ranks: int, millions: float, kind: str, allocation: str, rounds: int) -> Row:
    """Measure one case in processes of its own; of each figure that of the slowest or largest."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = (ranks, port, millions, kind, allocation, rounds, folder)
        multiprocessing.start_processes(measured, arguments, ranks, start_method="spawn")
        each = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
    tensors = max(1, round(millions * 1e6 / SIDE**2))
    ties = math.ceil(math.log2(SIDE**2)) if kind.startswith("bf16") else 0
    formula = projected(tensors, each=allocation != "global", dimensions=int(ranks > 1), ties=ties)
    case: Row = {"millions": millions, "ranks": ranks, "kind": kind, "allocation": allocation, "formula": formula}
    return case | {name: max(one[name] for one in each) for name in each[0]}


def cases(millions: Sequence[float], ranks: Sequence[int]) -> list[tuple[int, float, str, str]]:
    found = [(n, size, "fp32", "global") for size in millions for n in ranks]
    least, several = min(millions), max(ranks)
    found += [(several, least, "fp32", allocation) for allocation in ("uniform", "erk")]
    return found + [(several, least, kind, "global") for kind in KINDS if kind != "fp32"]


def table(rows: Sequence[Row]) -> Table:
    header = ["weights", "ranks", "Adam", "allocation", "update, ms", "update / Adam", "held / step", "bytes",
              "formula", "all_reduce", "extra"]  # fmt: skip
    cells = [
        [f"{row['millions']:g}M", str(row["ranks"]), row["kind"], row["allocation"], f"{1000 * row['update']:.1f}",
         f"{row['over Adam']:.2f}", f"{row['held over step']:.3f}", f"{row['sent']:,}", f"{row['formula']:,}",
         str(row["calls"]), f"{row['extra']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return Table(header, cells, title="A change of the masks of a sharded model", keys=(0, 1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[10, 100], help="of weights, in all (10 100)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7, help="changes of the masks in each case (7)")
    parser.add_argument("--quick", action="store_true", help="one case for each number of ranks, 2 million weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    chosen = (
        [(n, 2, "fp32", "global") for n in options.ranks] if options.quick else cases(options.millions, options.ranks)
    )
    rows = []
    for case in chosen:
        rows.append(run(*case, rounds=2 if options.quick else options.rounds))
        print(table(rows[-1:]).text(None), flush=True)
    print(table(rows).text(None))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
