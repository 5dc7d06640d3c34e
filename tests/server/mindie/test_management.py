"""The management plane: how the service is in every state, its figures, and its end."""

from __future__ import annotations

import asyncio

import pytest

from wemm.errors import EngineError
from wemm.request import CompletionOutput, RequestMetrics, RequestOutput
from wemm.server.mindie import health
from wemm.server.mindie.recent import RecentTimes

HEALTH = ("/health", "/v2/health/live", "/v2/health/ready", "/v2/models/nano/ready")


def _codes(planes):
    return [planes.manage(path).status_code for path in HEALTH]


def test_a_healthy_service(planes):
    for path in HEALTH:
        response = planes.manage(path)
        assert (response.status_code, response.text) == (200, "")
    assert planes.manage("/v1/engine-server/running-status").json() == {"status": 1, "errors": []}
    response = planes.manage("/v2/models/other/ready")
    assert (response.status_code, response.json()["error_type"]) == (422, "Input Validation Error")


def test_a_busy_service_is_alive_and_not_ready(engine):
    planes = engine.planes(max_queued_requests=1)
    with planes.service.admission.admit(1):
        assert _codes(planes) == [200, 200, 503, 503]
        for path in HEALTH:
            assert planes.manage(path).json() == {"message": "Service is alive but busy"}
        assert planes.manage("/v1/engine-server/running-status").json()["status"] == 5
        assert planes.manage("/health/timed").json() == {"status": "healthy"}
    assert _codes(planes) == [200] * 4


def test_a_service_that_stops_is_alive_and_not_ready(planes):
    planes.service.draining = True
    assert _codes(planes) == [200, 200, 503, 503]
    assert planes.manage("/v2/health/ready").json() == {"message": "Service is stopping"}


@pytest.mark.parametrize(("has_given_up", "live", "ready", "number"), [(False, 200, 503, 4), (True, 500, 500, 2)])
def test_a_service_without_an_engine(planes, monkeypatch, has_given_up, live, ready, number):
    supervisor = planes.service.supervisor
    monkeypatch.setattr(supervisor, "_why_not", "it died")
    monkeypatch.setattr(supervisor, "has_given_up", has_given_up)
    supervisor._ready = False
    try:
        assert _codes(planes) == [live, live, ready, ready]
        assert planes.manage("/v2/health/live").json() == {"message": "Service is not ready: it died"}
        status = planes.manage("/v1/engine-server/running-status").json()
        assert (status["status"], bool(status["errors"])) == (number, has_given_up)
        probe = planes.manage("/health/timed-3")
        assert (probe.status_code, probe.json()["error"]) == (500, "it died")
        for path in ("/info", "/v1/config", "/v1/status", "/v2/status", "/v2/models/nano/getSlotCount"):
            response = planes.manage(path)
            assert (response.status_code, response.json()["error_type"]) == (503, "Service Unavailable")
        assert planes.manage("/metrics-json").status_code == 200
    finally:
        supervisor._ready = True


def test_a_probe_is_an_inference(planes):
    llm = planes.service.llm
    before = llm.stats.num_steps
    assert planes.manage("/health/timed-60").json() == {"status": "healthy"}
    assert llm.stats.num_steps > before


@pytest.mark.parametrize("seconds", ["0", "601", "x", "1.5", "-3", "9999", "²", "%20"])
def test_how_long_a_probe_may_take(planes, seconds):
    response = planes.manage(f"/health/timed-{seconds}")
    assert (response.status_code, response.json()["error_type"]) == (404, "NotFoundError")


@pytest.mark.parametrize("steps", [0, 1])
def test_an_engine_that_is_slow_is_not_dead(planes, monkeypatch, steps):
    llm = planes.service.llm
    num_steps = llm.stats.num_steps

    async def hang(engine):
        if steps:
            async for _ in engine.generate([1], health._ONE_TOKEN):
                pass
        await asyncio.sleep(60)

    monkeypatch.setattr(health, "_infer", hang)
    response = planes.manage("/health/timed-2")
    assert response.status_code == (200 if steps else 500)
    if not steps:
        assert response.json()["error"] == "no token within 2 s, and the engine makes no step"
        assert llm.stats.num_steps == num_steps


