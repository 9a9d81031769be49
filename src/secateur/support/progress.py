"""A progress bar on stderr, for the verbs that take `progress=True`; off unless it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    what: str, total: float | None, *, shown: bool, in_bytes: bool = False
) -> Iterator[Callable[[float], None]]:
    """Show how far a long call has come.

    Args:
        what: the word in front of the bar, such as "sampling".
        total: what there is to do, in any unit; None if nobody knows.
        shown: False draws nothing, and rich is not imported.
        in_bytes: write the numbers as bytes: "1.2/3.4 GB".

    Yields:
        A function to be called with what was done since the last call.
    """
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    done = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
