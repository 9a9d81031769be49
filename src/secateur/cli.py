"""The command line: `secateur demo | inspect | prune | shrink | pack | unpack | bench | doctor`.

Every command has `--json`: one JSON object on stdout and nothing else. An error is one sentence on stderr,
with `--json` too, and exit status 2, as for a usage error; Ctrl-C exits with 130. A terminal gets tables
that fit its width, a pipe gets one line a row. torch is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from secateur.errors import InputError, SecateurError, printable
from secateur.support.tables import Table

_LONGEST = 1200  # characters of an error
_FACTORY = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")  # MODULE:FACTORY


class _Group(TyperGroup):
    """Turns an error into one sentence and an exit status, for every command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `secateur inspect FILE | head`: typer ends quietly
            raise
        except MemoryError:
            typer.echo("secateur: there is not enough memory for this: use a machine that has more", err=True)
            raise typer.Exit(2) from None
        except (SecateurError, OSError) as error:
            typer.echo(f"secateur: {_sentence(_told(error))}", err=True)
            raise typer.Exit(2) from None


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"secateur: warning: {_sentence(_told(message))}", err=True)


def _told(message: BaseException | str) -> str:
    """A message without what of it is for Python only."""
    return str(message).removesuffix(getattr(message, "in_python", ""))


def _sentence(text: str) -> str:
    """One line, whatever names are in it; of a very long one beginning and end, where the remedy stands."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


class _Result(Protocol):
    def table(self) -> Table: ...
    def to_dict(self) -> dict[str, Any]: ...


app = typer.Typer(
    cls=_Group,
    help="Precise pruning for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Key = Annotated[
    str | None, typer.Option(help="Of a training checkpoint with several states, the one to take: --key ema.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from secateur.support.machine import secateur_version

        typer.echo(f"secateur {secateur_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Precise pruning for PyTorch."""


