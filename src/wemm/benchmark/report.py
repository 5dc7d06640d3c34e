"""How a result leaves the program: tables and one JSON line on stdout, CSV, chart and HTML in files."""

from __future__ import annotations

import csv
import json
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wemm.benchmark.outputs import Outputs
from wemm.benchmark.result import Result, Table
from wemm.errors import StorageError

_GAP = 3  # between two columns


def finish(results: Sequence[Result], outputs: Outputs) -> None:
    """Tables, then one JSON line, then the files: a full disk costs no figure. Raises StorageError."""
    for result in results:
        for table in result.tables:
            print_table(table)
        for note in result.notes:
            print(note)
    lines = [{**result.line(), "command": command_line(sys.argv)} for result in results]
    print(json.dumps(lines[0] if len(lines) == 1 else {"results": lines}, ensure_ascii=False))
    _write_files(results, lines, outputs)


def _write_files(results: Sequence[Result], lines: Sequence[Mapping[str, Any]], outputs: Outputs) -> None:
    if outputs.csv is not None:
        _writing("--csv", outputs.csv, lambda path: write_csv(path, results[0].tables[0]))
    if outputs.plot is not None:
        _writing("--plot", outputs.plot, results[0].chart)
    if outputs.report is not None:
        from wemm.benchmark.html import write_report

        accuracy = outputs.read_accuracy()
        _writing("--report", outputs.report, lambda path: write_report(path, lines, accuracy))


def command_line(arguments: Sequence[str]) -> str:
    """As it was typed, but for keys."""
    words = ["wemm", *arguments[1:]]
    for i, word in enumerate(words):
        if word.startswith("--api-key="):
            words[i] = "--api-key=KEY"
        elif i and words[i - 1] == "--api-key":
            words[i] = "KEY"
    return shlex.join(words)


def print_table(table: Table) -> None:
    """Text columns to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    needed = 0
    for index, column in enumerate(table.columns):
        is_text = all(isinstance(row[index], str) for row in table.rows)
        # Headers may be broken into words, cells not at all: numbers must stay readable in a pipe.
        cells = [*column.split(), *(_shown(row[index]) for row in table.rows)]
        width = max(len(cell) for cell in cells)
        header = textwrap.fill(column, width)
        drawn.add_column(header, justify="left" if is_text else "right")
        needed += width + _GAP
    for row in table.rows:
        drawn.add_row(*(_shown(value) for value in row))
    print(table.title)
    Console(width=max(needed, Console().width)).print(drawn)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    for least, digits in ((1e4, 0), (100, 1), (1, 2)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def write_csv(path: Path, table: Table) -> None:
    """RFC 4180, UTF-8, one header row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        writer.writerows(table.rows)


def _writing(flag: str, path: Path, write: Any) -> None:
    try:
        write(path)
    except OSError as error:
        raise StorageError(f"{flag} {path}: {error.strerror or error}") from None
