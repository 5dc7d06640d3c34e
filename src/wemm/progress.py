"""Progress of long work: a bar with ETA on a terminal, silence in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the amount just done."""
Description = str | Callable[[], str]
"""What a bar says; a function is asked again and again."""


class ProgressBar(Protocol):
    """Long work that can be watched."""

    def __call__(
        self, description: Description, total: int | None, unit: str, /
    ) -> AbstractContextManager[Advance]:
        """`unit` is "bytes" or what is counted; the context's value advances the bar."""


@contextmanager
def silent(description: Description, total: int | None, unit: str) -> Iterator[Advance]:
    """No bar."""
    yield lambda amount: None


@contextmanager
def terminal_bar(description: Description, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar on stderr that disappears when done; nothing if stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Saying(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(description if isinstance(description, str) else description())

    console = Console(stderr=True)
    done = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    columns = (
        Saying(),
        BarColumn(),
        done,
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda amount: progress.advance(task, amount)
