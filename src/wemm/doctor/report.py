"""A report for people, and as JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from wemm.doctor.check import FAIL, OK, SKIPPED, WARN, Check, Report

if TYPE_CHECKING:
    from rich.table import Table

_MARKS = {OK: "[green]✓[/]", WARN: "[yellow]![/]", FAIL: "[bold red]✗[/]", SKIPPED: "[dim]–[/]"}


def as_json(report: Report) -> dict[str, Any]:
    """One object; what is not a finite number is null."""
    causes = report.causes
    data = {
        "model": report.model,
        "directory": report.directory,
        "dtype": report.dtype,
        "device": report.device,
        "ok": report.ok,
        "likely_cause": causes[0] if causes else None,
        "causes": causes,
        "checks": [
            {"name": c.name, "status": c.status, "detail": c.detail, "cause": c.cause, "figures": dict(c.figures)}
            for c in report.checks
        ],
    }
    finite: dict[str, Any] = _finite(data)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_report(report: Report) -> None:
    """A line per check, the stages, a verdict; the last line names the likely cause, if something is wrong."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(report.model)}[/]  {report.dtype} on {report.device}")
    console.print(f"{escape(report.directory)}\n")
    for check in report.checks:
        console.print(f"{_MARKS[check.status]} {check.name:<13} {escape(check.detail)}")
    stages = next((c for c in report.checks if c.name == "stages" and c.figures.get("stages")), None)
    if stages is not None:
        Console(highlight=False, width=max(100, console.width)).print(_stage_table(stages, report.dtype))
    causes, warnings = report.causes, sum(check.status == WARN for check in report.checks)
    if report.ok:
        console.print(f"[bold green]sound[/]{_count(warnings, ', with {} warning')}")
        return
    failures = [check.name for check in report.checks if check.status == FAIL]
    console.print(f"[bold red]something is wrong[/]: {', '.join(failures)}")
    for cause in causes[1:]:
        console.print(f"also: {escape(cause)}")
    if causes:
        console.print(f"[bold]likely cause:[/] {escape(causes[0])}")


def _count(number: int, text: str) -> str:
    return text.format(number) + ("s" if number > 1 else "") if number else ""


def _stage_table(check: Check, dtype: str) -> Table:
    from rich import box
    from rich.table import Table

    from wemm.doctor.stages import Stage, shown

    stages = shown([Stage(**stage) for stage in check.figures["stages"]])
    table = Table(title=f"\nStages in {dtype} against float32", title_justify="left", box=box.SIMPLE_HEAD)
    columns = ("stage", "max error", "relative", "allowed", "cosine", "max |x|", "in float32", "")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for stage in stages:
        errors = [f"{x:.2g}" for x in (stage.max_error, stage.relative_error, stage.limit)]
        cells = [*errors, f"{stage.cosine:.6f}", f"{stage.largest:.4g}", f"{stage.largest_float32:.4g}"]
        if not stage.reached:
            cells[:2], cells[3:5] = ["", "not reached"], ["", ""]
        table.add_row(stage.name, *cells, _MARKS[OK if stage.is_ok else FAIL if stage.reached else SKIPPED])
    return table
