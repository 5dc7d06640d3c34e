"""`wemm bench`: speed as a number with a ceiling."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Measure speed against the hardware's ceiling.", rich_markup_mode=None)


@app.callback()
def _benchmarks() -> None:
    """Measure speed against the hardware's ceiling."""


@app.command()
def ops(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or any other torch device.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    only: Annotated[str | None, typer.Option(help="Measure this op alone.", show_default=False)] = None,
) -> None:
    """Every op and kernel on its cases: median time, achieved GB/s against a copy measured beside it."""
    from wemm.benchmark.ops import run

    run(device, dtype, only)
