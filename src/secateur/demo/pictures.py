"""How the result of the demo is shown: as a table in the terminal, and as two plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur.measurement.timing import duration
from secateur.support.tables import number, percent, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("training.png", "layers.png")

_DENSE, _GRADUAL, _SPARSITY, _COLLAPSE = "#7a7a7a", "#1b7f5c", "#3b6fb6", "#c0392b"


# The table --------------------------------------------------------------------------------------------------


def tell(result: dict[str, Any], out: Path, console: Console) -> None:
    """Print the table that tells the story, and where the files are."""
    table = Table(title="secateur demo: an LSTM that reads handwritten digits", title_justify="left", show_lines=True)
    table.add_column("step")
    table.add_column("zeros", justify="right", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("what it means")
    for step, zeros, right, meaning in story(result):
        table.add_row(Text(step), zeros, right, Text(meaning))
    console.print(table)
    data, settings = result["data"], result["settings"]
    for line in (
        f"zeros: of {number(result['weights'])} weights; accuracy: on {data['test']} images, none of them among the "
        f"{number(data['train'])} for training; seed {settings['seed']}",
        result["comparison"]["summary"],
        _speed(result["fast"]),
        "",
        f"{result['seconds']:.0f} seconds. In {out}: run.json (every number), dense.safetensors and pruned.safetensors "
        "(plain weights), pruned.packed.safetensors, masks.safetensors, elsewhere.py (loads the weights without "
        "secateur)",
        f"pictures: {', '.join(result['pictures'])}" if result["pictures"] else result["note"],
    ):
        console.print(line, markup=False, highlight=False)


def story(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Put the numbers into words: step, zeros, accuracy, meaning."""
    epochs, asked = result["settings"]["epochs"], result["settings"]["sparsity"]
    dense, one_shot, gradual, longer = (result[key] for key in ("dense", "one_shot", "gradual", "dense_longer"))
    remaining, total = (result["rounds"][key] for key in ("of_what_remains", "of_the_total"))
    fresh, packed, n = result["fresh_process"], result["packed"], len(total)
    measured, verdict = result["comparison"]["measurements"], result["comparison"]["verdict"]
    milliseconds = {name: f"{1e3 * one['seconds']:.2f} ms" for name, one in measured.items()}
    file = {name: size(one["file_bytes"]) for name, one in measured.items()}

    def row(step: str, state: dict[str, Any], meaning: str) -> tuple[str, str, str, str]:
        return step, percent(state["sparsity"]), percent(state["accuracy"]), meaning

    lost, ahead = one_shot["accuracy"] - dense["accuracy"], gradual["accuracy"] - longer["accuracy"]
    passes = f"{epochs} epoch{'s' if epochs > 1 else ''}"
    same = fresh["same_bits"] and not fresh["secateur_importable"]
    return [
        row(f"1. train dense, {passes}", dense, "a plain model, plainly trained"),
        row(
            "2. prune at once",
            one_shot,
            f"{number(one_shot['zeros'])} weights cut in one go: accuracy {100 * lost:+.1f} points",
        ),
        row(
            f"3. prune gradually, {passes}",
            gradual,
            f"as many zeros, exactly {number(gradual['zeros'])}, reached while training on: {100 * ahead:+.1f} points "
            "against the dense model trained as long",
        ),
        row(f"   train on dense, {passes}", longer, "the dense model trained as long"),
        (
            f"4. {n} rounds, each a tenth of what remains",
            percent(remaining[-1]),
            "",
            f"1 - 0.9^{n} = {1 - 0.9**n:.3f}: the way of torch.nn.utils.prune",
        ),
        (
            f"   {n} rounds, each a tenth of what was asked",
            percent(total[-1]),
            "",
            f"{n} x {asked / n:g} = {asked:g}: the way of secateur",
        ),
        row(
            "5. load in a fresh process",
            {**gradual, **fresh},
            f"without secateur, {'the same' if result['same_model'] else 'OTHER'} module and keys: "
            + ("the same predictions, bit for bit" if same else "OTHER predictions"),
        ),
        (
            "6. measure",
            percent(gradual["sparsity"]),
            "",
            f"{milliseconds['dense']} before, {milliseconds['pruned']} after: {verdict['pruned']}; "
            f"file {file['dense']} before, {file['pruned']} after",
        ),
        (
            "7. save it packed",
            percent(gradual["sparsity"]),
            "",
            f"file {size(packed['bytes'])}, {packed['over_plain']:.3f} of the plain one; "
            f"{'every bit comes back' if packed['same_bits'] else 'OTHER bits come back'}",
        ),
        row("8. run it faster", {**gradual, **result["fast"]}, _race(result["fast"])),
    ]