def test_an_engine_that_fails_is_not_healthy(planes, monkeypatch):
    async def fail(llm):
        raise EngineError("it fell over")

    monkeypatch.setattr(health, "_infer", fail)
    response = planes.manage("/health/timed")
    assert (response.status_code, response.json()) == (
        500, {"error": "it fell over", "error_type": "Incomplete Generation"},
    )  # fmt: skip


def test_configuration(planes):
    info = planes.manage("/info").json()
    assert (info["max_input_length"], info["max_concurrent_requests"]) == (1023, 64)
    [model] = info["models"]
    assert (model["model_id"], model["max_total_tokens"], model["model_dtype"]) == ("nano", 1024, "float32")
    assert planes.manage("/v1/config").json() == {
        "modelName": "nano", "maxSeqLen": 1024, "npuMemSize": -1, "cpuMemSize": 0, "worldSize": 1,
        "maxOutputLen": 1024, "cacheBlockSize": 16,
    }  # fmt: skip


def test_room(planes):
    slots = planes.manage("/v2/models/nano/getSlotCount").json()
    assert (slots["total_slots"], slots["free_slots"]) == (64, 64)
    assert slots["available_tokens_length"] >= 1024
    first, second = planes.manage("/v1/status").json(), planes.manage("/v2/status").json()
    assert first["service"] == second["service"] == {"roleStatus": "RoleReady", "currentRole": "none"}
    assert first["resource"]["availBlockNum"] * 16 == slots["available_tokens_length"]
    assert second["resource"]["totalAvailNpuSlotsNum"] == 64


def _figures(planes):
    result = planes.manage("/metrics-json").json()["result"]
    assert {series["metric"][0]["instance"] for series in result} == {"127.0.0.1:8000"}
    return {series["metric"][0]["__name__"]: int(series["value"]) for series in result}


def test_figures_follow_the_requests(planes, word):
    before = _figures(planes)
    assert (before["TTFT"], before["TBT"], before["waitingInferRequestNum"]) == (0, 0, 0)
    planes.post("/generate", {"inputs": word})
    after = _figures(planes)
    assert after["TTFT"] > 0
    assert after["remainBlocks"] > 0


def test_averages_are_of_the_last_thousand():
    def output(first_token, decode):
        answer = CompletionOutput(0, "", (), None, None, "stop")
        return RequestOutput(
            "r", (), (answer,), True, metrics=RequestMetrics(first_token=first_token, decode=decode)
        )

    recent = RecentTimes()
    assert (recent.first_token, recent.between_tokens) == (0, 0)
    recent.add(output(9.0, 0.0), 1)
    assert (recent.first_token, recent.between_tokens) == (9.0, 0)
    for _ in range(1000):
        recent.add(output(2.0, 3.0), 4)
    assert (recent.first_token, recent.between_tokens) == (2.0, 1.0)


def test_stop(planes):
    for path, stops in (("/stopService", [False]), ("/stopService?mode=Force", [False, True])):
        response = planes.manage(path)
        assert (response.status_code, response.text, planes.stops) == (200, "", stops)
    response = planes.manage("/stopService?mode=gently")
    assert (response.status_code, response.json()["error_type"]) == (422, "Input Validation Error")
    assert planes.stops == [False, True]


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/role/prefill", "/v2/role/decode",
     "/v1/engine-server/fault-handling-command"],
)  # fmt: skip
def test_what_is_not_here_says_so(planes, path):
    response = planes.manage(path, "POST")
    assert (response.status_code, response.json()["error_type"]) == (404, "NotFoundError")
    assert "here" in response.json()["error"] or "adapters" in response.json()["error"]
