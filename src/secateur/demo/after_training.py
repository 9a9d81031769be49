"""An LSTM pruned after training, without a loop and without labels: `secateur demo --oneshot`.

The heart of it is `prune_at_once`: two lines of secateur.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save as to_bytes
from torch import nn

import secateur as sc
from secateur.calibration.contest import Pruned
from secateur.demo.digits import Digits, accuracy, alone, load
from secateur.demo.stage import Watch, finish, progress, require, same_answers, unwatched, versions, write
from secateur.demo.story import begin, load_elsewhere, save_answers, train_dense
from secateur.errors import InputError
from secateur.sparsity import fraction
from secateur.support.tables import percent, size

EPOCHS = 20
SPARSITY = 0.8
IMAGES = 400
"""Training images, without their labels, that calibration sees."""


def prune_at_once(dense: nn.Module, sparsity: float, data: Digits) -> tuple[nn.Module, Pruned, float]:
    """Prune a copy by what its layers read.

    Returns:
        The copy, its masks, and the seconds that it took.
    """
    model = copy.deepcopy(dense)  # only so that we can compare in the end
    with alone(0):
        began = time.perf_counter()
        stats = sc.calibrate(model, torch.split(data.train_images[:IMAGES], 20))
        masks = sc.oneshot(model, stats, sparsity)
        seconds = time.perf_counter() - began
    return model, masks, seconds


def by_magnitude(dense: nn.Module, sparsity: float, allocation: str) -> nn.Module:
    """Prune a copy by the size of its weights, as one does without data."""
    model = copy.deepcopy(dense)
    sc.prune(model, sparsity, allocation=allocation)
    return model


def run(
    *,
    epochs: int = EPOCHS,
    sparsity: float = SPARSITY,
    seed: int = 0,
    out: Path = Path("secateur-demo"),
    console: Console | None = None,
) -> dict[str, Any]:
    """Train an LSTM, prune it without training it again, and compare it with magnitude.

    Args:
        epochs: passes over the training images of the one training.
        sparsity: fraction of the weights that become zero, 0 < s < 1.
        seed: of the weights and the batches.
        out: its folder `oneshot` gets `run.json`, the weights, and a script that loads them without secateur.
        console: where the table and the progress are shown; None for nowhere.

    Returns:
        What `run.json` holds.

    Raises:
        InputError, InputTypeError: a setting that makes no sense, or a file in the place of the folder.
    """
    began, out = time.perf_counter(), Path(out) / "oneshot"
    require(epochs, seed, out.parent, out)
    if not 0 < fraction(sparsity) < 1:
        raise InputError(f"sparsity is {sparsity!r}: give the fraction of the weights that go, between 0 and 1")
    begin(out, lambda model: by_magnitude(model, sparsity, "uniform"))
    data = load()
    with progress(console, epochs + 3) as (say, tick):
        watch: Watch = unwatched if console is None else lambda model: tick(1)
        say("training a dense model")
        dense = train_dense(data, epochs, seed=seed, watch=watch)
        say("pruning it by magnitude")
        models: dict[str, nn.Module] = {"dense": dense}
        models |= {f"magnitude, {one}": by_magnitude(dense, sparsity, one) for one in ("global", "uniform")}
        tick(1)
        say("pruning it by what its layers read")
        pruned, masks, seconds = prune_at_once(dense, sparsity, data)
        models["oneshot"] = pruned
        tick(1)
        say("loading it where there is no secateur")
        write(out / "dense.safetensors", to_bytes(dense.state_dict()))
        write(out / "pruned.safetensors", to_bytes(pruned.state_dict()))
        packed = sc.save(pruned, out / "pruned.packed.safetensors").file_bytes
        save_answers(pruned, data, out)
        fresh = load_elsewhere(out)
        tick(1)
    with alone(0):
        right = {name: accuracy(model, data) for name, model in models.items()}
    result: dict[str, Any] = {
        "versions": versions(),
        "settings": {"epochs": epochs, "sparsity": float(sparsity), "seed": seed, "threads": 1, "images": IMAGES},
        "data": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "accuracy": right,
        "pruning_seconds": round(seconds, 1),
        "zeros": masks.pruned,
        "weights": masks.size,
        "tried": dict(masks.tried),
        "way": masks.way,
        "files": {"dense": (out / "dense.safetensors").stat().st_size, "packed": packed},
        "fresh_process": fresh,
    }
    return finish(result, began, out, console, tell)


def tell(result: dict[str, Any], out: Path, console: Console) -> None:
    """Print what was measured, what it means, and where the files are."""
    table = Table(title="secateur demo: an LSTM pruned after training", title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    for name, right in result["accuracy"].items():
        table.add_row(name, percent(right))
    console.print(table)
    for line in (*meaning(result), "", f"{result['seconds']:.0f} seconds. In {out}: {_FILES}"):
        console.print(line, markup=False, highlight=False)


_FILES = (
    "run.json (every number), dense.safetensors, pruned.safetensors (plain, and packed beside it), elsewhere.py (loads "
    "the pruned one without secateur)"
)


def meaning(result: dict[str, Any]) -> list[str]:
    """Put the numbers into words: one line for each finding."""
    tests, images = result["data"]["test"], result["settings"]["images"]
    ways = ", ".join(f"{way} {found:.3f}" for way, found in result["tried"].items())
    return [
        f"{result['zeros']:,} of {result['weights']:,} weights are zero in each pruned model; none was trained again",
        f"oneshot: {images} training images without labels, {result['pruning_seconds']:g} seconds, on one thread",
        f"what was tried, and the cosine to the dense outputs on images held out: {ways}",
        f"accuracy is on {tests} test images, of which each is {100 / tests:.2f} %",
        f"the file: {size(result['files']['dense'])} dense, {size(result['files']['packed'])} packed",
        f"the pruned model in a process without secateur: {same_answers(result['fresh_process'])}",
    ]
