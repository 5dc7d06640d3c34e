"""The management plane: health, figures, configuration, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

import wemm
from wemm.engine.engine import EngineStats
from wemm.errors import ParameterError, WemmError
from wemm.server.errors import Refusal
from wemm.server.mindie import protocol
from wemm.server.mindie.errors import error_response, not_found
from wemm.server.mindie.health import ServiceStatus, infers_within, status_of
from wemm.server.mindie.metadata import check_path, kv_gibibytes, max_output_len
from wemm.server.mindie.recent import RecentTimes
from wemm.server.service import Service

_DEFAULT_PROBE, _LONGEST_PROBE = 10, 600
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorBody} for status in (401, 404, 422, 500, 503)
}
_ABSENT = {
    "/v1/load_lora_adapter": "LoRA adapters cannot be loaded: the model's own is part of it",
    "/v1/unload_lora_adapter": "LoRA adapters cannot be unloaded: the model's own is part of it",
    **{
        f"/{version}/role/{role}": "there are no roles here: prefill and decode are not split"
        for version in ("v1", "v2")
        for role in ("prefill", "decode", "flex")
    },
    "/v1/engine-server/fault-handling-command": "there are no fault commands here: an engine that dies is started "
    "again by itself",
}


def management_router(service: Service, stop: Callable[[bool], None]) -> APIRouter:
    """All routes of the management plane. `stop(force)` ends the service."""
    routes = APIRouter(responses=_REFUSALS, tags=["Management"])
    _add_health(routes, service)
    _add_figures(routes, service)
    _add_configuration(routes, service)

    @routes.get("/stopService", summary="End the service, after what is under way or (mode=Force) now")
    async def stop_service(request: Request, mode: str | None = None) -> Response:
        # A link of any page leads here; an origin that is named has been found to be allowed.
        site = request.headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and "origin" not in request.headers:
            message = "pages of other origins may not stop this service"
            return error_response(Refusal(HTTPStatus.FORBIDDEN, "origin_not_allowed", message))
        if mode not in (None, "", "Force"):
            raise ParameterError(f"mode must be Force or absent. Given: {mode[:100]!r}", "mode")
        stop(mode == "Force")
        return Response()

    for path, reason in _ABSENT.items():
        _add_absent(routes, path, reason)
    return routes


def _add_health(routes: APIRouter, service: Service) -> None:
    @routes.get("/health", summary="Whether the engine is alive")
    @routes.get("/v2/health/live", summary="Whether the engine is alive, be it busy or starting")
    async def live() -> Response:
        status, message = status_of(service)
        if status is ServiceStatus.NORMAL:
            return Response()
        code = HTTPStatus.OK if status.is_alive else HTTPStatus.INTERNAL_SERVER_ERROR
        return JSONResponse({"message": message}, code)

    @routes.get("/v2/health/ready", summary="Whether new requests are welcome")
    async def ready() -> Response:
        status, message = status_of(service)
        if status is ServiceStatus.NORMAL:
            return Response()
        code = HTTPStatus.SERVICE_UNAVAILABLE if status.is_alive else HTTPStatus.INTERNAL_SERVER_ERROR
        return JSONResponse({"message": message}, code)

    @routes.get("/v2/models/{model:path}/ready", summary="Whether new requests to the model are welcome")
    async def model_ready(model: str) -> Response:
        check_path(service, model)
        return await ready()

    @routes.get("/health/timed", summary="Whether an inference goes through within ten seconds")
    async def timed() -> Response:
        return await probe(_DEFAULT_PROBE)

    @routes.get("/health/timed-{seconds}", summary="Whether an inference goes through within so many seconds")
    async def timed_by(seconds: str) -> Response:
        is_number = seconds.isascii() and seconds.isdecimal() and len(seconds) <= len(str(_LONGEST_PROBE))
        if not is_number or not 1 <= int(seconds) <= _LONGEST_PROBE:
            return not_found(f"the time must be in [1, {_LONGEST_PROBE}] seconds. Given: {seconds[:100]!r}")
        return await probe(int(seconds))

    async def probe(seconds: int) -> Response:
        try:
            if await infers_within(service.llm, seconds):
                return JSONResponse({"status": "healthy"})
            message = f"no token within {seconds} s, and the engine makes no step"
        except WemmError as error:
            message = str(error)
        return error_response(Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "unhealthy", message))

    @routes.get("/v1/engine-server/running-status", summary="The state as a number, and what is wrong")
    async def running_status() -> dict[str, Any]:
        status, message = status_of(service)
        now = int(time.time() * 1000)
        errors = [] if status.is_alive else [{"timestamp": now, "errCode": message, "createdBy": "wemm"}]
        return {"status": int(status), "errors": errors}


def _add_figures(routes: APIRouter, service: Service) -> None:
    recent = RecentTimes()
    service.metrics.listen(recent.add)
    port = service.config.management_port if service.config.management_port is not None else service.config.port
    instance = f"{service.config.management_host}:{port}"

    def series(name: str, value: int) -> dict[str, Any]:
        return {"metric": [{"__name__": name, "job": "node", "instance": instance}], "value": str(value)}

    @routes.get("/metrics-json", summary="Times of the last thousand requests (ms), requests and blocks now")
    async def metrics_json() -> dict[str, Any]:
        stats = service.supervisor.stats
        figures = {
            "TTFT": round(recent.first_token * 1000),
            "TBT": round(recent.between_tokens * 1000),
            "waitingInferRequestNum": stats.num_waiting if stats else 0,
            "processingInferRequestNum": stats.num_running if stats else 0,
            "remainBlocks": stats.num_free_blocks if stats else 0,
        }
        return {"resultType": "vector", "result": [series(name, value) for name, value in figures.items()]}

    @routes.get("/v2/models/{model:path}/getSlotCount", summary="Room for sequences and for their tokens")
    async def slot_count(model: str) -> dict[str, int]:
        check_path(service, model)
        llm = service.llm
        return {
            "total_slots": llm.config.max_num_seqs,
            "free_slots": _free_slots(llm.config.max_num_seqs, llm.stats),
            "available_tokens_length": llm.stats.num_free_blocks * llm.config.block_size,
        }

    @routes.get("/v1/status", summary="Role and room")
    async def status() -> dict[str, Any]:
        llm = service.llm
        stats = llm.stats
        return {
            **_ROLE,
            "resource": {
                "availSlotsNum": _free_slots(llm.config.max_num_seqs, stats),
                "availBlockNum": stats.num_free_blocks,
                "waitingRequestNum": stats.num_waiting,
                "runningRequestNum": stats.num_running,
                "swappedRequestNum": 0,
                "freeNpuBlockNums": stats.num_free_blocks,
                "freeCpuBlockNums": 0,
                "totalNpuBlockNums": stats.num_blocks,
                "totalCpuBlockNums": 0,
            },
        }

    @routes.get("/v2/status", summary="Role and room, as the second version says it")
    async def status_v2() -> dict[str, Any]:
        llm = service.llm
        return {
            **_ROLE,
            "resource": {
                "totalAvailNpuSlotsNum": _free_slots(llm.config.max_num_seqs, llm.stats),
                "totalAvailNpuBlockNum": llm.stats.num_free_blocks,
                "maxAvailNpuBlockNum": llm.stats.num_free_blocks,
            },
        }


_ROLE = {"service": {"roleStatus": "RoleReady", "currentRole": "none"}}


def _free_slots(total: int, stats: EngineStats) -> int:
    return max(0, total - stats.num_running)


def _add_configuration(routes: APIRouter, service: Service) -> None:
    @routes.get("/info", summary="Limits, in TGI's words")
    async def info() -> dict[str, Any]:
        llm = service.llm
        device = llm.config.device.partition(":")[0]
        return {
            "docker_label": None,
            "max_batch_total_tokens": llm.config.max_num_batched_tokens,
            "max_best_of": 1,
            "max_concurrent_requests": llm.config.max_num_seqs,
            "max_stop_sequences": None,
            "max_waiting_tokens": None,
            "sha": None,
            "validation_workers": None,
            "version": wemm.__version__,
            "waiting_served_ratio": None,
            "models": [
                {
                    "model_device_type": None if device == "auto" else device,
                    "model_dtype": llm.dtype,
                    "model_id": service.model_name,
                    "model_pipeline_tag": "text-generation",
                    "model_sha": None,
                    "max_total_tokens": llm.max_model_len,
                }
            ],
            "max_input_length": llm.max_model_len - 1,
        }

    @routes.get("/v1/config", summary="How the model is run, in the words of config.json")
    async def config() -> dict[str, Any]:
        llm = service.llm
        return {
            "modelName": service.model_name,
            "maxSeqLen": llm.max_model_len,
            "npuMemSize": kv_gibibytes(service),
            "cpuMemSize": 0,
            "worldSize": llm.config.tensor_parallel_size,
            "maxOutputLen": max_output_len(service),
            "cacheBlockSize": llm.config.block_size,
        }


def _add_absent(routes: APIRouter, path: str, reason: str) -> None:
    @routes.post(path, summary="Not here", name=path)
    async def absent() -> Response:
        return not_found(reason)
