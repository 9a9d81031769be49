"""The numbers of dropout: calls found, agreement, speed of samples, closed form, and what the other scripts measure.

    python benchmarks/dropout.py [SECTION ...] [--seeds 5] [--json FILE]

find, std, agree, speed, bounds and closed are here; recurrent, sparse, concrete, gates, calibration and choice in the
modules beside this one, which say what they measure. All by default but choice. One thread.

Speed is wall clock over the plain loop of T = 50 passes in `train()` with frozen normalisation, the sides in turn
(A B C C B A ...) in one process, medians with the smallest and the largest; beside it, the batch repeated 50 times in
one pass. These two are what torch-uncertainty 0.13 (`on_batch`) and baal 2.1 (`replicate_in_memory`) run, for dropout
modules: their best is the larger of 1 and `repeated`. The first call, which tries the ways of sampling, is apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dropout_calibration
import dropout_learned
import dropout_recurrent
import secateur as sc
from dropout_models import CASES, FOUND, Cnn, Lstm, Residual, Transformer, images, logits
from secateur.dropout.interception import isolation
from secateur.dropout.sampling import monte_carlo, passes
from secateur.support.inputs import arguments
from secateur.support.tables import Table
from timing import in_turn, ratio

T = 50


# ---- measuring ------------------------------------------------------------------------------------------------------


def training(model: nn.Module) -> nn.Module:
    """Dropout on, normalisation frozen: what a plain loop of Monte-Carlo dropout runs."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return model


@torch.no_grad()
def plain_loop(model: nn.Module, inputs: Any, passes: int = T) -> Tensor:
    args, kwargs = arguments(inputs)
    training(model)
    found = torch.stack([logits(model(*args, **kwargs)) for _ in range(passes)])
    model.eval()
    return found


@torch.no_grad()
def repeated_batch(model: nn.Module, inputs: Any) -> Tensor:
    args, kwargs = arguments(inputs)
    training(model)
    found = logits(
        model(
            *(x.repeat(T, *(1,) * (x.ndim - 1)) for x in args),
            **{k: x.repeat(T, *(1,) * (x.ndim - 1)) for k, x in kwargs.items()},
        )
    )
    model.eval()
    return found


def speed(rounds: int = 5) -> list[dict[str, object]]:
    found = []
    for name, build, make, batches, asked in CASES:
        for batch in batches:
            torch.manual_seed(0)
            model, inputs = build().eval(), make(batch)
            plain_loop(model, inputs, 2)
            start = time.perf_counter()
            sc.dropout.sample(model, inputs, n=T, output=logits)
            first = time.perf_counter() - start
            (plan,) = monte_carlo._PLANS[model].values()
            sides: dict[str, Callable[[], object]] = {
                "loop": lambda m=model, x=inputs: plain_loop(m, x),  # type: ignore[misc]
                "ours": lambda m=model, x=inputs: sc.dropout.sample(m, x, n=T, output=logits),  # type: ignore[misc]
                "repeated": lambda m=model, x=inputs: repeated_batch(m, x),  # type: ignore[misc]
            }
            times = in_turn(sides, rounds)
            row = {
                "case": name, "batch": batch, "asked": asked, "way": plan.way, "chunk": plan.chunk,
                "loop_ms": 1e3 * statistics.median(times["loop"]), "ours": ratio(times, "loop", "ours"),
                "repeated": ratio(times, "loop", "repeated"), "first_call": statistics.median(times["loop"]) / first,
            }  # fmt: skip
            found.append(row)
    return found


# ---- the other numbers ----------------------------------------------------------------------------------------------


def find() -> list[dict[str, object]]:
    """Every dropout call: found or named; beside it, how many dropout modules a walk over modules meets."""
    found = []
    for name, build, make in FOUND:
        model, inputs = build().eval(), make(2)
        result = sc.dropout.find(model, inputs)
        walk = sum(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
        found.append({"model": name, "calls": len(result.calls), "named": len(result.unreached), "modules": walk})
    return found


def std() -> list[dict[str, object]]:
    """Standard deviations of 4,000 samples over those of a plain loop of 4,000 passes."""
    found = []
    for name, build, make in (
        ("LSTM, dropout between its layers", lambda: Lstm(inner=0.3), images(50, 64)),
        ("transformer, dropout everywhere", lambda: Transformer(everywhere=True), images(64, 256)),
        ("CNN, dropout everywhere", lambda: Cnn(everywhere=True), images(1, 28, 28)),
    ):
        torch.manual_seed(0)
        model, x = build().eval(), make(4)
        ours = sc.dropout.sample(model, x, n=4000).std
        loop = plain_loop(model, x, 4000).std(0)
        ratios = (ours / loop).flatten()
        found.append(
            {"model": name, "mean": float(ratios.mean()), "least": float(ratios.min()), "most": float(ratios.max())}
        )
    return found


def agree() -> list[dict[str, object]]:
    """The largest difference between ways of taking the same 16 samples, over the largest output."""
    found = []
    for name, build, make, _, _ in CASES:
        torch.manual_seed(0)
        model, inputs = build().eval(), make(2)
        run = passes.Run(model, arguments(inputs), logits, 0, False)
        with isolation.undisturbed():
            run.look()
            (exact,) = passes.joined([run.some("exact", [i]) for i in range(16)])
            row: dict[str, object] = {"case": name}
            for way in ("alone", "mapped", "folded"):
                parts = [range(i, i + 1) for i in range(16)] if way == "alone" else [range(16)]
                try:
                    (got,) = passes.joined([run.some(way, part) for part in parts])
                    row[way] = float((got - exact).abs().max() / exact.abs().max())
                except Exception:  # not every way suits every model; `sample` tries another
                    row[way] = None
        found.append(row)
    return found


def closed(rounds: int = 15) -> list[dict[str, object]]:
    """Closed form over the plain loop of T passes: dropout before a last Linear.

    One call a turn (`once`), with cold caches after the other side, and 50 calls in a row, as the loop makes passes.
    """
    found = []
    for batch, features in ((32, 512), (128, 1024), (1, 512)):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(features, 10)).eval(), torch.randn(batch, features)
        sides: dict[str, Callable[[], object]] = {
            "loop": lambda m=model, x=x: plain_loop(m, x),  # type: ignore[misc]
            "once": lambda m=model, x=x: sc.dropout.closed_form(m, x),  # type: ignore[misc]
            "row": lambda m=model, x=x: [sc.dropout.closed_form(m, x) for _ in range(T)],  # type: ignore[misc]
        }
        times = in_turn(sides, rounds)
        many = sc.dropout.sample(model, x, n=20000, max_memory=2**32).std
        error = float((sc.dropout.closed_form(model, x).std / many - 1).abs().mean())
        in_a_row = {name: T * value for name, value in ratio(times, "loop", "row").items()}
        once = ratio(times, "loop", "once")["median"]
        found.append({"batch": batch, "features": features, "once": once, **in_a_row, "error": error})
    return found


