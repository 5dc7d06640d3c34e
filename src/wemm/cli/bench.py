"""`wemm bench`: speed as a number with a ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wemm.cli.options import engine_options
from wemm.config import EngineConfig

_Requests = Annotated[int, typer.Option(min=1, help="Requests.")]
_ImageSize = Annotated[str, typer.Option(metavar="WxH", help="Size of the images in pixels; none: text alone.")]
_Words = Annotated[int, typer.Option(min=0, help="Words of each question.")]
_OutputLen = Annotated[int, typer.Option(min=1, help="Tokens of each answer.")]
_WorkloadSeed = Annotated[int, typer.Option(min=0, help="Seed of images and questions.")]
_Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the result (PNG, SVG, PDF).")]

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


@app.command()
@engine_options
def throughput(
    requests: _Requests = 16,
    image_size: _ImageSize = "640x480",
    images: Annotated[int | None, typer.Option(min=1, help="Different images. Default: one per request.")] = None,
    words: _Words = 12,
    output_len: _OutputLen = 64,
    compare: Annotated[bool, typer.Option(help="Ask the same one after another as well.")] = True,
    workload_seed: _WorkloadSeed = 0,
    plot: _Plot = None,
    *,
    engine: EngineConfig,
) -> None:
    """Requests and tokens per second with all requests under way at once.

    Example: wemm bench throughput --model nano --requests 16
    """
    from wemm.benchmark.throughput import run
    from wemm.benchmark.workload import Workload, parse_size

    workload = Workload(requests, parse_size(image_size), images or requests, words, workload_seed)
    run(engine, workload, output_len, compare, plot)


@app.command()
@engine_options
def latency(
    requests: _Requests = 10,
    image_size: _ImageSize = "640x480",
    words: _Words = 12,
    output_len: _OutputLen = 64,
    workload_seed: _WorkloadSeed = 0,
    plot: _Plot = None,
    *,
    engine: EngineConfig,
) -> None:
    """Seconds per stage of one request at a time, caches off.

    Example: wemm bench latency --model nano --image-size 640x480
    """
    from wemm.benchmark.latency import run
    from wemm.benchmark.workload import Workload, parse_size

    run(engine, Workload(requests, parse_size(image_size), requests, words, workload_seed), output_len, plot)
