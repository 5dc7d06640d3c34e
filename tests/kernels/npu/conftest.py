"""The kernels for NPUs on tensors of the CPU, over the stub of torch_npu."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch_npu_stub

from wemm.benchmark.ops import load_ops
from wemm.kernels import load_kernels
from wemm.ops.registry import OPS, Implementation, Op

STUB: Any = torch_npu_stub.make()


def _npu_implementations() -> dict[str, list[Implementation[Any, Any]]]:
    """Attached, noted and detached again: to the other tests there is no NPU."""
    load_ops()
    load_kernels("cpu")
    before = {name: list(op.implementations) for name, op in OPS.items()}
    present = sys.modules.get("torch_npu")
    sys.modules["torch_npu"] = STUB
    try:
        load_kernels("npu")
    finally:
        del sys.modules["torch_npu"]
        if present is not None:
            sys.modules["torch_npu"] = present
    attached = {}
    for name, op in OPS.items():
        attached[name] = [replace(i, device="cpu") for i in op.implementations if i.device == "npu"]
        op.implementations[:] = before[name]
    return attached


NPU = _npu_implementations()


@pytest.fixture
def on_stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Inside, the kernels for NPUs are those of the CPU, and no others."""
    for name, op in OPS.items():
        monkeypatch.setattr(op, "implementations", list(NPU[name]))
    STUB.calls.clear()
    yield STUB
    STUB.calls.clear()


@pytest.fixture(scope="session")
def parity() -> Callable[[Op[Any, Any], str, Any, Any], int]:
    """`check` of the parity test."""
    path = Path(__file__).parents[2] / "ops" / "test_parity.py"
    spec = importlib.util.spec_from_file_location("parity", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.check
