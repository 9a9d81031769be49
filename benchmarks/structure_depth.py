"""Half of the blocks: which go, what that costs in accuracy, and what it gains in time.

The blocks that `sc.shrink` takes are compared with those that change their own input least (ShortGPT's block
influence), and with any. Each is fine-tuned as long; a model built with half of the blocks is trained as long as the
dense one and that together.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.demo import digits
from structure_accuracy import right, train
from structure_models import Attentive, Block
from timing import in_turn, ratio

EPOCHS, TUNING = 16, 4


class Deep(nn.Module):
    """A ResNet whose blocks all have one width."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, width, 1) for _ in range(blocks)))
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def transformer(blocks: int, first: bool) -> nn.Module:
    model = Attentive(8, 64, 128, blocks, 8)
    for layer in model.body.layers:
        layer.norm_first = first
        for p in layer.parameters():  # torch makes them all alike
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
    return model


NETS: dict[str, tuple[Callable[[int], nn.Module], Callable[[Any], Any]]] = {
    "ResNet": (lambda n: Deep(16, n), lambda model: model.blocks),
    "transformer, norm first": (lambda n: transformer(n, True), lambda model: model.body.layers),
    "transformer, norm last": (lambda n: transformer(n, False), lambda model: model.body.layers),
}


def without(model: nn.Module, blocks: Callable[[Any], Any], gone: Sequence[int]) -> nn.Module:
    small = copy.deepcopy(model)
    for i in sorted(gone, reverse=True):
        del blocks(small)[i]
    return small


def own_input(model: nn.Module, blocks: Callable[[Any], Any], x: Tensor) -> list[int]:
    """The blocks in the order of 1 - cos of input and output, over the channels; Men et al. 2024, eq. 1."""
    found: list[float] = []

    def note(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        dim = 1 if out.ndim == 4 else -1
        found.append(float((1 - F.cosine_similarity(args[0], out, dim)).mean()))

    handles = [block.register_forward_hook(note) for block in blocks(model)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return sorted(range(len(found)), key=found.__getitem__)


def depth(options: argparse.Namespace, count: int = 8) -> Iterator[dict[str, Any]]:
    warnings.filterwarnings("ignore")
    data = digits.load()
    x = data.train_images[:64].unsqueeze(1)
    for name, (build, blocks) in NETS.items():
        before: dict[str, list[float]] = {}
        after: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            dense = build(count)
            train(dense, data, EPOCHS, 2e-3)
            order = torch.randperm(count).tolist()
            sides = {
                "dense": dense,
                "shrink": sc.shrink(dense, x, depth=0.5),
                "own input": without(dense, blocks, own_input(dense, blocks, x)[: count // 2]),
                "any": without(dense, blocks, order[: count // 2]),
                "built": build(count // 2),
            }
            for side, model in sides.items():
                before.setdefault(side, []).append(100 * right(model, data))
                train(model, data, EPOCHS + TUNING if side == "built" else TUNING, 2e-3 if side == "built" else 1e-3)
                after.setdefault(side, []).append(100 * right(model, data))
        for when, found in (("before", before), ("after", after)):
            yield {"name": f"{name}, {when} training", **{side: statistics.mean(own) for side, own in found.items()}}
        dense = build(count).eval()
        models = {"dense": dense, "shrunk": sc.shrink(dense, x, depth=0.5), "built": build(count // 2).eval()}
        with torch.no_grad():
            seconds = in_turn({side: (lambda m=m: m(x)) for side, m in models.items()}, options.rounds)  # type: ignore[misc]
        yield {
            "name": f"{name}, times faster than dense",
            "shrink": ratio(seconds, "dense", "shrunk")["median"],
            "built": ratio(seconds, "dense", "built")["median"],
        }
