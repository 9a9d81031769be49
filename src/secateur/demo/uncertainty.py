"""What an LSTM with dropout is unsure of, on clean digits and on noisy ones: `secateur demo --uncertainty`.

The heart of it is `look`: one call of `sc.dropout.sample` on a model that stays in `eval()`, beside its plain answer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import secateur as sc
from secateur.demo.digits import Digits, LSTMClassifier, adam, alone, load, train
from secateur.demo.stage import Watch, finish, progress, require, save_pictures, unwatched, versions
from secateur.dropout import Prediction
from secateur.dropout.uncertainty import metrics
from secateur.support.tables import number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS = 40
SAMPLES = 50
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Standard deviations of the noise that is added to pixels from 0 to 1."""
HEAD, HIDDEN = 0.5, 0.25
"""Dropout rates; chosen on other seeds and on training images held out, as `benchmarks/dropout_calibration.py` says."""
SHOWN = 6
PICTURE = "uncertainty.png"
READINGS = {"plain": "one pass", "samples": f"{SAMPLES} samples"}


# A model with dropout, trained by the same loop -------------------------------------------------------------


class DropoutClassifier(LSTMClassifier):
    """The model of the plain demo, with dropout before its last layer."""

    def __init__(self, hidden: int = 128, rate: float = HEAD) -> None:
        super().__init__(hidden)
        self.dropout = nn.Dropout(rate)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[n, 8, 8]` to logits `[n, 10]`."""
        _, (last, _) = self.lstm(images)
        logits: Tensor = self.head(self.dropout(last[-1]))
        return logits


def train_with_dropout(data: Digits, epochs: int, *, seed: int = 0, watch: Watch = unwatched) -> DropoutClassifier:
    """Train a new model, with one mask on the LSTM's hidden state for all steps of a pass; it comes back in `eval()`.

    Source: Gal & Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks".
    """
    with alone(seed):
        model = DropoutClassifier()
        sc.dropout.recurrent(model, hidden=HIDDEN)
        train(model, adam(model), data, epochs, seed=seed, after_epoch=watch)
    return model.eval()


# What it answers, and how sure it is ------------------------------------------------------------------------


def noisy(images: Tensor, level: float, *, seed: int = 0) -> Tensor:
    """Add Gaussian noise of standard deviation `level`: the same noise for a seed, only louder at a higher level."""
    return images + level * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def look(model: nn.Module, images: Tensor, *, seed: int = 0) -> tuple[Tensor, Prediction]:
    """Ask a model twice: probabilities `[n, 10]` of the plain model, and samples of it with its dropout switched on."""
    with alone(seed):
        with torch.no_grad():
            plain = model(images).softmax(1)
        return plain, sc.dropout.sample(model, images, n=SAMPLES, seed=seed)


def judge(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Say how good probabilities `[n, 10]` are, and whether their entropy knows which answers are wrong.

    `unsure` and `sure` are the shares of errors among the tenth of highest and of lowest entropy, `area` is that under
    the risk-coverage curve.
    """
    entropy = torch.special.entr(probabilities).sum(1)
    wrong = probabilities.argmax(1) != labels
    order, tenth = entropy.argsort(stable=True), max(1, len(labels) // 10)
    return {
        "accuracy": 1 - float(wrong.double().mean()),
        "confidence": float(probabilities.max(1).values.double().mean()),
        "ece": metrics.calibration_curve(probabilities, labels).error,
        "nll": metrics.nll(probabilities.clamp(min=1e-12), labels),
        "brier": metrics.brier(probabilities, labels),
        "entropy": float(entropy.double().mean()),
        "unsure": float(wrong[order[-tenth:]].double().mean()),
        "sure": float(wrong[order[:tenth]].double().mean()),
        "area": metrics.risk_coverage(entropy, wrong).area,
    }


def least_sure(prediction: Prediction, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Find the images whose answer has the highest entropy, and what the samples say of each."""
    each = Prediction(prediction.samples.softmax(-1))  # a spread of probabilities, not of logits
    low, high = each.interval(0.9)
    found = []
    for i in prediction.entropy.argsort(descending=True, stable=True)[:SHOWN].tolist():
        top = int(each.mean[i].argmax())
        found.append(
            {
                "test_image": i,
                "pixels": (16 * images[i]).round().int().tolist(),
                "label": int(labels[i]),
                "predicted": top,
                "std": float(each.std[i, top]),
                "entropy": float(prediction.entropy[i]),
                "mutual_information": float(prediction.mutual_information[i]),
                **{name: t[i].tolist() for name, t in {"probabilities": each.mean, "low": low, "high": high}.items()},
            }
        )
    return found


# All of it --------------------------------------------------------------------------------------------------


def run(
    *, epochs: int = EPOCHS, seed: int = 0, out: Path = Path("secateur-demo"), console: Console | None = None
) -> dict[str, Any]:
    """Train a model with dropout, take samples of it on clean and noisy digits, and see whether it knows its errors.

    Args:
        epochs: passes over the training images.
        seed: of the weights, batches, noise and dropout masks: the same seed gives the same result, but for rounding.
        out: its folder `uncertainty` gets `run.json` and the picture.
        console: where the table and the progress are shown; None for nowhere.

    Returns:
        What `run.json` holds.

    Raises:
        InputError, InputTypeError: a setting that makes no sense, or a file in the place of the folder.
    """
    began, out = time.perf_counter(), Path(out) / "uncertainty"
    require(epochs, seed, out.parent, out)
    out.mkdir(parents=True, exist_ok=True)
    data = load()
    with progress(console, epochs + 2 * len(LEVELS)) as (say, tick):
        say("training with dropout")
        model = train_with_dropout(data, epochs, seed=seed, watch=lambda model: tick(1))
        with alone(seed):
            found = sc.dropout.find(model, data.test_images)
        levels: list[dict[str, Any]] = []
        unsure: list[dict[str, Any]] = []
        for level in LEVELS:
            say(f"{SAMPLES} samples, noise {level:g}")
            images = noisy(data.test_images, level, seed=seed)
            plain, prediction = look(model, images, seed=seed)
            levels.append(
                {
                    "noise": level,
                    "plain": judge(plain, data.test_labels),
                    "samples": judge(prediction.probabilities, data.test_labels),
                    "mutual_information": float(prediction.mutual_information.double().mean()),
                }
            )
            unsure = unsure or least_sure(prediction, images, data.test_labels)  # the clean ones come first
            tick(2)
    result: dict[str, Any] = {
        "versions": versions(),
        "settings": {"epochs": epochs, "seed": seed, "samples": SAMPLES, "threads": 1},
        "data": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "dropout": [{"where": c.path, "kind": c.kind, "rate": c.rate, "shape": list(c.shape)} for c in found.calls],
        "out_of_reach": [str(one) for one in found.unreached],
        "levels": levels,
        "least_sure": unsure,
    }
    save_pictures(result, out, [PICTURE], draw)
    return finish(result, began, out, console, tell)


# How it is shown --------------------------------------------------------------------------------------------


def tell(result: dict[str, Any], out: Path, console: Console) -> None:
    """Print what was measured, what it means, and where the files are."""
    table = Table(title="secateur demo: what an LSTM is unsure of", title_justify="left")
    for name in ("noise", "read by", "right", "confidence", "ECE", "entropy", "mutual inf.", "unsure", "sure", "AURC"):
        table.add_column(name, justify="left" if name == "read by" else "right")
    for level in result["levels"]:
        for reading, words in READINGS.items():
            one = level[reading]
            mutual = f"{level['mutual_information']:.3f}" if reading == "samples" else ""
            shares = [percent(one[name]) for name in ("accuracy", "confidence", "unsure", "sure")]
            cells = [*shares[:2], f"{one['ece']:.3f}", f"{one['entropy']:.3f}", mutual, *shares[2:]]
            first = f"{level['noise']:g}" if reading == "plain" else ""
            table.add_row(first, words, *cells, f"{one['area']:.4f}", end_section=reading == "samples")
    console.print(table)
    unsure = Table(title="the test images it is least sure of, without noise", title_justify="left")
    for name in ("test image", "is a", "read as", "probability", "± std", "entropy", "mutual inf."):
        unsure.add_column(name, justify="right")
    for image in result["least_sure"]:
        right = image["predicted"] == image["label"]
        top = image["probabilities"][image["predicted"]]
        cells = [f"{value:.2f}" for value in (top, image["std"], image["entropy"], image["mutual_information"])]
        unsure.add_row(
            str(image["test_image"]),
            str(image["label"]),
            Text(f"{image['predicted']}{'' if right else ' WRONG'}"),
            *cells,
        )
    console.print(unsure)
    for line in (*meaning(result), "", f"{result['seconds']:.0f} seconds. In {out}: run.json (every number)"):
        console.print(line, markup=False, highlight=False)
    picture = f"picture: {result['pictures'][0]}" if result["pictures"] else result["note"]
    console.print(picture, markup=False, highlight=False)


def meaning(result: dict[str, Any]) -> list[str]:
    """Put the numbers into words: one line for each finding."""
    levels = result["levels"]
    calls = ", ".join(f"{c['kind']} {c['rate']:g} in {c['where']}" for c in result["dropout"])
    tenth = max(1, result["data"]["test"] // 10)

    def at(name: str, better: bool = True) -> str:
        """At which noise the samples have the lower value."""
        return _list([f"{x['noise']:g}" for x in levels if (x["samples"][name] < x["plain"][name]) == better])

    unsure, sure = (percent(levels[0]["samples"][name]) for name in ("unsure", "sure"))
    blind = [f"{x['noise']:g}" for x in levels if x["samples"]["unsure"] <= x["samples"]["sure"]]
    verdict = f"NO more among the former at noise {_list(blind)}" if blind else "more among the former at every noise"
    return [
        f"dropout: {calls}" + "".join(f"; OUT OF REACH: {one}" for one in result["out_of_reach"]),
        f"right, confidence: of {result['data']['test']} test images, none of them among the "
        f"{number(result['data']['train'])} for training; entropy and mutual information in nats, means",
        f"unsure, sure: errors among the {tenth} images of highest and of lowest entropy: without noise {unsure} and "
        f"{sure}; {verdict}",
        f"ECE, the gap between confidence and accuracy, is lower with samples at noise {at('ece')}, and not at noise "
        f"{at('ece', False)}",
        f"AURC, the mean error over all shares of images answered, is lower with samples at noise {at('area')}, and "
        f"not at noise {at('area', False)}",
    ]


def _list(names: list[str]) -> str:
    return ", ".join(names) or "(none)"


_GREY, _GREEN, _BLUE, _RED = "#7a7a7a", "#1b7f5c", "#3b6fb6", "#c0392b"


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw the images that the model is least sure of, and uncertainty and calibration against noise.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 0.95))
    above, below = halves
    above.suptitle("Least sure of: probabilities, and where nine samples of ten lie", x=0.01, ha="left", weight="bold")
    images = result["least_sure"]
    axes = above.subplots(2, len(images), height_ratios=(1, 0.9))
    for (over, under), image in zip(axes.T, images, strict=True):
        right = image["predicted"] == image["label"]
        over.imshow(image["pixels"], cmap="gray_r", vmin=0, vmax=16)
        over.set_title(f"read as {image['predicted']}, is a {image['label']}", size=10, color=_GREEN if right else _RED)
        over.set_axis_off()
        colors = [_GREEN if digit == image["label"] else _GREY for digit in range(10)]
        under.bar(range(10), image["probabilities"], color=colors, alpha=0.6)
        under.vlines(range(10), image["low"], image["high"], color="black", lw=1)
        under.set(ylim=(0, 1), xticks=range(10))
        under.tick_params(labelsize=7, labelleft=under is axes[1, 0])
        under.spines[["top", "right"]].set_visible(False)
        under.set_xlabel(f"entropy {image['entropy']:.2f}, mut. inf. {image['mutual_information']:.2f}", size=7)
    _curves(result["levels"], *below.subplots(1, 3))
    return {PICTURE: figure}


def _curves(levels: list[dict[str, Any]], doubt: Any, ece: Any, errors: Any) -> None:
    """Entropy, calibration error, and errors among the sure and the unsure, against noise."""
    noise = [level["noise"] for level in levels]

    def curve(axes: Any, reading: str, name: str, color: str, label: str, style: str = "-") -> None:
        axes.plot(noise, [level[reading][name] for level in levels], style, color=color, marker=".", lw=2, label=label)

    curve(doubt, "plain", "entropy", _GREY, "entropy, one pass")
    curve(doubt, "samples", "entropy", _GREEN, f"entropy, {SAMPLES} samples")
    mutual = [level["mutual_information"] for level in levels]
    doubt.plot(noise, mutual, color=_BLUE, marker=".", lw=2, label="mutual information")
    curve(ece, "plain", "ece", _GREY, "one pass")
    curve(ece, "samples", "ece", _GREEN, f"{SAMPLES} samples")
    curve(errors, "samples", "unsure", _RED, "most unsure tenth")
    errors.plot(noise, [1 - x["samples"]["accuracy"] for x in levels], color=_GREY, marker=".", lw=2, label="all")
    curve(errors, "samples", "sure", _GREEN, "least unsure tenth")
    titles = {doubt: "Uncertainty (nats)", ece: "Calibration error (ECE)", errors: "Share of errors"}
    for axes, title in titles.items():
        axes.set_title(title, loc="left", weight="bold", size=11)
        axes.set(xlabel="standard deviation of the noise", ylim=(0, 1.05) if axes is errors else (0, None))
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
