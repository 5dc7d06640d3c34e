"""Fast implementations of `wemm.ops`, one package per device type, same file names as the ops.

`WEMM_KERNELS=none` in the environment keeps them out: every op then runs its definition.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wemm.errors import ParameterError


@dataclass(frozen=True)
class Recorder:
    """How a device writes computations down to repeat them."""

    record: Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]] | None]
    """Calls a function: its result, and what computes it again at the same addresses; None if nothing can."""
    holds_torch: bool
    """What torch computes is repeated, too; else only kernels are, and nothing that torch has a part in."""


def load_kernels(device_type: str) -> None:
    """Attach the kernels of a device type, if it has any. Loading twice changes nothing."""
    choice = os.environ.get("WEMM_KERNELS", "auto")
    if choice not in ("auto", "none"):
        raise ParameterError(f"WEMM_KERNELS must be auto or none. Given: {choice!r}")
    package = f"{__name__}.{device_type}"
    if choice == "auto" and importlib.util.find_spec(package) is not None:
        importlib.import_module(package)


def release_memory(device_type: str) -> None:
    """Give back what kernels hold for their next results."""
    package = sys.modules.get(f"{__name__}.{device_type}")
    if package is not None:
        package.release_memory()


def recorder(device_type: str) -> Recorder | None:
    """Of a device, if it has one and its kernels are loaded."""
    package = sys.modules.get(f"{__name__}.{device_type}")
    found: Recorder | None = getattr(package, "RECORDER", None)
    return found
