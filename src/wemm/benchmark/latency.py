"""Where the time of a request goes, stage by stage, and how close each stage is to the ceiling that binds it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wemm.benchmark.ceilings import Ceilings, describe
from wemm.benchmark.charts import waterfall
from wemm.benchmark.result import Result, Table, engine_settings, environment, percentiles
from wemm.benchmark.workload import Workload
from wemm.config import EngineConfig, QuantizationConfig
from wemm.cost import decode_bytes, image_cost, kv_bytes_per_token, prefill_flops
from wemm.engine.build import Source, find_source, is_a_step_ahead, resolve_dtype
from wemm.engine.llm import LLM
from wemm.errors import ParameterError
from wemm.platforms import resolve_platform
from wemm.processing.chat_template import Message
from wemm.progress import ProgressBar, silent, terminal_bar
from wemm.request import RequestMetrics, RequestOutput, SamplingParams

_WATERFALL = ("processing", "queue", "vision", "prefill", "decode")
_STAGES = ("processing", "queue", "vision", "prefill", "first_token", "inter_token", "decode", "total")


@dataclass(frozen=True)
class LatencyFigures:
    """What was measured, request by request."""

    batch: int
    output_len: int
    prompt_tokens: int
    """Of a request, the median; image tokens included."""
    image_tokens: int
    requests: tuple[RequestMetrics, ...]
    batch_seconds: tuple[float, ...]
    """From the first arrival of a batch to its last token."""
    seconds_awaiting_device: float
    """Of them all: the CPU had launched the next step and waited for the one before."""

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens per second of the median batch."""
        return self.batch * self.output_len / statistics.median(self.batch_seconds)

    def seconds(self) -> dict[str, dict[str, float]]:
        """Percentiles of every stage; `inter_token` is decode per token, absent from answers of one token."""
        stages = [asdict(metrics) for metrics in self.requests]
        if self.output_len > 1:
            stages = [{**stage, "inter_token": stage["decode"] / (self.output_len - 1)} for stage in stages]
        return {name: percentiles([s[name] for s in stages]) for name in _STAGES if name in stages[0]}

    def waterfall(self) -> list[dict[str, Any]]:
        """Start and length of each stage since arrival, of the request whose total is the median."""
        by_total = sorted(self.requests, key=lambda metrics: metrics.total)
        metrics = asdict(by_total[(len(by_total) - 1) // 2])
        stages, start = [], 0.0
        for stage in _WATERFALL:
            stages.append({"stage": stage, "start": start, "seconds": metrics[stage]})
            start += metrics[stage]
        return stages

    def figures(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "batch": self.batch,
            "output_len": self.output_len,
            "prompt_tokens": self.prompt_tokens,
            "image_tokens": self.image_tokens,
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds(),
            "seconds_awaiting_device": self.seconds_awaiting_device,
            "waterfall": self.waterfall(),
        }


def measure(
    llm: LLM,
    conversations: Sequence[Sequence[Message]],
    output_len: int,
    batch: int,
    progress: ProgressBar = silent,
) -> LatencyFigures:
    """Ask `batch` conversations at once, then the next; a first batch warms up and is not counted.

    Every answer has `output_len` tokens. What the engine caches, it caches: turn caches off for first-time
    latency. Raises ParameterError, and what `LLM.chat` raises.
    """
    if not conversations or batch < 1 or len(conversations) % batch:
        raise ParameterError(f"{len(conversations)} requests do not make batches of {batch}")
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, repetition_guard=False)
    outputs: list[RequestOutput] = []
    seconds: list[float] = []
    llm.chat(conversations[:batch], params)
    awaited = llm.stats.seconds_awaiting_device
    with progress("measuring", len(conversations), "answers") as advance:
        for first in range(0, len(conversations), batch):
            started = time.perf_counter()
            outputs += llm.chat(conversations[first : first + batch], params)
            seconds.append(time.perf_counter() - started)
            advance(batch)
    return LatencyFigures(
        batch=batch,
        output_len=output_len,
        prompt_tokens=statistics.median_low(len(output.prompt_token_ids) for output in outputs),
        image_tokens=statistics.median_low(output.num_image_tokens for output in outputs),
        requests=tuple(output.metrics for output in outputs),
        batch_seconds=tuple(seconds),
        seconds_awaiting_device=llm.stats.seconds_awaiting_device - awaited,
    )


def run(engine: EngineConfig, workload: Workload, output_len: int, batch: int) -> Result:
    """Measure with caches and guesses off: every token of every request pays for itself."""
    if batch > engine.max_num_seqs:
        raise ParameterError(
            f"--batch {batch} is more than --max-num-seqs {engine.max_num_seqs}; raise the latter"
        )
    pixels = workload.pixels()
    source, platform = find_source(engine), resolve_platform(engine.device)
    dtype = resolve_dtype(engine, source.dtype, platform)
    ceilings = Ceilings(platform, getattr(torch, dtype))
    ceilings.measure()
    plain = {"enable_prefix_caching": False, "image_cache_memory": 0, "num_speculative_tokens": 0}
    with LLM(progress=terminal_bar, **{**vars(engine), **plain}) as llm:
        measured = measure(llm, workload.conversations(), output_len, batch, terminal_bar)
    ceilings.measure()
    alone = engine.tensor_parallel_size == 1
    shares = _shares(measured, source, dtype, engine.kv_dtype(dtype), pixels, ceilings) if alone else {}
    title = _title(engine, measured, dtype, source.quantization, pixels)
    notes = [
        f"{measured.tokens_per_s:,.1f} tokens/s, {batch} at once; {len(measured.requests)} requests measured",
        describe(ceilings.figures()),
    ]
    if is_a_step_ahead(engine, platform):
        share = measured.seconds_awaiting_device / sum(measured.batch_seconds)
        notes.append(f"the CPU was a step ahead and waited for the device {share:.0%} of the time")
    return Result(
        benchmark="latency",
        environment=environment(platform),
        settings={**engine_settings(engine, dtype), **workload.settings(), "caches": False},
        figures={**measured.figures(), "ceilings": ceilings.figures(), "share_of_ceiling": shares},
        tables=[_table(title, measured, shares)],
        chart=lambda path: _chart(path, title, measured),
        notes=notes,
    )


def _shares(
    measured: LatencyFigures,
    source: Source,
    dtype: str,
    kv_dtype: str,
    pixels: tuple[int, int] | None,
    ceilings: Ceilings,
) -> dict[str, float]:
    """Of decode to the bandwidth, of vision and prefill to the matrix product; 1 is the ceiling.

    A step of decode reads the weights of the language model once and the keys and values of every
    sequence. In a batch, vision and prefill of one request wait for the others': only decode is compared.
    """
    config, plora, seconds = source.config, source.plora, measured.seconds()
    shares = {}
    if measured.output_len > 1:
        context = measured.prompt_tokens + measured.output_len // 2
        keys_and_values = measured.batch * context * kv_bytes_per_token(config, kv_dtype)
        moved = decode_bytes(config, dtype, source.quantization) + keys_and_values
        shares["inter_token"] = moved / seconds["inter_token"]["median"] / ceilings.read
    if measured.batch == 1:
        flops = {"prefill": prefill_flops(config, plora, measured.prompt_tokens, measured.image_tokens)}
        if pixels is not None:
            cost = image_cost(config, plora, *pixels, dtype)
            flops["vision"] = cost.tower_flops + cost.downsampler_flops
        shares |= {stage: work / seconds[stage]["median"] / ceilings.gemm for stage, work in flops.items()}
    return shares


def _title(
    engine: EngineConfig,
    measured: LatencyFigures,
    dtype: str,
    quantization: QuantizationConfig,
    pixels: tuple[int, int] | None,
) -> str:
    image = "text alone" if pixels is None else f"an image of {pixels[0]}x{pixels[1]}"
    tokens = f"{measured.prompt_tokens} + {measured.output_len} tokens"
    kept = f"{dtype}, {quantization}" if quantization else dtype
    return f"{Path(engine.model).name}, {kept}, {image}, {tokens}, {measured.batch} at once"


def _table(title: str, measured: LatencyFigures, shares: Mapping[str, float]) -> Table:
    columns = ("stage", "median (ms)", "p95 (ms)", "worst (ms)", "share of ceiling (%)", "ceiling")
    rows = [
        (
            stage,
            *(1e3 * value for value in values.values()),
            100 * shares[stage] if stage in shares else None,
            ("read bandwidth" if stage == "inter_token" else "matrix product") if stage in shares else "",
        )
        for stage, values in measured.seconds().items()
    ]
    return Table(f"Latency of {title}", columns, rows)


def _chart(path: Path, title: str, measured: LatencyFigures) -> None:
    stages = [(s["stage"], 1e3 * s["start"], 1e3 * s["seconds"]) for s in measured.waterfall()]
    waterfall(path, title, stages)