def _race(fast: dict[str, Any]) -> str:
    """What step 8 measured: times, answers, and which layers stayed dense."""
    parts = []
    for count, one in fast["comparisons"].items():
        times = ", ".join(f"{duration(m['seconds'])} {name}" for name, m in one["measurements"].items())
        parts.append(f"{_images(count)}: {times}: {_verdict(one)}")
    other = fast["other_answers"]
    answers = f"{other} OTHER answers" if other else "the same answers"
    parts.append(f"{answers} as pruned, outputs equal to within {fast['relative_error']:.0e}")
    dense = [f"{layer['name']} ({layer['reason']})" for layer in fast["plan"]["layers"] if layer["reason"]]
    return "; ".join([*parts, *([f"left dense: {', '.join(dense)}"] if dense else [])])


def _speed(fast: dict[str, Any]) -> str:
    """The line on the speed below the table."""
    plan = fast["plan"]
    gains = ", ".join(f"{_images(count)} {_verdict(one)}" for count, one in fast["comparisons"].items())
    kernels = f"{plan['isa']} kernels" if plan["isa"] else "no native kernels"
    return f"fast, beside dense: {gains} ({kernels}, threads: {plan['threads']})"


def _images(count: str) -> str:
    return "one image" if count == "1" else f"{count} images"


def _verdict(comparison: dict[str, Any]) -> str:
    verdict: str = comparison["verdict"]["fast"]
    return {"no difference": "no faster on this machine"}.get(verdict, verdict)


# The plots --------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw both pictures; the key is the file name.

    Raises:
        ImportError: there is no matplotlib.
    """
    return {"training.png": _training(result), "layers.png": _layers(result)}


def _training(result: dict[str, Any]) -> Figure:
    """Sparsity and accuracy over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    history, last = result["history"], result["history"]["dense"][-1]

    def curve(name: str, key: str, **style: Any) -> None:
        points = history[name] if name == "dense" else [last, *history[name]]
        axes.plot([p["step"] for p in points], [100 * p[key] for p in points], marker=".", **style)

    begin, end = last["step"], history["gradual"][-1]["step"]
    axes.axvspan(begin, end, color=_SPARSITY, alpha=0.05, lw=0)
    curve("dense", "accuracy", color=_DENSE, lw=2, label="dense")
    curve("dense_longer", "accuracy", color=_DENSE, lw=2, ls=":", label="dense, trained on")
    curve("gradual", "accuracy", color=_GRADUAL, lw=2.5, label="pruned gradually")
    curve("gradual", "sparsity", color=_SPARSITY, lw=2, ls="--", label="its zeros")
    one_shot = result["one_shot"]
    axes.plot(begin, 100 * one_shot["accuracy"], "X", color=_COLLAPSE, ms=11)
    axes.annotate(
        f"{percent(one_shot['sparsity'])} pruned at once:\n{percent(one_shot['accuracy'])} right",
        (begin, 100 * one_shot["accuracy"]),
        (-14, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=_COLLAPSE,
    )
    gradual = result["gradual"]
    accuracy, sparsity = gradual["accuracy"], gradual["sparsity"]
    for value, word, color in ((accuracy, "right", _GRADUAL), (sparsity, "zeros", _SPARSITY)):
        axes.annotate(
            f"{percent(value)} {word}",
            (end, 100 * value),
            (6, 0),
            textcoords="offset points",
            va="bottom" if value == max(accuracy, sparsity) else "top",
            color=color,
            annotation_clip=False,
        )
    axes.set(xlim=(0, end), ylim=(0, 102), xlabel="optimizer steps", ylabel="% of test images, % of weights")
    axes.set_title("Accuracy and sparsity while training", loc="left", weight="bold")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _tidy(axes)
    return figure


def _layers(result: dict[str, Any]) -> Figure:
    """The share of zeros in each tensor."""
    from matplotlib.figure import Figure

    layers = result["layers"]
    figure = Figure(figsize=(9, 1.6 + 0.7 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    shares = [100 * layer["zeros"] / layer["weights"] for layer in layers]
    axes.barh([layer["name"] for layer in layers], shares, color=_SPARSITY, height=0.6)
    for i, (layer, share) in enumerate(zip(layers, shares, strict=True)):
        inside = share > 37  # else there is no room for the text
        axes.annotate(
            f"{share:.2f} %  ({number(layer['zeros'])} of {number(layer['weights'])} are zero)",
            (0 if inside else share, i),
            (8, 0),
            textcoords="offset points",
            va="center",
            color="white" if inside else _SPARSITY,
            bbox=None if inside else {"fc": "white", "ec": "none", "pad": 1},
        )
    total = 100 * result["gradual"]["sparsity"]
    axes.axvline(total, color=_COLLAPSE, ls="--", lw=1.5, label=f"all together: {total:.2f} %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0.2)
    axes.set(xlim=(0, 100), xlabel="% of weights that are zero")
    axes.set_title("Sparsity of each tensor", loc="left", weight="bold")
    axes.invert_yaxis()
    _tidy(axes)
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
