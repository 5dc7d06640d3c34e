"""Bodies against OpenAI's published response schemas, written down from its API reference (2026-11)."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests.server.conftest import conversation

STRING_OR_NULL = {"type": ["string", "null"]}
TOKEN = {
    "type": "object",
    "required": ["token", "logprob", "bytes"],
    "properties": {
        "token": {"type": "string"},
        "logprob": {"type": "number", "maximum": 0},
        "bytes": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0, "maximum": 255}},
    },
}
LOGPROBS = {
    "type": ["object", "null"],
    "required": ["content", "refusal"],
    "properties": {
        "content": {
            "type": ["array", "null"],
            "items": {
                **TOKEN,
                "required": [*TOKEN["required"], "top_logprobs"],
                "properties": {**TOKEN["properties"], "top_logprobs": {"type": "array", "items": TOKEN}},
            },
        },
        "refusal": {"type": ["array", "null"]},
    },
}
FINISH_REASONS = ["stop", "length", "tool_calls", "content_filter", "function_call"]
USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": {"type": "integer"}}},
    },
}
HEAD = {"id": {"type": "string"}, "created": {"type": "integer"}, "model": {"type": "string"}}
CHAT_COMPLETION = {
    "type": "object",
    "required": ["choices", "created", "id", "model", "object"],
    "properties": {
        **HEAD,
        "object": {"const": "chat.completion"},
        "usage": USAGE,
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["finish_reason", "index", "message", "logprobs"],
                "properties": {
                    "finish_reason": {"enum": FINISH_REASONS},
                    "index": {"type": "integer"},
                    "logprobs": LOGPROBS,
                    "message": {
                        "type": "object",
                        "required": ["content", "refusal", "role"],
                        "properties": {
                            "content": STRING_OR_NULL, "refusal": STRING_OR_NULL, "role": {"const": "assistant"},
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip
CHAT_COMPLETION_CHUNK = {
    "type": "object",
    "required": ["choices", "created", "id", "model", "object"],
    "properties": {
        **HEAD,
        "object": {"const": "chat.completion.chunk"},
        "usage": USAGE,
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["delta", "finish_reason", "index"],
                "properties": {
                    "delta": {
                        "type": "object",
                        "properties": {
                            "content": STRING_OR_NULL,
                            "role": {"enum": ["developer", "system", "user", "assistant", "tool"]},
                        },
                    },
                    "finish_reason": {"enum": [*FINISH_REASONS, None]},
                    "index": {"type": "integer"},
                    "logprobs": LOGPROBS,
                },
            },
        },
    },
}
COMPLETION = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices"],
    "properties": {
        **HEAD,
        "object": {"const": "text_completion"},
        "usage": USAGE,
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["finish_reason", "index", "logprobs", "text"],
                "properties": {
                    "finish_reason": {"enum": ["stop", "length", "content_filter"]},
                    "index": {"type": "integer"},
                    "text": {"type": "string"},
                    "logprobs": {
                        "type": ["object", "null"],
                        "properties": {
                            "text_offset": {"type": "array", "items": {"type": "integer"}},
                            "token_logprobs": {"type": "array", "items": {"type": "number"}},
                            "tokens": {"type": "array", "items": {"type": "string"}},
                            "top_logprobs": {
                                "type": "array",
                                "items": {"type": "object", "additionalProperties": {"type": "number"}},
                            },
                        },
                    },
                },
            },
        },
    },
}
MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}
MODEL_LIST = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}},
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "param", "code"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "param": STRING_OR_NULL,
                "code": STRING_OR_NULL,
            },
        }
    },
}

MANY = {"n": 2, "temperature": 1.0, "seed": 1, "max_tokens": 6}


def _events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("more", [{}, MANY, {"logprobs": True, "top_logprobs": 2, **MANY}])
def test_chat(client, more):
    body = {"messages": conversation("word.png"), **more}
    jsonschema.validate(client.post("/v1/chat/completions", json=body).json(), CHAT_COMPLETION)
    streamed = client.post(
        "/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = _events(streamed)
    for chunk in events:
        jsonschema.validate(chunk, CHAT_COMPLETION_CHUNK)
    assert "usage" in events[-1]


@pytest.mark.parametrize("more", [{}, MANY, {"logprobs": 2, **MANY}])
def test_completions(client, more):
    body = {"prompt": ["What colour", "图中"], "max_tokens": 6, **more}
    jsonschema.validate(client.post("/v1/completions", json=body).json(), COMPLETION)
    events = _events(client.post("/v1/completions", json={**body, "stream": True}))
    # A stream's events are completions whose answers have not ended.
    unfinished = json.loads(json.dumps(COMPLETION))
    unfinished["properties"]["choices"]["items"]["properties"]["finish_reason"]["enum"].append(None)
    for event in events:
        jsonschema.validate(event, unfinished)


def test_models_and_errors(client):
    jsonschema.validate(client.get("/v1/models").json(), MODEL_LIST)
    jsonschema.validate(client.get("/v1/models/nano").json(), MODEL)
    for response in (
        client.get("/v1/models/other"),
        client.get("/v1/nothing"),
        client.get("/v1/chat/completions"),
        client.post("/v1/chat/completions", content=b"{"),
        client.post("/v1/chat/completions", json={"messages": "hi"}),
        client.post("/v1/completions", json={"prompt": [-1]}),
    ):
        assert 400 <= response.status_code < 500
        jsonschema.validate(response.json(), ERROR)
