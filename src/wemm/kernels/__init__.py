"""Fast implementations of `wemm.ops`, one package per device type, same file names as the ops.

`WEMM_KERNELS=none` in the environment keeps them out: every op then runs its definition.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable

import torch

from wemm.errors import ParameterError

Record = Callable[[Callable[[], torch.Tensor]], "tuple[torch.Tensor, Callable[[], None]] | None"]
"""Calls a function, and makes what it computes repeatable at the same addresses; None if it cannot be."""


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


def recorder(device_type: str) -> Record | None:
    """How a device records, if it does and its kernels are loaded."""
    package = sys.modules.get(f"{__name__}.{device_type}")
    record: Record | None = getattr(package, "record", None)
    return record
