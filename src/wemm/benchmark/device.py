"""What a device is expected to reach, and what it did: every op, and the goals of an accelerator in one table.

Each is a share of a ceiling measured in the same run, or a ratio to the plain definitions in eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wemm.benchmark import latency, ops, throughput
from wemm.benchmark.charts import bars
from wemm.benchmark.result import Result, Table, environment
from wemm.benchmark.workload import Workload
from wemm.config import EngineConfig
from wemm.cost import decode_bytes, image_cost, kv_bytes_per_token, prefill_flops
from wemm.engine.build import find_source
from wemm.errors import ParameterError
from wemm.ops.registry import definitions_only
from wemm.platforms import resolve_platform

_WORDS = 12
_REQUESTS = 2


@dataclass(frozen=True)
class DeviceBenchmark:
    """What to run: the field values are those the goals are meant for."""

    device: str = "auto"
    dtype: str = "float16"
    model: str = "wemm-chat-2k-cn"
    image_size: tuple[int, int] = (1960, 1470)
    output_len: int = 256
    concurrent: int = 64
    """Requests at once."""
    concurrent_output_len: int = 64
    max_model_len: int = 2048
    ops_seconds: float = 0.1
    """Per op, case and implementation, at the model's sizes."""
    is_dry_run: bool = False
    """Everything runs, nothing is judged."""

    @classmethod
    def dry_run(cls, device: str = "cpu") -> DeviceBenchmark:
        """The same steps over the bundled `tiny`, in seconds, on any device."""
        return cls(device, "float32", "tiny", (20, 30), 6, 4, 3, 256, 0.001, is_dry_run=True)

    def engine(self, **options: Any) -> EngineConfig:
        """Of one step."""
        return EngineConfig(
            **{
                "model": self.model,
                "device": self.device,
                "dtype": self.dtype,
                "load_format": "dummy",
                "max_model_len": self.max_model_len,
                "max_num_seqs": self.concurrent,
                **options,
            }
        )

    def workload(self, num_requests: int) -> Workload:
        """Each about a picture of its own."""
        return Workload(num_requests, self.image_size, num_requests, _WORDS, seed=0)


@dataclass(frozen=True)
class Goal:
    """One line of the table. All values are ratios; more is better."""

    name: str
    wanted: float
    reached: float

    @property
    def is_met(self) -> bool:
        """Whether it is."""
        return self.reached >= self.wanted


def run(benchmark: DeviceBenchmark) -> Result:
    """Measure. Raises ParameterError, DeviceError, and what `LLM` raises."""
    platform = resolve_platform(benchmark.device)
    if platform.device.type == "cpu" and not benchmark.is_dry_run:
        raise ParameterError("the goals are an accelerator's and here is none; --dry-run runs the steps on a CPU")
    every_op = ops.run(
        ops.OpsBenchmark(benchmark.device, benchmark.dtype, None, benchmark.model, benchmark.ops_seconds)
    )
    one = benchmark.workload(_REQUESTS)
    steps = {
        "as it comes": latency.run(benchmark.engine(), one, benchmark.output_len, 1),
        "int4": latency.run(benchmark.engine(quantization="int4"), one, benchmark.output_len, 1),
    }
    with definitions_only():
        eager = benchmark.engine(enforce_eager=True)
        steps["definitions"] = latency.run(eager, one, benchmark.output_len, 1)
    many = benchmark.workload(benchmark.concurrent)
    together = throughput.run(benchmark.engine(), many, benchmark.concurrent_output_len, compare=False)
    goals = _goals(benchmark, steps, together)
    notes = [f"{sum(goal.is_met for goal in goals)} of {len(goals)} goals met"]
    if benchmark.is_dry_run:
        notes = ["a dry run: the steps work, the figures mean nothing"]
    stages = Table(
        "Seconds, median",
        ("run", *next(iter(steps.values())).figures["seconds"]),
        [(name, *(s["median"] for s in step.figures["seconds"].values())) for name, step in steps.items()],
    )
    return Result(
        benchmark="device",
        environment=environment(platform),
        settings=asdict(benchmark),
        figures={
            "goals": [{**asdict(goal), "is_met": None if benchmark.is_dry_run else goal.is_met} for goal in goals],
            "ops": every_op.figures,
            "steps": {name: dict(step.figures) for name, step in {**steps, "together": together}.items()},
        },
        tables=[
            *every_op.tables,
            Table(_title(benchmark, platform.device), _COLUMNS, _rows(goals, benchmark.is_dry_run)),
            stages,
        ],
        chart=lambda path: _chart(path, benchmark, goals),
        notes=[*notes, *steps["as it comes"].notes[1:]],
    )


_COLUMNS = ("goal", "wanted", "reached", "met")


def _title(benchmark: DeviceBenchmark, device: torch.device) -> str:
    width, height = benchmark.image_size
    return f"Goals of {device.type}: {benchmark.model}, {benchmark.dtype}, pictures of {width}x{height}"


def _rows(goals: Sequence[Goal], is_dry_run: bool) -> list[tuple[Any, ...]]:
    def met(goal: Goal) -> str:
        return "dry run" if is_dry_run else "yes" if goal.is_met else "no"

    return [(goal.name, goal.wanted, goal.reached, met(goal)) for goal in goals]


def _goals(benchmark: DeviceBenchmark, steps: Mapping[str, Result], together: Result) -> list[Goal]:
    shares = {name: step.figures["share_of_ceiling"] for name, step in steps.items()}
    totals = {name: step.figures["seconds"]["total"]["median"] for name, step in steps.items()}
    plain, int4 = shares["as it comes"], shares["int4"]
    return [
        Goal(f"decode in {benchmark.dtype}, of read bandwidth", 0.85, plain["inter_token"]),
        Goal("decode in int4, of read bandwidth", 0.75, int4["inter_token"]),
        Goal("prefill, of the matrix product", 0.60, plain["prefill"]),
        Goal("vision tower, of the matrix product", 0.60, plain["vision"]),
        Goal("whole request, times the definitions", 3.0, totals["definitions"] / totals["as it comes"]),
        Goal(
            f"{benchmark.concurrent} at once, of the roofline",
            0.80,
            _least_seconds(benchmark, steps["as it comes"]) / together.figures["results"]["together"]["seconds"],
        ),
    ]


def _least_seconds(benchmark: DeviceBenchmark, measured: Result) -> float:
    """That all requests at once take at the ceilings: arithmetic of pictures and prompts, then reading."""
    source = find_source(benchmark.engine())
    ceilings, figures = measured.figures["ceilings"], measured.figures
    cost = image_cost(source.config, source.plora, *benchmark.image_size, benchmark.dtype)
    flops = cost.tower_flops + cost.downsampler_flops
    flops += prefill_flops(source.config, source.plora, figures["prompt_tokens"], figures["image_tokens"])
    context = figures["prompt_tokens"] + benchmark.concurrent_output_len // 2
    per_step = decode_bytes(source.config, benchmark.dtype)
    per_step += benchmark.concurrent * context * kv_bytes_per_token(source.config, benchmark.dtype)
    computing = benchmark.concurrent * flops / (1e9 * ceilings["gemm_gflop_per_s"]["max"])
    reading = (benchmark.concurrent_output_len - 1) * per_step / (1e9 * ceilings["read_gb_per_s"]["max"])
    return computing + reading


def _chart(path: Path, benchmark: DeviceBenchmark, goals: Sequence[Goal]) -> None:
    reached = {goal.name: goal.reached / goal.wanted for goal in goals}
    bars(path, f"{benchmark.model} on {benchmark.device}", "reached over wanted", reached)
