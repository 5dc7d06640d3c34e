"""Engines of vLLM, what they answer, and when that is the same as ours."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wemm import SamplingParams

MAX_TOKENS = 12
Conversation = list[dict[str, Any]]
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)


@contextmanager
def vllm_engine(model: str | Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine that is gone afterwards."""
    import vllm

    small = dict(dtype="float32", block_size=32, max_model_len=1024, max_num_seqs=8, enforce_eager=True, seed=0)
    engine = vllm.LLM(str(model), **{**small, **options})
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def answers(engine: Any, conversations: Sequence[Conversation], **options: Any) -> list[Any]:
    """Greedy, all at once."""
    import vllm

    params = vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    return engine.chat([_for_vllm(c) for c in conversations], params, use_tqdm=False, **options)


def _for_vllm(conversation: Conversation) -> Conversation:
    return [
        {
            **message,
            "content": [
                {"type": "image_pil", "image_pil": _opened(part["image"])} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in conversation
    ]


def _opened(path: Path) -> Any:
    from PIL import Image

    return Image.open(path)


def assert_same(ours: Any, theirs: Any, margin: float = 1e-3) -> int:
    """The same prompt, and the same ids up to the first choice closer than `margin`; how many that are."""
    assert len(theirs.prompt_token_ids) == len(ours.prompt_token_ids)
    text = [i for i, token_id in enumerate(ours.prompt_token_ids) if token_id >= 0]
    assert [theirs.prompt_token_ids[i] for i in text] == [ours.prompt_token_ids[i] for i in text]
    comparable = 0
    for logprobs in ours.outputs[0].logprobs:
        best, second = sorted((entry.logprob for entry in logprobs.values()), reverse=True)[:2]
        if best - second <= margin:
            break
        comparable += 1
    assert list(theirs.outputs[0].token_ids[:comparable]) == list(ours.outputs[0].token_ids[:comparable])
    if comparable == MAX_TOKENS:  # vLLM keeps back what may yet become a character
        assert theirs.outputs[0].text.rstrip("\ufffd") == ours.outputs[0].text.rstrip("\ufffd")
    return comparable
