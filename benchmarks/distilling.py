"""What each part of GMP* brings: its schedule, cycles of the learning rate, the dense model as a teacher.

A model is trained dense, then pruned while it trains on for as many epochs on every side, from the same weights. Each
side is told at its better learning rate of two.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import secateur as sc
from secateur.demo import digits
from secateur.support.tables import Table
from structure_models import Attentive, Recurrent

BATCH, DENSE_EPOCHS = 32, 20
TASKS: dict[str, tuple[Callable[[], nn.Module], float]] = {  # a model, and the learning rate of its dense training
    "LSTM, digits": (lambda: Recurrent(8, 128, 1), 0.01),
    "transformer, digits": (lambda: Attentive(8, 64, 128, 2, 8), 0.003),
}
SIDES = {  # schedule, cycles, share of the teacher in the loss
    "gradual": ("cubic", False, 0.0),
    "+ 70 % at once": ("gmp_star", False, 0.0),
    "+ cycles": ("cubic", True, 0.0),
    "+ teacher": ("cubic", False, 1.0),
    "GMP*": ("gmp_star", True, 1.0),
    "70 % at once + teacher": ("gmp_star", False, 1.0),
}


def fit(model: nn.Module, data: digits.Digits, epochs: int, rate: float, prune: tuple[str, bool, float, float]) -> None:
    kind, cycles, share, sparsity = prune
    teacher = copy.deepcopy(model).eval()
    images, labels = data.train_images.unsqueeze(1), data.train_labels
    steps = epochs * (len(images) // BATCH)
    schedule = sc.schedules.Schedule(kind, 0.0, 0.7, every=20).over(steps)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    curve = LambdaLR(optimizer, sc.schedules.cycles(schedule, steps) if cycles else lambda step: 1 - step / steps)
    pruner = sc.Pruner(model, sparsity, schedule=schedule, allocation="erk")
    pruner.attach(optimizer)
    model.train()
    for _ in range(epochs):
        for at in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            said = model(images[at])
            loss = (1 - share) * F.cross_entropy(said, labels[at])
            if share:
                with torch.no_grad():
                    taught = teacher(images[at])
                loss = loss + share * sc.distillation.loss(said, taught)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.step()
    pruner.finish()


def right(model: nn.Module, data: digits.Digits) -> float:
    with torch.no_grad():
        found = model.eval()(data.test_images.unsqueeze(1)).argmax(-1)
    return 100 * float((found == data.test_labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", action="append", choices=TASKS, help="by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of pruning")
    parser.add_argument("--sparsity", type=float, action="append", help="by default 0.98")
    parser.add_argument("--rate", type=float, action="append", help="by default 0.01 and 0.03")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits.load()
    for task in options.task or TASKS:
        trained: list[nn.Module] = []
        build, dense_rate = TASKS[task]
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            trained.append(build())
            fit(trained[-1], data, DENSE_EPOCHS, dense_rate, ("cubic", False, 0.0, 0.0))
        dense = statistics.mean(right(model, data) for model in trained)
        for sparsity in options.sparsity or (0.98,):
            rows = []
            for side, (kind, cycles, share) in SIDES.items():
                began, tried = time.perf_counter(), {}
                for rate in options.rate or (0.01, 0.03):
                    found = []
                    for seed, start in enumerate(trained):
                        torch.manual_seed(seed)
                        model = copy.deepcopy(start)
                        fit(model, data, options.epochs, rate, (kind, cycles, share, sparsity))
                        found.append(right(model, data))
                    tried[rate] = found
                best = max(tried, key=lambda rate: statistics.mean(tried[rate]))
                numbers = (statistics.mean(tried[best]), min(tried[best]), max(tried[best]))
                rows.append((side, *(f"{n:.1f}" for n in numbers), f"{best:g}", f"{time.perf_counter() - began:.0f} s"))
            title = f"{task}, {sparsity:g} (dense: {dense:.1f})"
            print(Table(("side", "right, %", "least", "most", "rate", "time"), rows, title=title), flush=True)


if __name__ == "__main__":
    main()
