"""Every op × implementation × case, as a share of the ceiling that binds it, measured in the same run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

import wemm.ops
from wemm.benchmark.ceilings import Ceilings, Timing, describe, time_calls
from wemm.benchmark.charts import roofline
from wemm.benchmark.result import Result, Table, environment
from wemm.checkpoint.weight_memory import empty_quantized, empty_weight
from wemm.config import DTYPES, EngineConfig, ModelConfig, PloraConfig
from wemm.cost import image_cost
from wemm.engine.build import find_source
from wemm.errors import ParameterError
from wemm.kernels import load_kernels
from wemm.ops.registry import DEFINITION, OPS, Inputs, LazyCases, ModelShapes, Op, tensor_bytes
from wemm.platforms import Platform, resolve_platform
from wemm.progress import terminal_bar
from wemm.quantization import SCHEMES

DEFAULT_SHAPES = "wemm-chat-2k-cn"
PARITY_CASES = "cases"
_IMAGE_SIZE = (1960, 1470)
_QUESTION_LEN = 77
_BLOCK_SIZE = 2**20  # numbers drawn once and repeated
_WORKING_FACTOR = 4  # copies in float32, results, expanded keys
_CACHE_BYTES = 2**29
_LARGE_ARGUMENTS = 2**24
_MAX_COPIES = 8


@dataclass(frozen=True)
class OpsBenchmark:
    """What to measure. Raises ParameterError."""

    device: str = "auto"
    dtype: str = "bfloat16"
    only: str | None = None
    shapes: str = DEFAULT_SHAPES
    seconds: float = 1.0
    """Per case and implementation."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ParameterError(f"dtype must be {', '.join(DTYPES)}. Given: {self.dtype!r}")
        if not 0 < self.seconds < math.inf:
            raise ParameterError(f"seconds must be above 0. Given: {self.seconds}")
        load_ops()
        if self.only is not None and self.only not in OPS:
            raise ParameterError(f"no op {self.only!r}; there are {', '.join(OPS)}")


@dataclass(frozen=True)
class _Job:
    op: Op[Any, Any]
    implementation: str
    case: str


@dataclass(frozen=True)
class Measurement:
    """One case of one implementation, before it is compared with the ceilings."""

    op: str
    case: str
    implementation: str
    timing: Timing
    flops: int
    moved_bytes: int
    arithmetic: torch.dtype | None = None
    """As the op declares it."""

    def figures(self, ceilings: Ceilings) -> dict[str, Any]:
        """Against the ceiling that the roofline of this run says binds."""
        seconds, intensity = self.timing.median, self.flops / self.moved_bytes
        gemm = ceilings.gemm_of(self.arithmetic)
        is_memory_bound = intensity * ceilings.read < gemm
        share = self.moved_bytes / ceilings.read if is_memory_bound else self.flops / gemm
        return {
            "op": self.op,
            "case": self.case,
            "implementation": self.implementation,
            "microseconds": seconds * 1e6,
            "gb_per_s": self.moved_bytes / seconds / 1e9,
            "gflop_per_s": self.flops / seconds / 1e9,
            "intensity": intensity,
            "bound": "memory" if is_memory_bound else "compute",
            "share_of_ceiling": share / seconds,
            "rounds": len(self.timing.rounds),
        }


def load_ops() -> None:
    """Import every op module, so that the registry is complete."""
    for module in iter_modules(wemm.ops.__path__):
        import_module(f"wemm.ops.{module.name}")


