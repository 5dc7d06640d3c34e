"""Fixtures: the tiny checkpoint (real layout, random weights), an engine over it, the golden results.

Nothing here may import more than `make gpu-check` has: torch, numpy, pillow, safetensors,
sentencepiece, typer, rich, pytest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Tensors here are tiny: a second thread gains nothing, and on a busy machine it waits for its turn at
# every op. Kernels are compared with several threads in tests/ops. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from wemm import LLM
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY

GOLDEN_DIRECTORY = Path(__file__).parent / "golden"
TINY = BUNDLED_DIRECTORY / "tiny"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Float32 reference results on the tiny checkpoint."""
    return json.loads((GOLDEN_DIRECTORY / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_images() -> Path:
    return GOLDEN_DIRECTORY / "images"


@pytest.fixture(scope="session")
def _session_llm() -> Iterator[LLM]:
    plain = dict(enable_prefix_caching=False, image_cache_memory=0, num_speculative_tokens=0)
    with LLM("tiny", dtype="float32", device="cpu", **plain) as llm:
        yield llm


@pytest.fixture
def llm(_session_llm: LLM) -> Iterator[LLM]:
    """A float32 engine without caches and guesses, the oracle of those with; nothing may be left in it."""
    yield _session_llm
    assert _session_llm._open.engine.num_unfinished == 0
    _session_llm._open.engine.check_integrity()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that the test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """edit_json(path, **changes): change keys of a JSON file; None deletes; `a__b` reaches inside."""

    def edit(path: Path, **changes: Any) -> None:
        data = json.loads(path.read_text()) if path.exists() else {}
        for key, value in changes.items():
            *outer, last = key.split("__")
            target = data
            for name in outer:
                target = target[name]
            if value is None:
                target.pop(last, None)
            else:
                target[last] = value
        path.write_text(json.dumps(data))

    return edit


@pytest.fixture(scope="session")
def ask() -> Callable[..., list[dict[str, Any]]]:
    """ask("text", image, …): one user message with the images before the text."""

    def make(text: str, *images: Any) -> list[dict[str, Any]]:
        parts = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    return make
