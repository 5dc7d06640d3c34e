"""The original's commands as a user types them: in a shell that knows nothing but where Python is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/modeltest"))

CLEAN = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    return CLEAN


@pytest.fixture(scope="session")
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """shell(cwd, *command, **variables): run in a clean environment."""

    def run(cwd, *command, **variables):
        return subprocess.run(
            [str(part) for part in command], cwd=cwd, env={**CLEAN, **variables}, capture_output=True, text=True
        )

    return run
