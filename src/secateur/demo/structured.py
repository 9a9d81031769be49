"""An LSTM at half its hidden size, beside a sparse one with as many weights: `secateur demo --structured`.

The heart of it is `make_smaller`: one call of `sc.shrink`, and the training loop as it was.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import save as to_bytes
from torch import nn

import secateur as sc
from secateur.demo.digits import Digits, LSTMClassifier, accuracy, adam, alone, load, train
from secateur.demo.stage import Watch, finish, progress, require, same_answers, unwatched, versions, write
from secateur.demo.story import begin, load_elsewhere, prune_gradually, save_answers, speed_up, train_dense, train_on
from secateur.errors import InputError
from secateur.measurement.timing import compare, duration
from secateur.sparsity import fraction
from secateur.support.tables import number, percent, size

EPOCHS = 15
SPARSITY = 0.5
MODELS = ("dense", "smaller", "new", "sparse", "fast")


# Half the units, then the loop as it was --------------------------------------------------------------------


def make_smaller(
    dense: LSTMClassifier, sparsity: float, data: Digits, epochs: int, *, seed: int = 0, watch: Watch = unwatched
) -> tuple[LSTMClassifier, float]:
    """Take hidden units out of the LSTM, and train what is left.

    Returns:
        The smaller model, and its accuracy before it was trained on.
    """
    with alone(seed):
        small = sc.shrink(dense, data.train_images[:8], sparsity)  # an ordinary LSTMClassifier with a smaller nn.LSTM
        at_once = accuracy(small, data)
        train(small, adam(small), data, epochs, seed=seed, after_epoch=watch)
    return small, at_once


# What it is compared with -----------------------------------------------------------------------------------


def train_as_small(
    small: LSTMClassifier, data: Digits, epochs: int, *, seed: int = 0, watch: Watch = unwatched
) -> LSTMClassifier:
    """Train a new model of the same size, as long as the smaller one was trained before and after it was cut.

    Source: Liu et al. 2019, "Rethinking the Value of Network Pruning".
    """
    with alone(seed):
        model = LSTMClassifier(small.lstm.hidden_size)
        for _ in range(2):
            train(model, adam(model), data, epochs, seed=seed, after_epoch=watch)
    return model


def race(models: dict[str, nn.Module], data: Digits) -> dict[str, Any]:
    """Time the models in turn, for one image and for all test images."""
    with alone(0):
        return {
            str(len(images)): compare(models, images, seconds=0.5).to_dict()
            for images in (data.test_images[:1], data.test_images)
        }


def sizes(model: nn.Module, file: Path) -> dict[str, int]:
    """Save the plain weights, and packed ones beside them; count the bytes, and the numbers that are not zero."""
    plain = to_bytes(model.state_dict())
    write(file, plain)
    packed = sc.save(model, file.with_suffix(".packed.safetensors")).file_bytes
    left = sum(int(p.count_nonzero()) for p in model.parameters())
    return {"not_zero": left, "file_bytes": len(plain), "packed_bytes": packed}


# All of it --------------------------------------------------------------------------------------------------


def run(
    *,
    epochs: int = EPOCHS,
    sparsity: float = SPARSITY,
    seed: int = 0,
    out: Path = Path("secateur-demo"),
    console: Console | None = None,
) -> dict[str, Any]:
    """Shrink a trained LSTM, fine-tune it, and compare it with a sparse one that has as many weights.

    Args:
        epochs: passes over the training images of each training. Every model has two trainings.
        sparsity: fraction of the hidden units that go, 0 < s < 1.
        seed: of the weights and the batches.
        out: its folder `structured` gets `run.json`, the weights, and a script that loads them without secateur.
        console: where the table and the progress are shown; None for nowhere.

    Returns:
        What `run.json` holds.

    Raises:
        InputError, InputTypeError: a setting that makes no sense, or a file in the place of the folder.
    """
    began, out = time.perf_counter(), Path(out) / "structured"
    require(epochs, seed, out.parent, out)
    if not 0 < fraction(sparsity) < 1:
        raise InputError(f"sparsity is {sparsity!r}: give the fraction of the units that go, between 0 and 1")
    data = load()
    begin(out, lambda model: sc.shrink(model, data.train_images[:8], sparsity))
    with progress(console, 6 * epochs + 3) as (say, tick):

        def watch(model: nn.Module) -> None:
            tick(1)

        say("training a dense model")
        dense = train_dense(data, epochs, seed=seed, watch=watch)
        say("shrinking it, and training the smaller one on")
        small, at_once = make_smaller(dense, sparsity, data, epochs, seed=seed, watch=watch)
        say("training a new model of the same size")
        scratch = train_as_small(small, data, epochs, seed=seed, watch=watch)
        say("pruning to as many weights, while it trains on")
        zeros = sc.Count(sc.weights(dense).size - sc.weights(small).size)
        sparse, _ = prune_gradually(dense, zeros, data, epochs, seed=seed, watch=watch)
        say("training the dense one on")
        longer = train_on(dense, data, epochs, seed=seed, watch=watch)
        say("loading it where there is no secateur")
        files = {
            "dense": sizes(longer, out / "dense.safetensors"),
            "smaller": sizes(small, out / "pruned.safetensors"),
            "sparse": sizes(sparse, out / "sparse.safetensors"),
        }
        save_answers(small, data, out)
        fresh = load_elsewhere(out)
        tick(1)
        say("accelerating the sparse one")
        models = dict(zip(MODELS, (longer, small, scratch, sparse, speed_up(sparse, data)), strict=True))
        tick(1)
        say("measuring")
        raced = {name: model for name, model in models.items() if name != "new"}
        comparisons = race(raced, data)
        with alone(0):
            right = {name: accuracy(model, data) for name, model in models.items()}
        tick(1)
    result: dict[str, Any] = {
        "versions": versions(),
        "settings": {"epochs": epochs, "sparsity": float(sparsity), "seed": seed, "threads": 1},
        "data": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "hidden": [dense.lstm.hidden_size, small.lstm.hidden_size],
        "smaller": repr(small),
        "accuracy": right,
        "accuracy_at_once": at_once,
        "files": files,
        "fresh_process": fresh,
        "comparisons": comparisons,
    }
    return finish(result, began, out, console, tell)


# How it is shown --------------------------------------------------------------------------------------------


def tell(result: dict[str, Any], out: Path, console: Console) -> None:
    """Print what was measured, what it means, and where the files are."""
    table = Table(title="secateur demo: an LSTM with fewer units", title_justify="left")
    table.add_column("model", no_wrap=True)
    for name in ("accuracy", "not zero", "file", "packed", *map(_images, result["comparisons"])):
        table.add_column(name, justify="right", no_wrap=True)
    files = result["files"] | {"new": result["files"]["smaller"], "fast": result["files"]["sparse"]}
    for name in MODELS:
        file = files[name]
        bytes_ = [size(file["file_bytes"]), size(file["packed_bytes"])] if name in result["files"] else ["", ""]
        table.add_row(name, percent(result["accuracy"][name]), number(file["not_zero"]), *bytes_, *_times(result, name))
    console.print(table)
    for line in (*meaning(result), "", f"{result['seconds']:.0f} seconds. In {out}: {_FILES}"):
        console.print(line, markup=False, highlight=False)


_FILES = (
    "run.json (every number), pruned.safetensors (the smaller model), dense.safetensors and sparse.safetensors, each "
    "packed too, elsewhere.py (loads the smaller one without secateur)"
)


def meaning(result: dict[str, Any]) -> list[str]:
    """Put the numbers into words: one line for each finding."""
    before, after = result["hidden"]
    epochs = result["settings"]["epochs"]
    tests = result["data"]["test"]
    verdicts = {_images(n): one["verdict"] for n, one in result["comparisons"].items()}

    def told(name: str) -> str:
        return ", ".join(f"{verdict[name]} for {images}" for images, verdict in verdicts.items())

    return [
        f"{before} hidden units became {after}: accuracy {percent(result['accuracy_at_once'])} at once, "
        f"{percent(result['accuracy']['smaller'])} after fine-tuning, on {tests} test images, of which each is "
        f"{100 / tests:.2f} %",
        f"each model was trained for {epochs} + {epochs} epochs; new: of the smaller size from the start; sparse: "
        "as many weights as the smaller one; fast: the sparse one, by sc.accelerate",
        f"smaller, in plain torch: {told('smaller')}",
        f"sparse, in plain torch: {told('sparse')}",
        f"fast: {told('fast')}",
        f"the smaller model in a process without secateur: {same_answers(result['fresh_process'])}",
    ]


def _images(count: str) -> str:
    return "1 image" if count == "1" else f"{count} images"


def _times(result: dict[str, Any], name: str) -> list[str]:
    measured = [one["measurements"].get(name) for one in result["comparisons"].values()]
    return ["" if one is None else duration(one["seconds"]) for one in measured]
