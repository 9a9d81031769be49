"""The command line: `secateur inspect | demo | doctor`.

Every command has `--json`: one JSON object on stdout and nothing else. An error is one sentence on stderr,
with `--json` too, and exit status 2, as for a usage error; Ctrl-C exits with 130. A person at a terminal gets
rich tables, a pipe gets plain text. torch is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from typer.core import TyperGroup

from secateur.errors import SecateurError
from secateur.tables import Table


class _Group(TyperGroup):
    """Turns an error into one sentence and an exit status, for every command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `secateur inspect FILE | head`: typer ends quietly
            raise
        except (SecateurError, OSError) as error:
            typer.echo("secateur: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(2) from None


class _Result(Protocol):
    def table(self) -> Table: ...
    def to_dict(self) -> dict[str, Any]: ...


app = typer.Typer(
    cls=_Group,
    help="Precise pruning for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def _version(wanted: bool) -> None:
    if wanted:
        from secateur.doctor import secateur_version

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
        Path, typer.Argument(help="A .safetensors, .pt, .pth or .bin file, or a sharded index or its folder.")
    ],
    as_json: Json = False,
) -> None:
    """Count the zeros of every tensor of a checkpoint; runs no pickled code."""
    from secateur.checkpoints import inspect as inspect_file

    _show(inspect_file(file), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and installation are, and what is slow on them and why."""
    from secateur.doctor import diagnose

    _show(diagnose(), as_json)


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 20,
    sparsity: Annotated[float, typer.Option(help="Fraction of weights that become zero, 0 <= s < 1.")] = 0.9,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder for files and plots.")] = Path("secateur-demo"),
    as_json: Json = False,
) -> None:
    """Prune an LSTM on real data, end to end, and measure what it gained."""
    from secateur.demo import run

    console = None if as_json else Console()
    result = run(epochs=epochs, sparsity=sparsity, seed=seed, out=out, console=console)
    if as_json:
        _print_json(result)


def _show(result: _Result, as_json: bool) -> None:
    console = Console()
    if as_json:
        _print_json(result.to_dict())
    elif console.is_terminal:
        _draw(result.table(), console)
    else:  # a pipe has no width to fit into
        typer.echo(result.table().text())


def _draw(table: Table, console: Console) -> None:
    drawn = RichTable(title=escape(table.title))
    for i, name in enumerate(table.header):
        drawn.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    console.print(drawn)
    for note in table.notes:
        console.print(note, markup=False, highlight=False)


def _print_json(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result, indent=2, default=str))


def main() -> None:
    """Run the command line; exits the process."""
    app(prog_name="secateur")


if __name__ == "__main__":
    main()
