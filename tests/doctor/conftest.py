"""A copy of the trained bundled checkpoint to damage, and the doctor called on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.config import EngineConfig
from wemm.doctor.check import Report
from wemm.doctor.doctor import Examination, examine
from wemm.doctor.files import SUMS_NAME
from wemm.progress import silent

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def patient(tmp_path: Path) -> Path:
    """nano without recorded hashes: what is wrong must show in the weights and answers themselves."""
    directory = Path(shutil.copytree(BUNDLED_DIRECTORY / "nano", tmp_path / "nano"))
    (directory / SUMS_NAME).unlink(missing_ok=True)
    return directory


@pytest.fixture
def rewrite(patient: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], None]], None]:
    """rewrite(edit): change the tensors of the patient's only shard."""

    def change(edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(patient / SHARD)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, patient / SHARD)

    return change


@pytest.fixture(scope="session")
def diagnose() -> Callable[..., Report]:
    """diagnose(model, dtype="float32", quick=True, …): a report."""

    def call(model: Path | str, dtype: str = "float32", plora: bool = True, **wanted: object) -> Report:
        config = EngineConfig(str(model), dtype=dtype, device="cpu", plora=plora)
        return examine(config, Examination(**wanted), silent)

    return call


@pytest.fixture(scope="session")
def by_name() -> Callable[[Report], dict[str, str]]:
    """Check → status."""
    return lambda report: {check.name: check.status for check in report.checks}
