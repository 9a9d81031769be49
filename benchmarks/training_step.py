"""A whole training step with masks held, over the same step dense: forward, backward, step of the optimizer.

    python benchmarks/training_step.py [--model NAME] [--optimizer NAME] [--rounds N]

The sides take turns in one process, on one thread, a tenth of a second each; CPU time, the median of the rounds with
the least and the most. Each has its own copy of the model, the same batch, and the same clocks around its hooks.
"held" has a Pruner at 90 % attached; "hooks" is the same step over itself without the hooks of the Pruner: less noise,
but what the caches lose is not in it.
"torch" has masks of `torch.nn.utils.prune`, which cannot train a MultiheadAttention (it never calls the hooks of its
out_proj). "every=100" is the share of a choice of new masks each hundred steps, which comes on top.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import secateur as sc
from secateur.demo.digits import LSTMClassifier
from secateur.support.tables import Table
from structure_models import Attentive, resnet
from timing import spread

SECONDS = 0.1  # of a turn, at least, or one step


class Encoder(nn.Module):
    """Shaped like MiniLM (width 384, 6 layers), or like GPT-2 (width 768, 12 layers); without the embeddings."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, 0.0, "gelu", batch_first=True)
        self.body, self.out = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.body(x).mean(1))
        return out


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM 64, digits, batch 32": (lambda: LSTMClassifier(64), (32, 8, 8)),
    "LSTM 512, digits, batch 32": (lambda: LSTMClassifier(512), (32, 8, 8)),
    "CNN, 28x28, batch 32": (lambda: resnet((12, 24), 1, 2), (32, 1, 28, 28)),
    "transformer 64, digits, batch 32": (lambda: Attentive(8, 64, 128, 2, 8), (32, 8, 8)),
    "MiniLM's shape, 8 x 64 tokens": (lambda: Encoder(384, 6), (8, 64, 384)),
    "GPT-2 small's shape, 4 x 128 tokens": (lambda: Encoder(768, 12), (4, 128, 768)),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-4),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, 1e-4, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, 1e-4, fused=True),
}


@dataclass
class Side:
    """A model that is trained, and the CPU seconds that it takes."""

    step: Callable[[], float]
    """A training step: its seconds."""
    hooks: list[float]
    """Of these, those in the hooks of the Pruner, step by step; without one, those that the clocks take."""


def side(model: nn.Module, x: Tensor, optimizer: str, kind: str) -> Side:
    labels, hooks = torch.arange(len(x)) % 10, [0.0]
    if kind == "torch":
        for name in list(sc.weights(model)):
            path, _, attribute = name.rpartition(".")
            torch_prune.l1_unstructured(model.get_submodule(path), attribute, 0.9)
    stepped = OPTIMIZERS[optimizer](list(model.parameters()))

    def began(*_: object) -> None:
        hooks[-1] -= time.process_time()

    def ended(*_: object) -> None:
        hooks[-1] += time.process_time()

    stepped.register_step_pre_hook(began)
    stepped.register_step_post_hook(began)
    if kind == "held":
        sc.Pruner(model, 0.9, allocation="uniform").attach(stepped)
    stepped.register_step_pre_hook(ended)
    stepped.register_step_post_hook(ended)

    def step() -> float:
        hooks.append(0.0)
        start = time.process_time()
        stepped.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        stepped.step()
        return time.process_time() - start

    return Side(step, hooks)


Ratios = dict[str, list[float]]


def ratios(name: str, optimizer: str, rounds: int, kinds: tuple[str, ...]) -> tuple[float, Ratios]:
    """Seconds of a dense step; of each side the ratios to it, round by round, and those of the hooks alone."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().train(), torch.randn(shape)
    sides = {kind: side(copy.deepcopy(model), x, optimizer, kind) for kind in ("dense", *kinds)}
    many = max(1, round(SECONDS / min(sides["dense"].step() for _ in range(3))))
    found: Ratios = {kind: [] for kind in (*kinds, "hooks")}
    dense = []
    for turn in range(rounds + 1):
        each = {}
        for kind in list(sides) if turn % 2 else list(sides)[::-1]:
            each[kind] = statistics.median([sides[kind].step() for _ in range(many)])
        if turn:
            dense.append(each["dense"])
            for kind in kinds:
                found[kind].append(each[kind] / each["dense"])
            clocks, hooks = (statistics.median(sides[kind].hooks[-many:]) for kind in ("dense", "held"))
            hooks -= clocks
            found["hooks"].append(each["held"] / (each["held"] - hooks))
    return statistics.median(dense), found


def changes(name: str) -> float:
    """Seconds of a change of the masks."""
    make, _ = MODELS[name]
    torch.manual_seed(0)
    pruner = sc.Pruner(make(), 0.9, schedule=sc.cubic(0, 10), allocation="erk")
    taken = []
    for _ in range(9):
        start = time.process_time()
        pruner.step()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def rows(name: str, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    attentive = any(isinstance(module, nn.MultiheadAttention) for module in MODELS[name][0]().modules())
    kinds = ("held",) if attentive else ("held", "torch")
    changing = changes(name)
    for optimizer in options.optimizer or OPTIMIZERS:
        dense, found = ratios(name, optimizer, options.rounds, kinds)
        cells = [optimizer, f"{1000 * dense:.2f}"]
        for kind in ("hooks", "held", "torch"):
            over = spread(found[kind]) if kind in found else None
            cells += [f"{over['median']:.3f}", f"{over['least']:.2f} to {over['most']:.2f}"] if over else ["cannot", ""]
        yield *cells, f"+ {changing / dense / 100:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="by default all")
    parser.add_argument("--optimizer", action="append", choices=OPTIMIZERS, help="by default all")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("optimizer", "dense, ms", "hooks", "", "held", "", "torch", "", "every=100")
    for name in options.model or MODELS:
        print(Table(columns, list(rows(name, options)), title=name), flush=True)


if __name__ == "__main__":
    main()
