"""Where Triton is absent, the definitions run and nothing is recorded."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None
from wemm.benchmark.ops import load_ops
from wemm.kernels import load_kernels, recorder, release_memory
from wemm.ops.registry import OPS
load_ops()
load_kernels("cuda")
assert not any(op.implementations for op in OPS.values())
assert recorder("cuda") is None
release_memory("cuda")
"""


def test_without_triton_the_definitions_run():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
