"""Results as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wemm.errors import ParameterError


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Text columns to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row))
    Console(width=max(100, Console().width)).print(table)


def bars(path: Path, label: str, values: Mapping[str, float]) -> None:
    """A bar chart. Raises ParameterError if matplotlib is absent or the file type unknown."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ParameterError("--plot needs matplotlib: pip install 'wemm[bench]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.6 * len(values) + 1.2), layout="constrained")
    axes.bar_label(axes.barh(list(values), list(values.values())), fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=label)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ParameterError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)