@app.command()
def inspect(
    file: Annotated[
        Path, typer.Argument(help="A .safetensors, .pt, .pth, .bin or .ckpt file, or a sharded index or its folder.")
    ],
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Count the zeros of every tensor of a checkpoint, and say how it is packed; runs no pickled code."""
    from secateur.storage.checkpoints import inspect as inspect_file
    from secateur.storage.checkpoints import opened

    _show(inspect_file(opened(file, key)), as_json)


Source = Annotated[
    Path, typer.Argument(help="A .safetensors, .pt, .pth, .bin or .ckpt file, or a folder of shards with their index.")
]
Output = Annotated[Path, typer.Argument(help="A .safetensors file, or a folder if the source is one.")]
Level = Annotated[str, typer.Option(help="lossless, fp16, bf16, or steps of near, small or tiny size (lossy).")]


class _Prune(TyperCommand):
    """Lists in its help the choices that are registered, which takes torch: `secateur --help` does without."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from secateur import allocation, patterns

        more = "sensitivity"  # which is no rule of its own: oneshot measures it
        choices = {
            "allocation": (allocation.names_for_files(), [*allocation.ALLOCATIONS.written(), more]),
            "pattern": (patterns.names_for_files(), patterns.PATTERNS.written()),
        }
        for option in self.params:
            if option.name in choices:
                files, every = choices[option.name]
                others = ", ".join(name for name in every if name not in files)
                listed = f"{', '.join(files)}{'; with data also ' if others else ''}{others}"
                option.help = f"{listed}. {getattr(option, 'help', '')}"  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


@app.command(cls=_Prune)
def prune(
    sparsity: Annotated[float, typer.Option(help="Fraction of the chosen weights that become zero, 0 <= s < 1.")],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint: a file, or a folder of shards with their index. With --data MODULE:FACTORY."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .safetensors file, or a folder for a folder.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="MODULE:BATCHES", help="Inputs: the model of MODULE:FACTORY is pruned by what it reads."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="A checkpoint that fills the model of MODULE:FACTORY.")] = None,
    hf: Annotated[Path | None, typer.Option(help="A folder of save_pretrained, instead of MODULE:FACTORY.")] = None,
    texts: Annotated[Path | None, typer.Option(help="With --hf, in place of --data: a text a line.")] = None,
    allocation: Annotated[
        str, typer.Option(help="How the zeros are shared among tensors.", show_default="global; uniform with data")
    ] = "",
    pattern: Annotated[str, typer.Option(help="With 2:4 and the like at most 2 of every 4 inputs stay.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Prune what this glob names; may be given again.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out what this glob names; may be given again.")] = None,
    pack: Annotated[str, typer.Option(help="Pack what is written, at this level: lossless, fp16, ...")] = "",
    key: Key = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pruned; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint by magnitude, exactly, however large it is; or, with data, a model by what its layers read.

    Without data no model code is needed; with torchrun (torchrun --nproc-per-node 4 -m secateur prune ...) the
    processes share the work. With data the weights that stay are fitted so that the outputs change least; no training.
    """
    if (out is None) == (not dry_run):
        raise typer.BadParameter("give either --out or --dry-run")
    if data is not None or hf is not None or texts is not None:
        from secateur import oneshot_command

        source = oneshot_command.Source(checkpoint, data, weights, hf, texts)
        chosen = only or (), skip or ()
        way: Any = {"allocation": allocation or "uniform", "pattern": pattern or None, "pack": pack or None}
        _show(oneshot_command.run(source, sparsity, out=out, chosen=chosen, **way), as_json)
        return
    if checkpoint is None or weights is not None:
        raise typer.BadParameter("give a checkpoint; or MODULE:FACTORY with --data, and --weights")
    if not Path(checkpoint).exists() and _FACTORY.fullmatch(checkpoint):
        raise InputError(f"{checkpoint} is a model of MODULE:FACTORY: give --data MODULE:BATCHES, too, to prune it by")
    from secateur.storage.checkpoints import opened
    from secateur.storage.pruning import Recipe, prune_checkpoint, work

    recipe = Recipe(sparsity, allocation or "global", pattern or None, tuple(only or ()), tuple(skip or ()))
    opening = opened(Path(checkpoint), key)
    with _ranks() as processes, _progress("pruning", lambda: work(opening, recipe)) as progress:
        result = prune_checkpoint(opening, out, recipe, level=pack or None, progress=progress, processes=processes)
    if processes.rank == 0:
        _show(result, as_json)


@app.command()
def pack(
    checkpoint: Source,
    out: Output,
    level: Level = "lossless",
    step: Annotated[float | None, typer.Option(help="A step of your own, relative to the rms of the weights.")] = None,
    effort: Annotated[str, typer.Option(help="fast, normal or best.")] = "normal",
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Pack a checkpoint into files near the entropy of its weights; lossless unless you choose a lossy level."""
    from secateur.storage.checkpoints import opened
    from secateur.storage.conversion import pack as pack_file

    source, progress = opened(checkpoint, key), Console(stderr=True).is_terminal
    _show(pack_file(source, out, level=level, step=step, effort=effort, progress=progress), as_json)


@app.command()
def unpack(checkpoint: Source, out: Output, key: Key = None, as_json: Json = False) -> None:
    """Turn packed files into plain .safetensors files, verified to hold what was saved."""
    from secateur.storage.checkpoints import opened
    from secateur.storage.conversion import unpack as unpack_file

    _show(unpack_file(opened(checkpoint, key), out, progress=Console(stderr=True).is_terminal), as_json)


@app.command()
def shrink(
    model: Annotated[
        str | None, typer.Argument(metavar="MODULE:FACTORY", help="models:build calls build() of models.py, here.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Sizes of an argument, as for bench: 1x784, or input_ids=1x16:int64 by name."),
    ] = None,
    hf: Annotated[Path | None, typer.Option(help="A folder of save_pretrained, instead of MODULE:FACTORY.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint, packed or not, that fills the model; it runs no pickled code.")
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction of the units of each group that go.", show_default="the dead units"),
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Fraction of the multiply-accumulates that remains, in place of --sparsity.")
    ] = None,
    params: Annotated[float | None, typer.Option(help="Fraction of the parameters that remains.")] = None,
    latency: Annotated[float | None, typer.Option(help="Fraction of the time of a call that remains.")] = None,
    depth: Annotated[
        float | None, typer.Option(help="Fraction of the residual blocks that remains; alone, or with --sparsity.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .safetensors file; a new folder with --hf.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan made before, in place of a model: it cuts the checkpoint, tensor by tensor."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Give a model smaller shapes, proven equal to the masked original, and write it with its plan."""
    from secateur.shrink_command import by_plan, run

    if (out is None) == (not dry_run):
        raise typer.BadParameter("give either --out or --dry-run")
    if plan is not None:
        amounts = (sparsity, macs, params, latency, depth)
        if model is not None or inputs or any(amount is not None for amount in amounts):
            raise typer.BadParameter("--plan says what goes: give it with --weights F or --hf FOLDER only")
        _show(by_plan(plan, weights, hf, out), as_json)
        return
    asked = {"macs": macs, "params": params, "latency": latency, "depth": depth}
    given: Any = {what: amount for what, amount in asked.items() if amount is not None}
    _show(run(model, inputs or [], hf=hf, weights=weights, out=out, sparsity=sparsity, **given), as_json)


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="models:build calls build() of models.py, in this folder.")
    ],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            help="Sizes of an argument of the model, 1x784, of random numbers; 1x128:int64 is of whole numbers below "
            "100, 1x128:int64:2 of those below 2. Once for each argument.",
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            "--weights",
            help="A checkpoint, packed or not, that fills the model; it runs no pickled code.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; as many as torch takes by default.")] = None,
    seconds: Annotated[float, typer.Option(help="About how long each of the two models is timed.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Accelerate a model of yours, and measure what that gains on this machine."""
    from secateur.runtime.bench import run

    result = run(model, inputs, checkpoint=checkpoint, threads=threads, seconds=seconds)
    if as_json:
        _print_json(result.to_dict())
        return
    _show(result.explanation, as_json)
    typer.echo()
    _show(result.comparison, as_json)


@contextmanager
def _progress(what: str, total: Callable[[], int]) -> Iterator[Callable[[int], None] | None]:
    """A bar with bytes and time left, on stderr if that is a terminal."""
    if not Console(stderr=True).is_terminal:
        yield None
        return
    from secateur.support.progress import progress_bar

    with progress_bar(what, total(), shown=True, in_bytes=True) as advance:
        yield advance


@contextmanager
def _ranks() -> Iterator[Any]:
    """The processes that torchrun has started, joined for as long as they work together."""
    from secateur.support.process_groups import ALONE, Group

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        yield Group()
    finally:
        distributed.destroy_process_group()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and installation are, and what is slow on them and why."""
    from secateur.doctor import diagnose

    _show(diagnose(), as_json)


@app.command()
def demo(
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Epochs of each training.", show_default="20; 15 with --structured, 40 with --uncertainty"
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of weights that become zero, 0 <= s < 1; of units that go with --structured.",
            show_default="0.9; 0.5 with --structured, 0.8 with --oneshot",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder for files and plots.")] = Path("secateur-demo"),
    structured: Annotated[
        bool, typer.Option("--structured", help="Fewer units instead of zeros: a smaller LSTM, beside a sparse one.")
    ] = False,
    oneshot: Annotated[
        bool, typer.Option("--oneshot", help="Pruned after training, without a loop: beside magnitude.")
    ] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Dropout instead: train with it, and see what the model is unsure of.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prune an LSTM on real data, end to end, and measure what it gained."""
    console = None if as_json else Console()
    chosen: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    if structured + oneshot + uncertainty > 1:
        raise typer.BadParameter("--structured, --oneshot and --uncertainty are three demos: give one of them")
    if uncertainty:
        from secateur.demo.uncertainty import run as run_uncertainty

        if sparsity is not None:
            raise typer.BadParameter("--uncertainty prunes nothing: leave out --sparsity")
        result = run_uncertainty(**chosen, seed=seed, out=out, console=console)
    else:
        if structured:
            from secateur.demo.structured import run
        elif oneshot:
            from secateur.demo.after_training import run
        else:
            from secateur.demo import run

        chosen |= {} if sparsity is None else {"sparsity": sparsity}
        result = run(**chosen, seed=seed, out=out, console=console)
    if as_json:
        _print_json(result)


def _show(result: _Result, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_dict())
    else:
        console = Console()  # a pipe has no width to fit into, and `grep` wants a row to be a line
        typer.echo(result.table().text(console.width if console.is_terminal else None))


def _print_json(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result, indent=2, default=str))


def main() -> None:
    """Run the command line; exits the process."""
    app(prog_name="secateur")


if __name__ == "__main__":
    main()