def run(settings: OpsBenchmark) -> Result:
    """Measure. Raises ParameterError, DeviceError, and what a model of `shapes` raises."""
    platform = resolve_platform(settings.device)
    platform.select()
    shapes = None if settings.shapes == PARITY_CASES else model_shapes(settings.shapes)
    load_kernels(platform.device.type)
    ceilings = Ceilings(platform, getattr(torch, settings.dtype))
    measurements, skipped = _measure_all(settings, shapes, ceilings)
    rows = [measurement.figures(ceilings) for measurement in measurements]
    figures = {"ceilings": ceilings.figures(), "dtype": settings.dtype, "ops": rows, "skipped": skipped}
    title = f"{settings.dtype}, shapes of {settings.shapes}, {environment(platform)['device']}"
    return Result(
        benchmark="ops",
        environment=environment(platform),
        settings=asdict(settings),
        figures=figures,
        tables=[Table(f"Ops in {title}", _COLUMNS, [_row(row) for row in rows])],
        chart=lambda path: _chart(path, title, ceilings, rows),
        notes=[
            describe(ceilings.figures()),
            *([_ABOVE] if any(row["share_of_ceiling"] > 1 for row in rows) else []),
            *(f"skipped: {entry['op']}, {entry['case']}: {entry['reason']}" for entry in skipped),
        ],
    )


def model_shapes(model: str) -> ModelShapes:
    """Of a preset, bundled name, checkpoint directory or hub id. Raises ModelNotFoundError, CheckpointError."""
    try:
        source = find_source(EngineConfig(model, load_format="dummy"))
    except ParameterError as error:
        raise ParameterError(f"--shapes {model}: {error}") from None
    return shapes_of(source.config, source.plora)


def shapes_of(config: ModelConfig, plora: PloraConfig | None) -> ModelShapes:
    """One image of 1960x1470 and a question of 77 tokens: with the real model 947 + 77 tokens."""
    plan = image_cost(config, plora, *_IMAGE_SIZE, "bfloat16").plan
    return ModelShapes(config, plora, plan.num_patches, plan.num_tokens, plan.num_tokens + _QUESTION_LEN)


def _measure_all(
    settings: OpsBenchmark, shapes: ModelShapes | None, ceilings: Ceilings
) -> tuple[list[Measurement], list[dict[str, str]]]:
    platform = ceilings.platform
    jobs = list(_jobs(settings, shapes, platform))
    measurements: list[Measurement] = []
    skipped: list[dict[str, str]] = []
    with terminal_bar("measuring", len(jobs), "cases") as advance, torch.inference_mode():
        for _, of_op in itertools.groupby(jobs, key=lambda job: job.op.name):
            ceilings.measure()
            for job in of_op:
                try:
                    measurements += _measure(job, settings, shapes, platform)
                except _DoesNotFitError as error:
                    skipped.append({"op": job.op.name, "case": job.case, "reason": str(error)})
                advance(1)
        ceilings.measure()
    return measurements, skipped


def _jobs(settings: OpsBenchmark, shapes: ModelShapes | None, platform: Platform) -> Iterator[_Job]:
    for name, op in OPS.items():
        if settings.only not in (None, name):
            continue
        implementations = [DEFINITION, *(i.name for i in op.implementations if i.device == platform.device.type)]
        for case in _cases(op, shapes, _Sizes(getattr(torch, settings.dtype))):
            yield from (_Job(op, implementation, case) for implementation in implementations)


def _cases(op: Op[Any, Any], shapes: ModelShapes | None, inputs: Inputs) -> LazyCases:
    if shapes is not None:
        return op.model_cases(inputs, shapes)
    return {case: lambda arguments=arguments: arguments for case, arguments in op.cases(inputs).items()}  # type: ignore[misc]


class _DoesNotFitError(Exception):
    """The case needs more memory than there is."""


