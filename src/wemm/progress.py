"""Progress of long work: a bar with ETA on a terminal, silence in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
"""Called with the amount just done."""
ProgressBar = Callable[[str, int | None, str], AbstractContextManager[Advance]]
"""(description, total, "bytes" or what is counted) → context whose value advances the bar."""


@contextmanager
def silent(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    """No bar."""
    yield lambda amount: None


@contextmanager
def terminal_bar(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar on stderr that disappears when done; nothing if stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    done = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        done,
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)
