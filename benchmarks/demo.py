"""The numbers of the demo, over five seeds: does a model pruned while it trains keep its accuracy?

    python benchmarks/demo.py [--seeds 5] [--epochs 20] [--sparsity 0.9] [--json FILE]

Accuracy on the demo's 450 test images. The gradually pruned model has seen 2 x epochs epochs; it is compared with
two dense ones that have seen as many: the same dense model trained on by the same recipe, and a new one trained
from the start in a single run of that length. The recipe (learning rate, clipping, epochs) was chosen on seeds
100 to 105 and the same test images, not on these seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from secateur.demo.digits import Digits, accuracy, alone, load
from secateur.demo.story import EPOCHS, look_at, prune_at_once, prune_gradually, train_dense, train_on
from secateur.support.tables import Table, percent

COLUMNS = {
    "dense": "dense, E epochs",
    "one_shot": "pruned at once",
    "gradual": "pruned gradually, E + E",
    "dense_on": "dense, E + E",
    "dense_long": "dense, 2E in one run",
}


def trial(data: Digits, seed: int, epochs: int, sparsity: float) -> dict[str, float]:
    dense = train_dense(data, epochs, seed=seed)
    pruned, _ = prune_gradually(dense, sparsity, data, epochs, seed=seed)
    models = {
        "dense": dense,
        "one_shot": prune_at_once(dense, sparsity),
        "gradual": pruned,
        "dense_on": train_on(dense, data, epochs, seed=seed),
        "dense_long": train_dense(data, 2 * epochs, seed=seed),
    }
    zeros = {look_at(models[name], data)["zeros"] for name in ("one_shot", "gradual")}
    assert len(zeros) == 1, zeros
    with alone(0):
        return {name: accuracy(model, data) for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    began, data = time.perf_counter(), load()
    trials = [trial(data, seed, arguments.epochs, arguments.sparsity) for seed in range(arguments.seeds)]

    mean = {name: statistics.mean(one[name] for one in trials) for name in COLUMNS}
    spread = {name: statistics.stdev(one[name] for one in trials) if len(trials) > 1 else 0.0 for name in COLUMNS}
    differences = {name: [one["gradual"] - one[name] for one in trials] for name in ("dense_on", "dense_long")}
    rows = [[f"seed {seed}", *(percent(one[name]) for name in COLUMNS)] for seed, one in enumerate(trials)]
    rows.append(["mean", *(percent(mean[name]) for name in COLUMNS)])
    rows.append(["standard deviation", *(percent(spread[name]) for name in COLUMNS)])
    notes = [
        f"pruned gradually against {COLUMNS[name]}: {100 * statistics.mean(found):+.2f} points on average "
        f"(from {100 * min(found):+.2f} to {100 * max(found):+.2f}): "
        + ("within 1 point" if statistics.mean(found) >= -0.01 else "MORE THAN 1 POINT BELOW")
        for name, found in differences.items()
    ]
    notes.append(
        f"E = {arguments.epochs}, sparsity {arguments.sparsity:g}, torch {torch.__version__}, one thread, "
        f"{time.perf_counter() - began:.0f} s"
    )
    print(Table(["test accuracy", *COLUMNS.values()], rows, notes=notes).text())
    if arguments.json:
        found = {
            "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
            "trials": trials,
            "mean": mean,
            "standard_deviation": spread,
            "gradual_minus": differences,
        }
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
