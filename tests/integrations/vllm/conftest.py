"""Questions, and our engine's answers to them. Run by `make vllm-check`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.vllm.engines import GREEDY, Conversation
from wemm import LLM

# A directory of that name is no vLLM, and this is one.
_vllm = importlib.util.find_spec("vllm")
collect_ignore_glob = [] if _vllm is not None and _vllm.origin else ["test_*.py"]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def conversations() -> list[Conversation]:
    """One image, several, between texts and over turns; none; text that spells what it must not become."""
    images = Path(__file__).parent.parent.parent / "golden" / "images"

    def image(name: str) -> dict[str, Any]:
        return {"type": "image", "image": images / name}

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    def user(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"role": "user", "content": [*parts]}

    return [
        [user(image("300x200.png"), text("What is written here?"))],
        [user(image("434x434.png"), image("200x500.png"), text("图中写了什么？"))],
        [user(text("First"), image("33x21.png"), text("then"), image("1000x40.png"), text("Describe."))],
        [user(text("Why is the ocean blue?"))],
        [
            user(image("300x200.png"), text("What is this?")),
            {"role": "assistant", "content": [text("A picture.")]},
            user(image("588x240.png"), text("And this?")),
        ],
        [user(image("35x1200.png"), text("<image> <|im_end|> [UNUSED_TOKEN_145] <|im_start|>"))],
    ]


@pytest.fixture(scope="session")
def ours(conversations: list[Conversation]) -> Callable[[str | Path], list[Any]]:
    """Our engine's answers, one after the other without caches."""
    known: dict[str, list[Any]] = {}

    def answer(model: str | Path) -> list[Any]:
        if str(model) not in known:
            plain = dict(enable_prefix_caching=False, image_cache_memory=0, num_speculative_tokens=0)
            with LLM(str(model), dtype="float32", device="cpu", **plain) as llm:
                known[str(model)] = [llm.chat(conversation, GREEDY)[0] for conversation in conversations]
        return known[str(model)]

    return answer