def _measure(
    job: _Job, settings: OpsBenchmark, shapes: ModelShapes | None, platform: Platform
) -> list[Measurement]:
    """Empty if the kernel does not take this case."""
    op, dtype = job.op, getattr(torch, settings.dtype)
    num_copies = _num_copies(tensor_bytes(_cases(op, shapes, _Sizes(dtype))[job.case]()), platform)
    inputs = Inputs(dtype, platform.device) if shapes is None else _RepeatedNumbers(dtype, platform.device)
    make = _cases(op, shapes, inputs)[job.case]
    try:
        copies = [make() for _ in range(num_copies)]
        arguments = itertools.cycle(copies)
        with op.using(job.implementation):
            try:
                result = op(*copies[0])
            except ParameterError:
                return []
            flops, moved_bytes = op.work(copies[0], result)
            del result
            if not moved_bytes:  # nothing to do, as where no token is an image's
                return []
            timing = time_calls(lambda: op(*next(arguments)), platform, settings.seconds)
    except torch.OutOfMemoryError as error:
        raise _DoesNotFitError(str(error).splitlines()[0]) from None
    return [Measurement(op.name, job.case, job.implementation, timing, flops, moved_bytes, op.arithmetic)]


def _num_copies(num_bytes: int, platform: Platform) -> int:
    """Weights are read from memory in a model: copies in turn, so that no cache keeps them."""
    available = platform.available_memory()
    if available is not None and _WORKING_FACTOR * num_bytes > available:
        need, have = (size / 2**30 for size in (_WORKING_FACTOR * num_bytes, available))
        raise _DoesNotFitError(f"needs up to {need:.1f} GiB, {have:.1f} GiB are available")
    if num_bytes < _LARGE_ARGUMENTS:
        return 1
    wanted = min(_MAX_COPIES, _CACHE_BYTES // num_bytes + 1)
    return wanted if available is None else max(1, min(wanted, available // 2 // num_bytes))


class _Sizes(Inputs):
    """Arguments without numbers: what a case would need, for nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, torch.device("cpu"))

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def uint8(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def quantized(self, scheme: str, out_size: int, in_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return empty_quantized(SCHEMES[scheme], out_size, in_size, torch.device("meta"))


class _RepeatedNumbers(Inputs):
    """The same million numbers again and again: gigabytes in no time. Speed does not depend on them."""

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        length = math.prod(shape)
        block = super().normal(min(length, _BLOCK_SIZE), scale=scale)
        # As the engine's weights lie.
        result = empty_weight(shape, self.dtype, self.device)
        for piece in result.view(-1).split(_BLOCK_SIZE):
            piece.copy_(block[: len(piece)])
        return result

    def quantized(self, scheme: str, out_size: int, in_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight, scale = empty_quantized(SCHEMES[scheme], out_size, in_size, self.device)
        block = torch.randint(0, 256, (_BLOCK_SIZE,), dtype=torch.uint8, generator=self._generator)
        for piece in weight.view(torch.uint8).view(-1).split(_BLOCK_SIZE):
            piece.copy_(block[: len(piece)])
        return weight, scale.fill_(1e-3)


_ABOVE = "more than 100 %: what fits into a cache comes from there; or the machine was busy beside every probe"
_COLUMNS = (
    "op", "case", "implementation", "time (µs)", "GB/s", "GFLOP/s", "FLOP/byte", "bound", "share of ceiling (%)",
)  # fmt: skip


def _row(row: Mapping[str, Any]) -> tuple[Any, ...]:
    shown = {**row, "share_of_ceiling": 100 * row["share_of_ceiling"]}
    return tuple(value for name, value in shown.items() if name != "rounds")


def _chart(path: Path, title: str, ceilings: Ceilings, rows: list[dict[str, Any]]) -> None:
    points = [
        (
            row["op"] if row["implementation"] == DEFINITION else f"{row['op']} ({row['implementation']})",
            row["case"],
            row["intensity"],
            row["gflop_per_s"],
        )
        for row in rows
        if row["gflop_per_s"]  # copies compute nothing: they have no place here
    ]
    products = {"matrix product": ceilings.gemm / 1e9}
    if ceilings.int8_gemm_probes:
        products["matrix product of int8"] = max(ceilings.int8_gemm_probes) / 1e9
    roofline(path, f"Roofline: {title}", ceilings.read / 1e9, products, points)
