"""Requests per second with everything in the batch, against the same requests one after another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wemm.benchmark.charts import bars
from wemm.benchmark.result import Result, Table, engine_settings, environment
from wemm.benchmark.workload import Workload
from wemm.config import EngineConfig
from wemm.engine.build import run_dtype
from wemm.engine.llm import LLM
from wemm.platforms import resolve_platform
from wemm.progress import terminal_bar
from wemm.request import SamplingParams

_COLUMNS = (
    "way", "time (s)", "requests/s", "prompt tokens/s", "output tokens/s", "vision tower calls", "tokens computed",
)  # fmt: skip


@dataclass(frozen=True)
class Throughput:
    """One way of asking all questions."""

    seconds: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    num_tower_calls: int
    num_computed_tokens: int


def run(engine: EngineConfig, workload: Workload, output_len: int, compare: bool) -> Result:
    """Measure; `compare` asks the same one after another as well."""
    conversations = workload.conversations()
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, repetition_guard=False)
    results = {"together": _measure(engine, conversations, params, at_once=True)}
    if compare:
        results["one by one"] = _measure(engine, conversations, params, at_once=False)
    figures: dict[str, Any] = {"results": {name: asdict(result) for name, result in results.items()}}
    notes = []
    if compare:
        figures["speed_up"] = results["one by one"].seconds / results["together"].seconds
        notes.append(f"together {figures['speed_up']:.1f} times as fast as one by one")
    platform = resolve_platform(engine.device)
    dtype = run_dtype(engine)
    title = f"{Path(engine.model).name}, {dtype}, {workload.num_requests} requests, {output_len} tokens each"
    return Result(
        benchmark="throughput",
        environment=environment(platform),
        settings={**engine_settings(engine, dtype), **workload.settings(), "output_len": output_len},
        figures=figures,
        tables=[Table(f"Throughput of {title}", _COLUMNS, [(n, *asdict(r).values()) for n, r in results.items()])],
        chart=lambda path: _chart(path, title, results),
        notes=notes,
    )


def _chart(path: Path, title: str, results: Mapping[str, Throughput]) -> None:
    bars(path, title, "requests per second", {name: result.requests_per_s for name, result in results.items()})


def _measure(engine: EngineConfig, conversations: list[Any], params: SamplingParams, at_once: bool) -> Throughput:
    """On a fresh engine: what one run has cached must not help the other."""
    with LLM(progress=terminal_bar, **vars(engine)) as llm:
        llm.chat([{"role": "user", "content": "warm up"}], SamplingParams(max_tokens=2, ignore_eos=True))
        before = llm.stats
        started = time.perf_counter()
        if at_once:
            outputs = llm.chat(conversations, params, progress=terminal_bar)
        else:
            with terminal_bar("one by one", len(conversations), "answers") as advance:
                outputs = []
                for conversation in conversations:
                    outputs += llm.chat(conversation, params)
                    advance(1)
        seconds = time.perf_counter() - started
        stats = llm.stats
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Throughput(
        seconds=seconds,
        requests_per_s=len(outputs) / seconds,
        prompt_tokens_per_s=prompt_tokens / seconds,
        output_tokens_per_s=output_tokens / seconds,
        num_tower_calls=stats.num_tower_calls - before.num_tower_calls,
        num_computed_tokens=stats.num_computed_tokens - before.num_computed_tokens,
    )
