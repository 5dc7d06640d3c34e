"""Every route of the business plane, with text and with images, whole and streamed, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from wemm.errors import EngineDeadError, RequestTimeoutError, StepError
from wemm.server.admission import OverloadedError
from wemm.server.errors import Refusal, refusal
from wemm.server.mindie import error_body, error_response, is_mindie_path
from wemm.server.mindie.running import RunningRequests

NUMBER = "图中的数字是多少？"
TRITON = "/v2/models/nano"


def _events(response):
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def _refused(response, status=422, kind="Input Validation Error"):
    assert (response.status_code, response.json()["error_type"]) == (status, kind), response.text
    assert set(response.json()) == {"error", "error_type"}
    return response.json()["error"]


def test_tgi_about_an_image(planes, word):
    response = planes.post("/generate", {"inputs": word, "parameters": {"details": True}})
    body = response.json()
    assert body["generated_text"] == "WEMM"
    details = body["details"]
    assert (details["finish_reason"], details["prefill"]) == ("eos_token", [])
    assert details["generated_tokens"] == len(details["tokens"])
    assert "".join(token["text"] for token in details["tokens"] if not token["special"]) == "WEMM"
    assert all(token["logprob"] <= 0 for token in details["tokens"])
    assert details["tokens"][-1]["special"]
    count = planes.post("/v1/tokenizer", {"inputs": word, "do_decode": False}).json()
    assert count == {"token_number": details["prompt_tokens"], "tokens": []}
    assert response.headers["requestuuid"]


def test_the_answer_is_that_of_the_chat_template(planes, image_url):
    parts = [image_url("number.png"), {"type": "text", "text": NUMBER}]
    own = planes.post("/infer", {"inputs": parts}).json()["generated_text"]
    chat = planes.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}).json()
    assert own == chat["choices"][0]["message"]["content"] == "2048"


def test_tgi_streams(planes, word):
    events = _events(
        planes.post("/generate_stream", {"inputs": json.dumps(word), "parameters": {"details": True}})
    )
    assert "".join(event["token"]["text"] for event in events) == "WEMM"
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "WEMM"
    assert events[-1]["details"]["generated_tokens"] == len(events)


def test_the_root_is_tgi_either_way(planes, word):
    assert planes.post("/", {"inputs": word}).json() == [{"generated_text": "WEMM"}]
    [body] = planes.post("/", {"inputs": word, "stream": False, "parameters": {"details": True}}).json()
    assert body["details"]["finish_reason"] == "eos_token"
    events = _events(planes.post("/", {"inputs": word, "stream": True}))
    assert (events[-1]["generated_text"], events[-1]["details"]) == ("WEMM", None)


def test_text_alone_is_raw(planes):
    body = {"inputs": "The", "parameters": {"details": True, "decoder_input_details": True, "max_new_tokens": 3}}
    answer = planes.post("/generate", body).json()
    assert answer["details"]["prefill"][0] == {"id": 1, "text": "<s>", "logprob": None, "special": True}
    completion = planes.post("/v1/completions", {"prompt": "The", "max_tokens": 3, "temperature": 0}).json()
    assert answer["generated_text"] == completion["choices"][0]["text"]
    answer = planes.post("/generate", {"inputs": "The", "parameters": {"return_full_text": True}}).json()
    assert answer["generated_text"].startswith("The")


def test_truncation(planes):
    text = "one two three four five six seven eight nine ten " * 200
    assert "shorten it" in _refused(planes.post("/generate", {"inputs": text}))
    body = {"inputs": text, "parameters": {"truncate": 9, "details": True, "max_new_tokens": 1}}
    assert planes.post("/generate", body).json()["details"]["prompt_tokens"] == 9


def test_a_json_list_of_other_things_is_text(planes):
    text = "[1, 2, 3]"
    answer = planes.post("/generate", {"prompt": text, "max_tokens": 1})
    assert answer.json()["text"][0].startswith(text)


def test_vllm(planes, word):
    assert planes.post("/generate", {"prompt": word}).json() == {"text": ["What word is written here?WEMM"]}
    response = planes.post("/generate", {"prompt": word, "stream": True, "model": "None"})
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.split("\0")
    assert lines.pop() == ""
    assert "".join(json.loads(line)["text"][0] for line in lines) == "WEMM"
    drawn = planes.post(
        "/generate", {"prompt": "The", "n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 4}
    ).json()
    assert len(drawn["text"]) == 3
    best = planes.post("/generate", {"prompt": "The", "n": 1, "best_of": 3, "temperature": 1.0, "seed": 5,
                                     "max_tokens": 4}).json()  # fmt: skip
    assert best["text"][0] in drawn["text"]


def test_vllm_stop_strings(planes, word):
    body = {"prompt": word, "stop": "MM", "max_tokens": 8}
    assert planes.post("/generate", body).json()["text"] == ["What word is written here?WE"]
    body["include_stop_str_in_output"] = True
    assert planes.post("/generate", body).json()["text"] == ["What word is written here?WEMM"]


def test_own(planes, word):
    body = planes.post("/infer", {"inputs": word, "parameters": {"details": True, "seed": 9}}).json()
    assert body["generated_text"] == "WEMM"
    assert (body["details"]["finish_reason"], body["details"]["seed"]) == ("eos_token", 9)
    assert len(body["details"]["generated_token_ids"]) == body["details"]["generated_tokens"]
    events = _events(planes.post("/infer", {"inputs": word, "stream": True, "parameters": {"details": True}}))
    assert "".join(event["token"]["text"] or "" for event in events) == events[-1]["generated_text"] == "WEMM"
    assert events[0]["prefill_time"] > 0
    assert all(event["decode_time"] > 0 for event in events[1:])


def test_own_token_ids(planes):
    llm = planes.service.llm
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("The")]
    whole = planes.post("/generate", {"inputs": "The"}).json()
    for path in ("/infer_token", "/infer"):
        assert planes.post(path, {"input_id": ids}).json() == whole
    events = _events(planes.post("/infer_token", {"input_id": ids, "stream": True}))
    assert events[-1]["generated_text"] == whole["generated_text"]
    for body in ({}, {"inputs": "x", "input_id": ids}):
        assert "either inputs or input_id" in _refused(planes.post("/infer", body))
    for body in ({}, {"input_id": []}, {"input_id": ["1"]}, {"input_id": [10**9]}, {"input_id": [-1]}):
        _refused(planes.post("/infer_token", body))


def test_triton_text(planes, word):
    body = planes.post(
        f"{TRITON}/generate", {"id": "a-1", "text_input": word, "parameters": {"details": True}}
    ).json()
    assert (body["id"], body["model_name"], body["model_version"]) == ("a-1", "nano", None)
    assert (body["text_output"], body["details"]["finish_reason"]) == ("WEMM", "eos_token")
    events = _events(
        planes.post(f"{TRITON}/generate_stream", {"text_input": word, "parameters": {"details": True}})
    )
    assert "".join(event["text_output"] for event in events) == "WEMM"
    assert len({event["id"] for event in events}) == 1
    assert ["finish_reason" in event["details"] for event in events] == [False] * (len(events) - 1) + [True]


def test_triton_tensors(planes):
    llm = planes.service.llm
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("The")]
    tensor = {"name": "input0", "shape": [1, len(ids)], "datatype": "UINT32", "data": ids}
    body = planes.post(f"{TRITON}/infer", {"inputs": [tensor], "outputs": [{"name": "out"}], "id": "t"}).json()
    [output] = body["outputs"]
    assert (body["id"], output["name"], output["datatype"]) == ("t", "out", "UINT32")
    assert output["shape"] == [1, len(output["data"])]
    assert (
        llm.tokenizer.decode(output["data"])
        == planes.post("/generate", {"inputs": "The"}).json()["generated_text"]
    )
    for change in ({"shape": [2, 2]}, {"datatype": "FP32"}, {"data": []}):
        _refused(planes.post(f"{TRITON}/infer", {"inputs": [{**tensor, **change}], "outputs": [{"name": "out"}]}))


def test_the_last_event_repeats_the_text_if_the_operator_wants_it(engine, word):
    planes = engine.planes(full_text=True)
    for path, body in (
        ("/generate_stream", {"inputs": word}),
        ("/infer", {"inputs": word, "stream": True}),
        (f"{TRITON}/generate_stream", {"text_input": word}),
    ):
        events = _events(planes.post(path, body))
        assert ["full_text" in event for event in events] == [False] * (len(events) - 1) + [True]
        assert events[-1]["full_text"] == "WEMM"


def test_token_counts(planes):
    body = planes.post("/v1/tokenizer", {"inputs": "Why 中文?"}).json()
    assert "".join(body["tokens"]) == "<s> Why 中文?"
    assert body["token_number"] == len(planes.service.llm.tokenizer.encode("Why 中文?")) + 1
    assert planes.post("/v1/tokenizer", {"inputs": "x", "do_decode": False}).json()["tokens"] == []
    assert planes.post("/v1/tokenizer", {"inputs": ""}).json() == {"token_number": 0, "tokens": []}
    _refused(planes.post("/v1/tokenizer", {"inputs": 3}))


def test_metadata(planes):
    assert planes.get("/v2").json()["name"] == "MindIE Server"
    assert planes.get(f"{TRITON}").json()["inputs"] == [{"name": "input0", "shape": [-1], "datatype": "UINT32"}]
    config = planes.get(f"{TRITON}/config").json()
    assert (config["model_name"], config["max_seq_len"], config["world_size"]) == ("nano", 1024, 1)
    for path in ("/v2/models/other", "/v2/models/other/config"):
        assert "'other' is not served here" in _refused(planes.get(path))
    assert "not split" in _refused(planes.get("/dresult"), 400, "Bad Request")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/generate", {}, "must have either inputs (TGI) or prompt (vLLM)"),
        ("/generate", b"{", "not valid JSON"),
        ("/generate", b"", "not valid JSON"),
        ("/generate", {"inputs": "x", "parameters": {"top_p": 1}},
         "parameters.top_p: Input should be less than 1. Given: 1"),
        ("/generate", {"prompt": "x", "model": "other"}, "'other' is not served here"),
        ("/generate", {"inputs": "x", "parameters": {"typical_p": 0.5}}, "typical_p 0.5 is not supported"),
        ("/generate_stream", {"inputs": "x", "parameters": {"decoder_input_details": True}}, "cannot be streamed"),
        ("/infer", {"inputs": [{"type": "video_url", "video_url": "x"}]}, "inputs[0]"),
        ("/infer", {"inputs": [{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]},
         "inputs[0].image"),
        ("/infer", {"inputs": [{"type": "image_url", "image_url": "/9j/4AAQ"}]}, "inputs[0].image"),
        ("/infer", {"inputs": [{"type": "image_url", "image_url": "https://example.com/a.png"}]},
         "inputs[0].image_url: remote images are off"),
        ("/infer", {"inputs": [{"type": "image_url", "image_url": "/data/a.png"}]}, "file: URLs are not read"),
        ("/generate", {"prompt": [{"type": "image_url", "image_url": "data:,"}] * 21}, "21 images; at most 20"),
        (f"{TRITON}/generate", {"text_input": "x", "id": "a b"}, "id: "),
        ("/v2/models/other/generate", {"text_input": "x"}, "'other' is not served here"),
        ("/v2/models/nano/versions/1/generate", {"text_input": "x"}, "is not served here"),
        ("/infer", {"inputs": "x", "parameters": {"priority": 6}}, "parameters.priority"),
    ],
)  # fmt: skip
def test_mistakes(planes, path, body, message):
    assert message in _refused(planes.post(path, body))


def test_paths_that_are_not_there(planes):
    assert "Not Found: GET /v2/nonsense" in _refused(planes.get("/v2/nonsense"), 404, "NotFoundError")
    assert "is not served here" in _refused(planes.get("/v2/models/"))
    _refused(planes.get("/generate"), 405, "Method Not Allowed")


async def _until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


def _long(planes, monkeypatch):
    """Answers go on until someone ends them."""
    endless = replace(planes.service.llm.default_sampling_params, ignore_eos=True, repetition_guard=False)
    monkeypatch.setattr(planes.service.llm, "default_sampling_params", endless)
    return {"id": "long-1", "parameters": {"max_new_tokens": 1000, "details": True, "temperature": 2.0}}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (f"{TRITON}/generate", {"text_input": "The"}),
        (f"{TRITON}/generate_stream", {"text_input": "The"}),
        ("/infer", {"inputs": "The"}),
        ("/infer", {"inputs": "The", "stream": True}),
    ],
)
def test_a_request_that_is_stopped_answers_with_what_it_has(planes, monkeypatch, path, more):
    body = {**_long(planes, monkeypatch), **more}
    llm = planes.service.llm

    async def run():
        running = asyncio.create_task(planes.send("POST", path, body))
        await _until(lambda: llm.stats.num_running)
        again = await planes.send("POST", path, body)
        stopped = await planes.send("POST", f"{TRITON}/stopInfer", {"id": "long-1"})
        response = await running
        gone = await planes.send("POST", f"{TRITON}/stopInfer", {"id": "long-1"})
        await _until(lambda: llm.stats.num_running == 0)
        await llm.check_integrity()
        return again, stopped, response, gone

    again, stopped, response, gone = planes.loop.run_until_complete(run())
    assert "taken by a request that has not ended" in _refused(again)
    assert (stopped.status_code, stopped.json()) == (200, {"id": "long-1"})
    assert "no request with the id 'long-1'" in _refused(gone, 404, "NotFoundError")
    last = _events(response)[-1] if "stream" in path or body.get("stream") else response.json()
    assert last["details"]["finish_reason"] == "stop_sequence"
    assert last["details"]["generated_tokens"] < 1000


def test_an_id_is_free_again_however_its_request_ended(planes):
    body = {"text_input": "The", "id": "once"}
    for _ in range(2):
        assert planes.post(f"{TRITON}/generate", body).status_code == 200
    too_long = {**body, "text_input": "one two three " * 999}
    for _ in range(2):
        assert "shorten it" in _refused(planes.post(f"{TRITON}/generate", too_long))


def test_an_answer_that_takes_too_long(engine, monkeypatch):
    planes = engine.planes(request_timeout=0.02)
    body = {"text_input": "The", **_long(planes, monkeypatch)}
    for _ in range(2):
        response = planes.post(f"{TRITON}/generate", body)
        message = _refused(response, 500, "Incomplete Generation")
        assert message.startswith("Engine callback timeout: ")


def test_a_caller_stops_no_one_elses_request():
    running = RunningRequests()
    with running.enter("a", "x") as stop:
        assert not running.stop("b", "x")
        with running.enter("b", "x"):
            assert running.stop("b", "x")
        assert not stop.is_set()
        assert running.stop("a", "x")
        assert stop.is_set()
    assert not running.stop("a", "x")


def test_a_stream_that_fails_says_so_in_its_own_form(planes, monkeypatch):
    def fail(*arguments):
        async def outputs():
            raise StepError("the step raised")
            yield

        return outputs()

    monkeypatch.setattr(planes.service.llm, "answer", fail)
    expected = {"error": "the step raised", "error_type": "Generation Error"}
    assert _events(planes.post("/generate_stream", {"inputs": "x"})) == [expected]
    assert _events(planes.post(f"{TRITON}/generate_stream", {"text_input": "x"})) == [expected]
    response = planes.post("/generate", {"prompt": "x", "stream": True})
    assert (response.status_code, response.text[-1]) == (200, "\0")
    assert json.loads(response.text[:-1]) == expected
    assert _refused(planes.post("/infer", {"inputs": "x"}), 424, "Generation Error") == "the step raised"


def test_too_many_requests(engine):
    planes = engine.planes(max_queued_requests=1)
    with planes.service.admission.admit(1):
        response = planes.post("/generate", {"inputs": "x"})
    assert _refused(response, 429, "Too Many Requests")
    assert int(response.headers["retry-after"]) >= 1
    assert planes.post("/generate", {"inputs": "x"}).status_code == 200


@pytest.mark.parametrize(
    ("problem", "status", "kind", "message"),
    [
        (refusal(OverloadedError("full", 3)), 429, "Too Many Requests", "full"),
        (refusal(EngineDeadError("loading")), 503, "Service Unavailable", "loading"),
        (refusal(RequestTimeoutError("late")), 500, "Incomplete Generation", "Engine callback timeout: late"),
        (refusal(StepError("broken")), 424, "Generation Error", "broken"),
        (refusal(ValueError("secret")), 500, "Incomplete Generation",
         "Server internal error: the service failed; its log has the reason"),
        (Refusal(400, "invalid_request", "bad"), 422, "Input Validation Error", "bad"),
        (Refusal(401, "unauthorized", "no key"), 401, "Unauthorized", "no key"),
        (Refusal(404, "not_found", "none"), 404, "NotFoundError", "none"),
    ],
)  # fmt: skip
def test_errors_in_mindies_words(problem, status, kind, message):
    assert error_body(problem) == {"error": message, "error_type": kind}
    response = error_response(problem)
    assert response.status_code == status
    assert json.loads(response.body) == error_body(problem)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_a_body_that_is_too_large(engine):
    response = engine.planes(max_body_size=100).post("/generate", {"inputs": "x" * 200})
    assert response.status_code == 413
    assert response.json()["message"].startswith("Request body too large: ")


def test_whose_paths_are_mindies():
    mindie = ["/", "/generate", "/generate_stream", "/infer", "/infer_token", "/v1/tokenizer", "/dresult", "/v2",
              "/v2/models/m/stopInfer", "/v2/health/live", "/v2/nonsense", "/health/timed-3", "/v1/role/prefill",
              "/stopService", "/info", "/metrics-json", "/v1/config", "/v1/status"]  # fmt: skip
    others = ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/m", "/health", "/ready",
              "/metrics", "/tokenize", "/nonsense", "", "/v2x"]  # fmt: skip
    assert all(map(is_mindie_path, mindie))
    assert not any(map(is_mindie_path, others))
