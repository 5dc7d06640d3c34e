"""`make gpu-check` and `make npu-check` where there is no accelerator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wemm.platforms.npu import is_npu_present

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def _check(*arguments, target="gpu-check"):
    command = ["make", "--no-print-directory", target, f"GPU_PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_an_accelerator_it_fails_and_says_so():
    result = _check()
    assert result.returncode
    assert result.stdout == "gpu-check: no accelerator here, nothing was checked\n"


@pytest.mark.skipif(is_npu_present(), reason="there is one")
def test_without_an_npu_it_fails_and_says_so():
    result = _check(target="npu-check")
    assert result.returncode
    assert result.stdout == "npu-check: no NPU here, nothing was checked\n"


@pytest.mark.slow
def test_a_dry_run_takes_every_step():
    result = _check("DRY_RUN=1")
    assert result.returncode == 0, result.stderr
    assert " passed" in result.stdout
    assert " failed" not in result.stdout
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["benchmark"] for line in lines] == ["device"]
