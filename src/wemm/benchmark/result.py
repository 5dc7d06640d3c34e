"""What every benchmark hands back, and the machine it ran on."""

from __future__ import annotations

import math
import os
import platform as host
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from wemm import __version__
from wemm.config import EngineConfig
from wemm.platforms import Platform

_CPUINFO = Path("/proc/cpuinfo")
# Which of these a CPU has decides how fast it multiplies.
_INSTRUCTION_SETS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows under columns whose names give the unit."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Result:
    """One benchmark, done."""

    benchmark: str
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    """Ready for JSON; the unit is in the name, seconds otherwise."""
    tables: Sequence[Table]
    """The first is what `--csv` writes."""
    chart: Callable[[Path], None]
    """Draws the result into a file."""
    notes: Sequence[str] = field(default=())
    """Lines to print below the tables."""

    def line(self) -> dict[str, Any]:
        """The JSON object of the result."""
        head = {"benchmark": self.benchmark, "environment": self.environment, "settings": self.settings}
        return {**head, **self.figures}


def environment(platform: Platform) -> dict[str, Any]:
    """Software, machine and date: what a figure means nothing without."""
    cpus = _read_cpuinfo()
    return {
        "wemm": __version__,
        "torch": torch.__version__,
        "python": host.python_version(),
        "os": host.platform(),
        "device": _device_name(platform, cpus),
        "cpu": _cpu_name(cpus),
        "physical_cores": _physical_cores(cpus),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": _instruction_sets(cpus),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def engine_settings(engine: EngineConfig, dtype: str) -> dict[str, Any]:
    """Model and dtype, and every other option that is not its default."""
    others = {f.name: getattr(engine, f.name) for f in fields(engine) if getattr(engine, f.name) != f.default}
    return {**others, "model": engine.model, "dtype": dtype}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile (nearest rank) and worst."""
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p95": nearest_rank(ordered, 0.95), "worst": ordered[-1]}


def nearest_rank(ordered: Sequence[float], share: float) -> float:
    """The smallest measured value that at least this share of all does not exceed."""
    # Rounded first: 0.95 of 20 is 19, not the next number after it.
    return ordered[max(0, math.ceil(round(share * len(ordered), 9)) - 1)]


def _read_cpuinfo(path: Path = _CPUINFO) -> list[dict[str, str]]:
    """One mapping per logical core; none where the system has no such file."""
    try:
        blocks = path.read_text().strip().split("\n\n")
    except OSError:
        return []
    lines = [[line.partition(":") for line in block.splitlines()] for block in blocks]
    return [{key.strip(): value.strip() for key, _, value in block} for block in lines]


def _cpu_name(cpus: list[dict[str, str]]) -> str:
    return next((cpu["model name"] for cpu in cpus if "model name" in cpu), host.processor() or host.machine())


def _physical_cores(cpus: list[dict[str, str]]) -> int | None:
    cores = {(cpu.get("physical id"), cpu["core id"]) for cpu in cpus if "core id" in cpu}
    return len(cores) or None


def _instruction_sets(cpus: list[dict[str, str]]) -> list[str]:
    flags = {flag for cpu in cpus for flag in (cpu.get("flags") or cpu.get("Features") or "").split()}
    return [name for name in _INSTRUCTION_SETS if name in flags]


def _device_name(platform: Platform, cpus: list[dict[str, str]]) -> str:
    if platform.device.type == "cpu":
        return _cpu_name(cpus)
    module = getattr(torch, platform.device.type, None)
    name = getattr(module, "get_device_name", None)
    return str(name(platform.device)) if name else str(platform.device)
