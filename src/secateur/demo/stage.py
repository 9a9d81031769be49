"""What the stories share: settings that make sense, a progress bar, and a folder of numbers and pictures."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from secateur.errors import InputError
from secateur.support import checks
from secateur.support.files import replacing
from secateur.support.machine import secateur_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Watch = Callable[[nn.Module], object]


def unwatched(model: nn.Module) -> None:
    """Do nothing after an epoch."""


def require(epochs: int, seed: int, *folders: Path) -> None:
    """Refuse nonsense before any work.

    Raises:
        InputError, InputTypeError: a setting that cannot be used, or a file in the place of a folder.
    """
    checks.whole("epochs", epochs, 1)
    checks.whole("seed", seed)
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}: give a number from 0 to 2^64 - 1")
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file, and the demo leaves a folder: give --out another name, or remove it")


@contextmanager
def progress(console: Console | None, ticks: float) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """Give `say(what is being done)` and `tick(how much of it is done)`: an epoch is 1."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=console is None, transient=True) as bar:
        task = bar.add_task("", total=ticks)
        yield lambda text: bar.update(task, description=text), lambda n: bar.advance(task, n)


def versions() -> dict[str, str]:
    """Say what has run."""
    return {"secateur": secateur_version(), "torch": torch.__version__, "python": platform.python_version()}


def same_answers(fresh: dict[str, Any]) -> str:
    """Say in words what `elsewhere.py` found."""
    same = fresh["same_bits"] and not fresh["secateur_importable"]
    return "the same answers, bit for bit" if same else "OTHER answers"


def write(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there at all."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def finish(
    result: dict[str, Any],
    began: float,
    out: Path,
    console: Console | None,
    tell: Callable[[dict[str, Any], Path, Console], None],
) -> dict[str, Any]:
    """Note how many seconds it took since `began`, write `run.json`, and tell it where there is a console."""
    result["seconds"] = round(time.perf_counter() - began, 1)
    write(out / "run.json", json.dumps(result, indent=1).encode() + b"\n")
    if console is not None:
        tell(result, out, console)
    return result


def save_pictures(
    result: dict[str, Any], out: Path, names: Sequence[str], draw: Callable[[dict[str, Any]], dict[str, Figure]]
) -> None:
    """Draw the pictures, if matplotlib is there, and note in the result which there are, or how to get them."""
    for name in names:
        (out / name).unlink(missing_ok=True)  # a picture of an earlier run would tell another story
    try:
        figures = draw(result)
    except ImportError:
        note = 'matplotlib is not installed; for the pictures: pip install "secateur[plot]"'
        result.update(pictures=[], note=note)
        return
    for name, figure in figures.items():
        with replacing(out / name) as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)
    result.update(pictures=list(figures), note="")
