"""Every op × implementation × case of the registry, timed next to a copy of the same moment."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

import wemm.ops
from wemm.config import DTYPES
from wemm.errors import ParameterError
from wemm.kernels import load_kernels
from wemm.ops.registry import DEFINITION, OPS, Inputs
from wemm.platforms import Platform, resolve_platform

_ROUNDS = 15
_PROBE_BYTES = 2**28


def run(device: str, dtype: str, only: str | None) -> None:
    """Measure and print one table, then one JSON line. Raises ParameterError, DeviceError."""
    if dtype not in DTYPES:
        raise ParameterError(f"dtype must be {', '.join(DTYPES)}. Given: {dtype!r}")
    platform = resolve_platform(device)
    load_ops()
    load_kernels(platform.device.type)
    if only is not None and only not in OPS:
        raise ParameterError(f"no op {only!r}; there are {', '.join(OPS)}")
    results = [
        result
        for name, op in OPS.items()
        if only in (None, name)
        for result in _measure_op(name, op, platform, getattr(torch, dtype))
    ]
    _print(results, platform, dtype)


def load_ops() -> None:
    """Import every op module, so that the registry is complete."""
    for module in iter_modules(wemm.ops.__path__):
        import_module(f"wemm.ops.{module.name}")


def _measure_op(name: str, op: Any, platform: Platform, dtype: torch.dtype) -> list[dict[str, Any]]:
    results = []
    implementations = [DEFINITION, *(i.name for i in op.implementations if i.device == platform.device.type)]
    for case, arguments in op.cases(Inputs(dtype, platform.device)).items():
        for implementation in implementations:
            with torch.inference_mode(), op.using(implementation):
                try:
                    result = op(*arguments)
                except ParameterError:  # the kernel does not take this case
                    continue
                seconds = _median_seconds(lambda op=op, arguments=arguments: op(*arguments), platform)  # type: ignore[misc]
            num_bytes = _num_bytes(arguments) + _num_bytes(result)
            results.append({
                "op": name, "case": case, "implementation": implementation,
                "microseconds": seconds * 1e6, "gb_per_s": num_bytes / seconds / 1e9,
            })  # fmt: skip
    return results


def _median_seconds(function: Callable[[], Any], platform: Platform) -> float:
    function()
    times = []
    for _ in range(_ROUNDS):
        platform.synchronize()
        started = time.perf_counter()
        function()
        platform.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _num_bytes(values: Any) -> int:
    tensors = values if isinstance(values, tuple) else (values,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def copy_bandwidth(platform: Platform) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(_PROBE_BYTES, dtype=torch.uint8, device=platform.device)
    target = torch.empty_like(source)
    return 2 * _PROBE_BYTES / _median_seconds(lambda: target.copy_(source), platform)


def _print(results: list[dict[str, Any]], platform: Platform, dtype: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    ceiling = copy_bandwidth(platform) / 1e9
    table = Table(title=f"{platform.device}, {dtype}, copy {ceiling:.1f} GB/s", box=box.SIMPLE_HEAD)
    for column in ("op", "case", "implementation", "µs", "GB/s", "of copy"):
        is_text = column in ("op", "case", "implementation")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True, overflow="fold")
    for r in results:
        share = f"{r['gb_per_s'] / ceiling:.0%}"
        numbers = (f"{r['microseconds']:.1f}", f"{r['gb_per_s']:.2f}", share)
        table.add_row(r["op"], r["case"], r["implementation"], *numbers)
    Console(width=max(100, Console().width)).print(table)
    print(json.dumps({"device": str(platform.device), "dtype": dtype, "copy_gb_per_s": ceiling, "ops": results}))