@torch.no_grad()
def bounds(rounds: int = 9) -> list[dict[str, object]]:
    """The loop over what is left of it at best: of the LSTM its layers alone, with no masks; of the CNN a handler.

    Layer two of the LSTM takes T times the batch, at once or in two halves; of the CNN that reads a value the loop
    itself runs under a handler that does nothing.
    """
    found: list[dict[str, object]] = []
    for hidden in (256, 128):
        for batch in (1, 4):
            model, x = Lstm(hidden=hidden, inner=0.3).eval(), torch.randn(batch, 50, 64)
            one, two = (nn.LSTM(size, hidden, batch_first=True) for size in (64, hidden))
            whole = torch.randn(T * batch, 50, hidden)
            layers: dict[str, Callable[[], object]] = {
                "loop": lambda m=model, x=x: plain_loop(m, x),  # type: ignore[misc]
                "at once": lambda a=one, b=two, x=x, y=whole: (a(x), b(y)),  # type: ignore[misc]
                "two halves": lambda a=one, b=two, x=x, y=whole: (a(x), *map(b, y.chunk(2))),  # type: ignore[misc]
            }
            times = in_turn(layers, rounds)
            for name in list(layers)[1:]:
                case = f"LSTM 2x{hidden}, dropout between its layers"
                found.append({"case": case, "batch": batch, "left": name, **ratio(times, "loop", name)})
    for batch in (1, 16):
        cnn, image = Residual(reads=True).eval(), torch.randn(batch, 3, 32, 32)
        loops = {"loop": partial(plain_loop, cnn, image), "handled": partial(handled_loop, cnn, image)}
        times = in_turn(loops, rounds)
        case = "residual CNN that reads a value"
        found.append({"case": case, "batch": batch, "left": "empty handler", **ratio(times, "loop", "handled")})
    return found


class Nothing(TorchFunctionMode):
    """Sees each call, and makes it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs) if kwargs else func(*args)


def handled_loop(model: nn.Module, inputs: Any) -> Tensor:
    with Nothing():
        return plain_loop(model, inputs)


def show(name: str, rows: list[dict[str, object]], notes: list[str]) -> None:
    def cell(value: object) -> str:
        if isinstance(value, dict):
            return f"{value['median']:.3g} ({value['least']:.3g} to {value['most']:.3g})"
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    cells = [[cell(value) for value in row.values()] for row in rows]
    print(Table(list(rows[0]), cells, title=name, notes=notes).text(None), end="\n\n", flush=True)


SECTIONS: dict[str, Callable[[], list[dict[str, object]]]] = {
    "find": find,
    "std": std,
    "agree": agree,
    "speed": speed,
    "bounds": bounds,
    "closed": closed,
    "recurrent": dropout_recurrent.recurrent,
}
SEEDED: dict[str, Callable[[int], list[dict[str, object]]]] = {
    "sparse": dropout_learned.sparse,
    "concrete": dropout_learned.learned_rates,
    "gates": dropout_learned.gates,
    "calibration": dropout_calibration.calibration,
    "choice": dropout_calibration.choice,
}


def main() -> None:
    names = [*SECTIONS, *SEEDED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"{', '.join(names)}; by default all but choice")
    parser.add_argument("--seeds", type=int, default=5, help="of sparse, concrete, gates and calibration")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in options.sections or names[:-1]:
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sc.errors.SecateurWarning)
            found[name] = SECTIONS[name]() if name in SECTIONS else SEEDED[name](options.seeds)
        notes = dropout_calibration.verdict(found[name]) if name == "calibration" else []
        seconds = f"{time.perf_counter() - began:.0f} s"
        show(name, found[name], [*notes, f"torch {torch.__version__}, one thread, {seconds}"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
