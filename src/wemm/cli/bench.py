"""`wemm bench`: speed as a number with a ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wemm.benchmark.outputs import Outputs
from wemm.benchmark.serve_config import ServeBenchmark
from wemm.cli.options import config_options, engine_options
from wemm.config import EngineConfig

_ImageSize = Annotated[str, typer.Option(metavar="WxH", help="Size of the images in pixels; none: text alone.")]
_Words = Annotated[int, typer.Option(min=0, help="Words of each question.")]
_OutputLen = Annotated[int, typer.Option(min=1, help="Tokens of each answer.")]
_WorkloadSeed = Annotated[int, typer.Option(min=0, help="Seed of images and questions.")]
_Seconds = Annotated[float, typer.Option(help="Seconds for each case of each op; one call at least.")]
_Report = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write a page to read in a browser (HTML).")
]
_Accuracy = Annotated[
    Path | None, typer.Option(metavar="SUMMARY.json", help="Of an evaluation, to stand in the report as well.")
]

app = typer.Typer(help="Measure speed against the hardware's ceiling.", rich_markup_mode=None)


@app.callback()
def _benchmarks() -> None:
    """Measure speed against the hardware's ceiling. Every command ends with one line of JSON."""


@app.command()
@config_options(Outputs, "outputs")
def ops(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu or any other torch device.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    only: Annotated[str | None, typer.Option(help="Measure this op alone.", show_default=False)] = None,
    shapes: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Whose sizes: a preset, bundled name or directory; cases: small ones."),
    ] = "wemm-chat-2k-cn",
    seconds: _Seconds = 1.0,
    *,
    outputs: Outputs,
) -> None:
    """Every op and kernel at the sizes of a model: time, and its share of what bandwidth or arithmetic allow.

    The ceilings (read and copy bandwidth, matrix product, that of int8) are measured beside the ops.

    Example: wemm bench ops --only rms_norm --shapes nano
    """
    from wemm.benchmark.ops import OpsBenchmark, run
    from wemm.benchmark.report import finish

    settings = OpsBenchmark(device, dtype, only, shapes, seconds)
    outputs.check()
    finish([run(settings)], outputs)


@app.command()
@engine_options
@config_options(Outputs, "outputs")
def throughput(
    requests: Annotated[int, typer.Option(min=1, help="Requests.")] = 16,
    image_size: _ImageSize = "640x480",
    images: Annotated[int | None, typer.Option(min=1, help="Different images. Default: one per request.")] = None,
    words: _Words = 12,
    output_len: _OutputLen = 64,
    compare: Annotated[bool, typer.Option(help="Ask the same one after another as well.")] = True,
    workload_seed: _WorkloadSeed = 0,
    *,
    outputs: Outputs,
    engine: EngineConfig,
) -> None:
    """Requests and tokens per second with all requests under way at once.

    Example: wemm bench throughput --model nano --requests 16
    """
    from wemm.benchmark.report import finish
    from wemm.benchmark.throughput import run
    from wemm.benchmark.workload import Workload, parse_size

    workload = Workload(requests, parse_size(image_size), images or requests, words, workload_seed)
    outputs.check()
    finish([run(engine, workload, output_len, compare)], outputs)


@app.command()
@engine_options
@config_options(Outputs, "outputs")
def latency(
    batch: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 1,
    requests: Annotated[int, typer.Option(min=1, help="Requests, filled up to whole batches.")] = 10,
    image_size: _ImageSize = "640x480",
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture of one's own instead of drawn ones.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A question of one's own instead of drawn words.")] = None,
    words: _Words = 12,
    output_len: _OutputLen = 64,
    workload_seed: _WorkloadSeed = 0,
    *,
    outputs: Outputs,
    engine: EngineConfig,
) -> None:
    """Where the time of a request goes, stage by stage, without help from caches and guesses.

    Decode is compared with the read bandwidth, vision and prefill with the matrix product of the same run.

    Example: wemm bench latency --model nano --image-size 640x480
    """
    from wemm.benchmark.latency import run
    from wemm.benchmark.report import finish
    from wemm.benchmark.workload import Workload, parse_size

    whole = -(-requests // batch) * batch
    workload = Workload(whole, parse_size(image_size), whole, words, workload_seed, image, prompt)
    outputs.check()
    finish([run(engine, workload, output_len, batch)], outputs)


@app.command()
@config_options(Outputs, "outputs")
@config_options(ServeBenchmark, "settings")
def serve(
    *,
    outputs: Outputs,
    settings: ServeBenchmark,
) -> None:
    """A running endpoint that speaks OpenAI's protocol, ours or another's, under requests at given rates.

    Example: wemm bench serve --base-url http://127.0.0.1:8000/v1 --request-rate 1,2,4
    """
    from wemm.benchmark.report import finish
    from wemm.benchmark.serve import run
    from wemm.progress import terminal_bar

    outputs.check()
    finish([run(settings, terminal_bar)], outputs)


@app.command()
@config_options(Outputs, "outputs")
def device(
    device: Annotated[str, typer.Option(help="auto, cuda or any other torch device.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "float16",
    dry_run: Annotated[bool, typer.Option(help="The same steps over a tiny model, also on a CPU.")] = False,
    *,
    outputs: Outputs,
) -> None:
    """What an accelerator reaches of its goals, over the full-size model with random weights, and every op.

    Decode, prefill and vision tower as shares of ceilings of the same run, a whole request against the plain
    definitions, many requests against the roofline. Some minutes.

    Example: wemm bench device --dry-run
    """
    from wemm.benchmark.device import DeviceBenchmark, run
    from wemm.benchmark.report import finish

    outputs.check()
    small = DeviceBenchmark.dry_run("cpu" if device == "auto" else device)
    finish([run(small if dry_run else DeviceBenchmark(device, dtype))], outputs)


@app.command("all")
@engine_options
def everything(
    requests: Annotated[int, typer.Option(min=1, help="Requests of each benchmark.")] = 10,
    image_size: _ImageSize = "640x480",
    output_len: _OutputLen = 64,
    seconds: _Seconds = 1.0,
    workload_seed: _WorkloadSeed = 0,
    report: _Report = None,
    accuracy: _Accuracy = None,
    *,
    engine: EngineConfig,
) -> None:
    """Latency, throughput and every op at the model's sizes, in one report.

    Example: wemm bench all --model nano --report speed.html
    """
    from wemm.benchmark import latency, ops, throughput
    from wemm.benchmark.report import finish
    from wemm.benchmark.workload import Workload, parse_size
    from wemm.engine.build import run_dtype

    outputs = Outputs(report=report, accuracy=accuracy)
    outputs.check()
    workload = Workload(requests, parse_size(image_size), requests, 12, workload_seed)
    settings = ops.OpsBenchmark(engine.device, run_dtype(engine), None, engine.model, seconds)
    results = [
        latency.run(engine, workload, output_len, 1),
        throughput.run(engine, workload, output_len, True),
        ops.run(settings),
    ]
    finish(results, outputs)
