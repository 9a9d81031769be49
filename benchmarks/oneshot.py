"""The numbers of one-shot pruning: trained models pruned by some unlabelled data, beside what else there is.

    python benchmarks/oneshot.py [minilm] [time] [speaker] [gru] [crepe] [shrink] [rounding] [recover] [threads]
                                 [memory]
                                 [--draws N] [--quick] [--peers FOLDER] [--json FILE]

Each draw is other calibration data (three by default); the test data stays and is never calibrated on. A figure is the
mean over the draws, with the least and the most; seconds are CPU seconds on one thread, the mean too. Models and data
are in oneshot_models.py.

- minilm: the cosine between the sentence embeddings of the pruned and of the dense model. "full" and "fast" are the
  efforts of `sc.oneshot`; "magnitude" is `sc.prune`.
- time: CPU seconds of the solvers alone on the same Gram matrices, nothing tried or compared: the ratio to a peer's.
- speaker, gru: see oneshot_recurrent.py.
- crepe: the mean error of the pitch in cents, and the loss beside that of magnitude, (ours - dense) / (its - dense).
- shrink: MiniLM with fewer units of its feed-forward layers (ffn) or fewer heads, or both.
- rounding: MiniLM at 80 %, stored in steps of .5 or 1 root mean square; bytes are relative to the nearest steps.
- recover: MiniLM at 90 % after 60 steps of `sc.recover`.
- memory: what pruning block by block takes at its peak, in weights of a block; see oneshot_memory.py.
- threads: how far what two threads find is from what one thread finds, and two runs from each other.

`--peers` installs the peers that oneshot_peers.py knows there, and has them solve the same. `--quick`: one draw, and
fewer levels.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import oneshot_models as models
import oneshot_peers as peers
import oneshot_recurrent as recurrent
import secateur as sc
from secateur.calibration.statistics import Statistics
from secateur.support.tables import Table

# what must be reached and what is aimed at, by section, what is measured, and side
GOALS: dict[tuple[str, str, str], tuple[float, float | None]] = {
    ("minilm", "50 %", "full"): (0.948, 0.955),
    ("minilm", "70 %", "full"): (0.832, 0.847),
    ("minilm", "80 %", "full"): (0.72, 0.735),
    ("minilm", "90 %", "full"): (0.55, 0.57),
    ("minilm", "2:4", "full"): (0.90, 0.912),
    ("minilm", "50 %", "fast"): (0.93, None),
    ("minilm", "70 %", "fast"): (0.775, None),
    ("minilm", "80 %", "fast"): (0.63, None),
    ("minilm", "90 %", "fast"): (0.45, None),
    ("minilm", "2:4", "fast"): (0.875, None),
    ("minilm", "80 %", "sensitivity"): (0.765, 0.80),
    ("minilm", "90 %", "sensitivity"): (0.61, 0.66),
    ("time", "80 %", "full over fmchisel's ALPS"): (0.6, 0.35),
    ("time", "80 %", "fast over llmcompressor's SparseGPT"): (1.2, None),
    ("crepe", "70 %, loss beside magnitude's", "full"): (0.5, 0.25),
    ("crepe", "90 %, loss beside magnitude's", "full"): (0.5, 0.25),
    ("shrink", "ffn 25 %", "greedy"): (0.965, 0.975),
    ("shrink", "ffn 50 %", "greedy"): (0.91, 0.925),
    ("shrink", "heads 25 %", "greedy"): (0.965, 0.972),
    ("shrink", "heads 50 %", "greedy"): (0.895, 0.91),
    ("shrink", "ffn and heads 50 %", "greedy"): (0.83, 0.85),
    ("rounding", "step 0.5", "with stats"): (0.685, 0.70),
    ("rounding", "step 1", "with stats"): (0.56, 0.59),
    ("recover", "90 %", "60 steps"): (0.62, 0.70),
    ("memory", "peak extra", "batches in memory"): (6, 4),
    **recurrent.GOALS,
}


@dataclass
class Book:
    """The figures of a section: by what is measured and by side, a value for each draw, and seconds."""

    section: str
    figures: dict[tuple[str, str], tuple[list[float], list[float]]] = field(default_factory=dict)

    def add(self, what: str, side: str, value: float, seconds: float | None = None) -> None:
        values, times = self.figures.setdefault((what, side), ([], []))
        values.append(value)
        times += [] if seconds is None else [seconds]

    def rows(self) -> Iterator[dict[str, Any]]:
        for (what, side), (values, times) in self.figures.items():
            must, aim = GOALS.get((self.section, what, side), (None, None))
            yield {
                "section": self.section, "what": what, "side": side, "mean": statistics.mean(values),
                "least": min(values), "most": max(values), "values": values,
                "seconds": statistics.mean(times) if times else None, "must": must, "aim": aim,
            }  # fmt: skip

    def text(self) -> str:
        def told(value: float | None, form: str = ".3f") -> str:
            return "" if value is None else format(value, form)

        rows = [
            (
                row["what"], row["side"], told(row["mean"]), f"{told(row['least'])} to {told(row['most'])}",
                told(row["seconds"], ".1f"), told(row["must"]), told(row["aim"]),
            )
            for row in self.rows()
        ]  # fmt: skip
        return Table(("what", "side", "mean", "least to most", "CPU s", "must", "aim"), rows, self.section).text(140)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    draws: int
    quick: bool
    peers: Path | None


@contextmanager
def clock() -> Iterator[Callable[[], float]]:
    """CPU seconds since the start, of all threads of this process."""
    start = time.process_time()
    yield lambda: time.process_time() - start


# ---- MiniLM -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentences:
    """MiniLM, what it was calibrated on, and what it is judged by."""

    dense: nn.Module
    batches: list[models.Batch]
    stats: Statistics
    test: list[models.Batch]
    reference: Tensor

    def cosine(self, model: nn.Module) -> float:
        return models.cosine(model, self.test, self.reference)

    def pruned(self, level: peers.Level, **options: Any) -> tuple[nn.Module, float]:
        """A copy, pruned by `sc.oneshot`, and its CPU seconds."""
        model = copy.deepcopy(self.dense)
        with clock() as spent:
            sc.oneshot(model, options.pop("stats", self.stats), *parsed(level), **structured(level), **options)
            return model, spent()

    @property
    def grams(self) -> dict[str, Tensor]:
        """What the layers read, by the name of the layer: as peers take it."""
        return {one.names[0].removesuffix(".weight"): one.gram[0].float() for one in self.stats.moments}

    @property
    def alone(self) -> Statistics:
        """The statistics without batches to check on: one way is solved, nothing is compared."""
        return replace(self.stats, held=[], kept=[])


@cache
def minilm_at(draw: int) -> Sentences:
    dense = models.minilm()
    calibration, test = (models.batches(texts) for texts in models.sentences(draw))
    return Sentences(dense, calibration, sc.calibrate(dense, calibration), test, models.embeddings(dense, test))


def parsed(level: peers.Level) -> tuple[float]:
    return (0.5 if level == "2:4" else level,)  # type: ignore[return-value]


def structured(level: peers.Level) -> dict[str, Any]:
    return {"pattern": sc.n_m(2, 4)} if level == "2:4" else {}


def named(level: peers.Level) -> str:
    return level if isinstance(level, str) else f"{level:.0%}".replace("%", " %")


def by_peers(name: str, levels: list[peers.Level], data: Sentences, asked: Asked) -> Iterator[tuple[Any, float, float]]:
    """Of each level that a peer solved the level, the cosine and CPU seconds; nothing if it does not run here."""
    if asked.peers is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for level, (weights, seconds) in peers.ask(name, asked.peers, levels, data.grams, Path(scratch)):
                model = copy.deepcopy(data.dense)
                for layer, weight in weights.items():
                    model.get_submodule(layer).weight.data.copy_(weight)
                yield level, data.cosine(model), seconds
        except RuntimeError as error:
            print(error)


def minilm(book: Book, asked: Asked) -> None:
    levels: list[peers.Level] = [0.8, "2:4"] if asked.quick else [0.5, 0.7, 0.8, 0.9, "2:4"]
    for draw in range(asked.draws):
        data = minilm_at(draw)
        for level in levels:
            model = copy.deepcopy(data.dense)
            sc.prune(model, *parsed(level), allocation="uniform", **structured(level))
            book.add(named(level), "magnitude", data.cosine(model))
            for side, options in {
                "wanda": {"solver": "wanda", "stats": data.alone},
                "sparsegpt": {"solver": "sparsegpt", "stats": data.alone},
                "fast": {"effort": "fast"},
                "full": {},
                **({"sensitivity": {"allocation": "sensitivity"}} if level in (0.8, 0.9) else {}),
            }.items():
                model, seconds = data.pruned(level, **options)
                book.add(named(level), side, data.cosine(model), seconds)
        for name in peers.PACKAGES:
            asks = ["2:4"] if name == "modelopt" else levels  # its masks are N:M only
            for level, cosine, seconds in by_peers(name, asks, data, asked):
                book.add(named(level), name, cosine, seconds)


def times(book: Book, asked: Asked) -> None:
    for draw in range(asked.draws):
        data = minilm_at(draw)
        for side, effort, peer, method in (
            ("full", "full", "fmchisel", "ALPS"),
            ("fast", "fast", "llmcompressor", "SparseGPT"),
        ):
            _, seconds = data.pruned(0.8, effort=effort, stats=data.alone)
            book.add("80 %, CPU s", side, seconds, seconds)
            for level, _, theirs in by_peers(peer, [0.8], data, asked):
                book.add(f"{named(level)}, CPU s", f"{peer}'s {method}", theirs, theirs)
                book.add(named(level), f"{side} over {peer}'s {method}", seconds / theirs)


def shrink(book: Book, asked: Asked) -> None:
    cuts: list[dict[str, float]] = [
        {"ffn": 0.25}, {"ffn": 0.5}, {"heads": 0.25}, {"heads": 0.5}, {"ffn": 0.5, "heads": 0.5},
    ]  # fmt: skip
    for draw in range(asked.draws):
        data = minilm_at(draw)

        def what(cut: dict[str, float]) -> str:
            return f"{' and '.join(cut)} {max(cut.values()):.0%}".replace("%", " %")

        for cut in cuts[1::2] if asked.quick else cuts:
            held = {"ffn": "*intermediate.dense*", "heads": "*attention.self.query*"}
            keep = ["embeddings*", *(held[kind] for kind in held if kind not in cut)]
            for side, options in {
                "magnitude, no refit": {},
                "energy": {"score": "energy", "stats": data.stats},
                "greedy": {"score": "greedy", "stats": data.stats},
            }.items():
                with clock() as spent:
                    small = sc.shrink(data.dense, data.batches[0], max(cut.values()), keep=keep, **options)
                    book.add(what(cut), side, data.cosine(small), spent())
        for cut, cosine, seconds in by_peers("fmchisel", list(cuts), data, asked):
            book.add(what(cut), "fmchisel's OSSCAR", cosine, seconds)


def rounding(book: Book, asked: Asked) -> None:
    for draw in range(asked.draws):
        data = minilm_at(draw)
        pruned, _ = data.pruned(0.8)
        book.add("as it is", "pruned", data.cosine(pruned))
        for step in (0.5, 1.0):
            sizes = []
            for side, options in {"nearest": {}, "with stats": {"stats": data.stats}}.items():
                with tempfile.TemporaryDirectory() as folder, clock() as spent:
                    file = Path(folder, "pruned.safetensors")
                    sc.save(pruned, file, step=step, **options)
                    seconds = spent()
                    sizes.append(file.stat().st_size)
                    loaded = copy.deepcopy(pruned)
                    sc.load(file, into=loaded)
                book.add(f"step {step:g}", side, data.cosine(loaded), seconds)
            book.add(f"step {step:g}, bytes", "with stats", sizes[1] / sizes[0])


def recover(book: Book, asked: Asked) -> None:
    for draw in range(asked.draws):
        data = minilm_at(draw)
        for side, options in {"sparsegpt": {"solver": "sparsegpt", "stats": data.alone}, "full": {}}.items():
            model, _ = data.pruned(0.9, **options)
            book.add("90 %", side, data.cosine(model))
            with clock() as spent:
                sc.recover(model, data.dense, data.batches, steps=60)
                label = "60 steps" if side == "full" else f"{side}, 60 steps"
                book.add("90 %", label, data.cosine(model), spent())


def threads(book: Book, asked: Asked) -> None:
    data = minilm_at(0)
    found = {}
    for name, count in {"one thread": 1, "one thread, again": 1, "two threads": 2}.items():
        torch.set_num_threads(count)
        stats = sc.calibrate(data.dense, data.batches)
        model, _ = data.pruned(0.8, stats=stats)
        found[name] = data.cosine(model), [p.detach() for p in model.parameters()]
    torch.set_num_threads(1)
    cosine, weights = found.pop("one thread")
    for name, (other, theirs) in found.items():
        apart = sum(float((a - b).square().sum()) for a, b in zip(weights, theirs, strict=True))
        whole = sum(float(a.square().sum()) for a in weights)
        masks = sum(int(((a == 0) != (b == 0)).sum()) for a, b in zip(weights, theirs, strict=True))
        book.add("cosine, difference", name, abs(other - cosine))
        book.add("weights, relative difference", name, (apart / whole) ** 0.5)
        book.add("masks, places that differ", name, masks)


def memory(book: Book, asked: Asked) -> None:
    script = Path(__file__).with_name("oneshot_memory.py")
    for side, options in {"batches in memory": [], "batches on disk": ["--folder"]}.items():
        command = [sys.executable, "-W", "ignore", str(script), *options]
        book.add("peak extra", side, float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


# ---- CREPE ------------------------------------------------------------------------------------------------------


def crepe(book: Book, asked: Asked) -> None:
    dense = models.crepe()
    sounds, cents = models.tones(512, 99)
    exact = models.pitch_error(dense, sounds, cents)
    for draw in range(asked.draws):
        heard, _ = models.tones(320, draw)
        with clock() as spent:
            stats = sc.calibrate(dense, heard.split(16))
            book.add("dense, cents off", "CREPE; seconds to calibrate", exact, spent())
        for sparsity in (0.9,) if asked.quick else (0.7, 0.9):
            off: dict[str, float] = {}
            for name in ("uniform", "global"):
                model = copy.deepcopy(dense)
                sc.prune(model, sparsity, allocation=name)
                off[f"magnitude, {name}"] = models.pitch_error(model, sounds, cents)
            for side, options in {"fast": {"effort": "fast"}, "full": {}}.items():
                model = copy.deepcopy(dense)
                with clock() as spent:
                    sc.oneshot(model, stats, sparsity, **options)
                    seconds = spent()
                off[side] = models.pitch_error(model, sounds, cents)
                book.add(f"{named(sparsity)}, cents off", side, off[side], seconds)
            for name in ("magnitude, uniform", "magnitude, global"):
                book.add(f"{named(sparsity)}, cents off", name, off[name])
            least = min(off["magnitude, uniform"], off["magnitude, global"])
            for side in ("fast", "full"):
                book.add(f"{named(sparsity)}, loss beside magnitude's", side, (off[side] - exact) / (least - exact))


SECTIONS: dict[str, Callable[[Book, Asked], None]] = {
    "minilm": minilm,
    "time": times,
    "speaker": recurrent.speaker,
    "gru": recurrent.gru,
    "crepe": crepe,
    "shrink": shrink,
    "rounding": rounding,
    "recover": recover,
    "threads": threads,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*SECTIONS, []], metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--draws", type=int, default=3, help="of calibration data")
    parser.add_argument("--quick", action="store_true", help="one draw, and less of each section")
    parser.add_argument("--peers", type=Path, help="a folder for the peers, which are installed if they are not there")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peers:
        peers.install(arguments.peers)
    asked = Asked(1 if arguments.quick else arguments.draws, arguments.quick, arguments.peers)
    figures = []
    for name in arguments.only or SECTIONS:
        book = Book(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            SECTIONS[name](book, asked)
        print(book.text(), flush=True)
        figures += list(book.rows())
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
