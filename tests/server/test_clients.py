"""Other clients that people use: each makes one call about an image."""

from __future__ import annotations

import warnings

import pytest

from tests.server.conftest import conversation


def test_langchain_openai(served):
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="any", model="nano", stream_usage=True, max_retries=0
    )
    answer = model.invoke(conversation("word.png"))
    assert answer.content == "WEMM"
    assert answer.usage_metadata["input_tokens"] > 10
    chunks = list(model.stream(conversation("number.png")))
    assert "".join(chunk.content for chunk in chunks) == "2048"
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 5


def test_litellm(served, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        litellm = pytest.importorskip("litellm")
        call = dict(model="openai/nano", api_base=f"{served.url}/v1", api_key="any", num_retries=0)
        answer = litellm.completion(messages=conversation("word.png"), **call)
        assert answer.choices[0].message.content == "WEMM"
        stream = litellm.completion(messages=conversation("number.png"), stream=True, **call)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "2048"


def test_the_client_of_text_generation_inference(served):
    """huggingface_hub's, which speaks TGI's own routes."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    client = huggingface_hub.InferenceClient(model=served.url, timeout=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of routes it would rather not speak
        whole = client.text_generation("What colour is", max_new_tokens=6, details=True)
        assert len(whole.details.tokens) == whole.details.generated_tokens
        assert "".join(t.text for t in whole.details.tokens if not t.special) == whole.generated_text
        events = list(client.text_generation("What colour is", max_new_tokens=6, details=True, stream=True))
    assert events[-1].generated_text == whole.generated_text
    assert "".join(e.token.text for e in events if not e.token.special) == whole.generated_text
