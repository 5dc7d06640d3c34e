"""Where the time of single requests goes: one after another, stage by stage."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wemm.benchmark.report import bars, print_table
from wemm.benchmark.workload import Workload
from wemm.config import EngineConfig
from wemm.engine.llm import LLM
from wemm.progress import terminal_bar
from wemm.request import SamplingParams

_STAGES = ("processing", "queue", "vision", "prefill", "decode", "first_token", "total")


def run(engine: EngineConfig, workload: Workload, output_len: int, plot: Path | None) -> None:
    """Measure and print one table, then one JSON line. Caches are off: every request pays for itself."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, repetition_guard=False)
    options = {**vars(engine), "enable_prefix_caching": False, "image_cache_memory": 0}
    seconds: dict[str, list[float]] = {stage: [] for stage in _STAGES}
    with LLM(progress=terminal_bar, **options) as llm:
        conversations = workload.conversations()
        llm.chat(conversations[0], params)
        with terminal_bar("measuring", len(conversations), "answers") as advance:
            for conversation in conversations:
                [output] = llm.chat(conversation, params)
                for stage, value in asdict(output.metrics).items():
                    seconds[stage].append(value)
                advance(1)
    stages = {stage: _percentiles(values) for stage, values in seconds.items()}
    per_token = [value / max(1, output_len - 1) for value in seconds["decode"]]
    stages["decode per token"] = _percentiles(per_token)
    title = f"{workload.num_requests} requests one after another, {engine.model}, {output_len} tokens each"
    rows = [(stage, *(1e3 * value for value in values.values())) for stage, values in stages.items()]
    print_table(title, ("stage", "median ms", "p95 ms", "worst ms"), rows)
    if plot is not None:
        shown = {stage: 1e3 * stages[stage]["median"] for stage in _STAGES[:5]}
        bars(plot, "median ms", shown)
    line: dict[str, Any] = {"workload": asdict(workload), "output_len": output_len, "seconds": stages}
    print(json.dumps(line))


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        "worst": ordered[-1],
    }
