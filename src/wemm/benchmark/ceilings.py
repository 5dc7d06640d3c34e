"""What the hardware can do at most, measured beside what is compared with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from wemm.checkpoint.weight_memory import empty_weight
from wemm.platforms import Platform

_PROBE_BYTES = 2**30  # more than any cache holds
_PROBE_SECONDS = 0.4
_GEMM_SIZES = {"cpu": (2048,)}
_LARGE_GEMM_SIZES = (4096, 8192)
_MAX_ROUNDS = 50
_MIN_ROUND_SECONDS = 1e-3  # what a clock and a synchronisation cost is then nothing
_MAX_CALLS = 100


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, by round; a round is as many calls as a clock needs."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        """Seconds."""
        return min(self.rounds)


def time_calls(function: Callable[[], Any], platform: Platform, budget: float) -> Timing:
    """Call for about `budget` seconds. The first call warms up; only if it alone takes them, it counts."""
    first = _round(function, platform, 1)
    if first >= budget:
        return Timing((first,))
    estimate = _round(function, platform, 1)
    calls = max(1, min(_MAX_CALLS, int(_MIN_ROUND_SECONDS / max(estimate, 1e-9))))
    rounds: list[float] = []
    stop = time.perf_counter() + budget - first - estimate
    while not rounds or (time.perf_counter() < stop and len(rounds) < _MAX_ROUNDS):
        rounds.append(_round(function, platform, calls))
    return Timing(tuple(rounds))


def _round(function: Callable[[], Any], platform: Platform, calls: int) -> float:
    platform.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    platform.synchronize()
    return (time.perf_counter() - started) / calls


@dataclass
class Ceilings:
    """Read and copy bandwidth (bytes/s) and matrix product (FLOP/s) of a device in one dtype, and in int8.

    `measure` adds one probe of each. The ceiling is the best of all probes: hardware exceeds what it can do
    at no time, and what a busy neighbour takes away shows in the spread.
    """

    platform: Platform
    dtype: torch.dtype
    read_probes: list[float] = field(default_factory=list)
    copy_probes: list[float] = field(default_factory=list)
    gemm_probes: list[float] = field(default_factory=list)
    int8_gemm_probes: list[float] = field(default_factory=list)
    """Empty where torch has no such product."""

    @torch.inference_mode()
    def measure(self) -> None:
        """One probe of each; takes a second or two and at most 1 GiB, given back after."""
        self._measure_bandwidth()
        self.gemm_probes.append(max(self._gemm(size) for size in self._gemm_sizes()))
        products = [
            product for size in self._gemm_sizes() for product in _int8_products(size, self.platform.device)
        ]
        if products:
            self.int8_gemm_probes.append(max(flops / self._seconds(product) for flops, product in products))

    def _measure_bandwidth(self) -> None:
        available = self.platform.available_memory() or 4 * _PROBE_BYTES
        size = max(2**20, min(_PROBE_BYTES, available // 4) // 2**20 * 2**20)
        # Written, as unwritten pages are all one page; and where weights lie.
        buffer = empty_weight((size // 4,), torch.float32, self.platform.device).fill_(1)
        first, second = buffer.chunk(2)
        # Which of the two is faster depends on the machine; in 16 bit both compute more than they read.
        reads = (buffer.sum, lambda: torch.dot(first, second))
        self.read_probes.append(size / min(self._seconds(read) for read in reads))
        self.copy_probes.append(size / self._seconds(lambda: first.copy_(second)))

    @property
    def read(self) -> float:
        """Bytes per second."""
        return max(self.read_probes)

    @property
    def gemm(self) -> float:
        """FLOP per second."""
        return max(self.gemm_probes)

    def gemm_of(self, arithmetic: torch.dtype | None) -> float:
        """FLOP per second of products of such numbers; None: of the dtype."""
        int8 = self.int8_gemm_probes if arithmetic is torch.int8 else []
        return max(int8, default=self.gemm)

    def figures(self) -> dict[str, dict[str, float]]:
        """Median, min and max of the probes, in GB/s and GFLOP/s."""
        probes = {
            "read_gb_per_s": self.read_probes,
            "copy_gb_per_s": self.copy_probes,
            "gemm_gflop_per_s": self.gemm_probes,
            "int8_gemm_gflop_per_s": self.int8_gemm_probes,
        }
        return {name: _spread(values) for name, values in probes.items() if values}

    def _gemm_sizes(self) -> tuple[int, ...]:
        return _GEMM_SIZES.get(self.platform.device.type, _LARGE_GEMM_SIZES)

    def _gemm(self, size: int) -> float:
        a, b = (torch.randn(size, size, device=self.platform.device).to(self.dtype) for _ in range(2))
        return 2 * size**3 / self._seconds(lambda: F.linear(a, b))

    def _seconds(self, function: Callable[[], Any]) -> float:
        return time_calls(function, self.platform, _PROBE_SECONDS / 2).best


def _int8_products(size: int, device: torch.device) -> list[tuple[int, Callable[[], Any]]]:
    """(operations, call) of each product of int8 [size, size] that torch has here."""
    a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    calls: list[Callable[[], Any]] = [lambda: torch._int_mm(a, b.t())]
    if device.type == "cpu" and hasattr(torch.ops.onednn, "qlinear_pointwise"):
        packed = torch.ops.onednn.qlinear_prepack(b, [size, size])
        ones, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int64)
        product = torch.ops.onednn.qlinear_pointwise
        calls.append(lambda: product(a, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""))
    return [(2 * size**3, call) for call in calls if _runs(call)]


def _runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (AttributeError, RuntimeError):  # not built for this device, or not by this version of torch
        return False
    return True


def _spread(probes: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(probes) / 1e9,
        "min": min(probes) / 1e9,
        "max": max(probes) / 1e9,
    }


def describe(figures: dict[str, dict[str, float]]) -> str:
    """One line: the ceilings and their spread."""
    words = {
        "read_gb_per_s": ("read", "GB/s"),
        "copy_gb_per_s": ("copy", "GB/s"),
        "gemm_gflop_per_s": ("matrix product", "GFLOP/s"),
        "int8_gemm_gflop_per_s": ("in int8", "GOP/s"),
    }
    parts = [
        f"{words[name][0]} {spread['max']:,.1f} {words[name][1]} (median {spread['median']:,.1f}, "
        f"least {spread['min']:,.1f})"
        for name, spread in figures.items()
    ]
    return "ceilings: " + "; ".join(parts)
