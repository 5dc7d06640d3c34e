"""What the model and the service are, in Triton's words."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

import wemm
from wemm.server.mindie.errors import bad_request
from wemm.server.service import Service

_TENSOR = {"shape": [-1], "datatype": "UINT32"}


def add_metadata(routes: APIRouter, service: Service) -> None:
    """The GET routes of the business plane."""

    @routes.get("/v2", summary="What serves here", tags=["Triton"])
    async def server_metadata() -> dict[str, Any]:
        llm = service.llm
        return {
            "name": "MindIE Server",
            "version": wemm.__version__,
            "extensions": {
                "max_iter_times": max_output_len(service),
                "prefill_policy_type": 0,
                "decode_policy_type": 0,
                "max_prefill_batch_size": llm.config.max_num_seqs,
                "max_prefill_tokens": llm.config.max_num_batched_tokens,
            },
        }

    @routes.get("/v2/models/{model:path}/config", summary="How the model is run", tags=["Triton"])
    async def model_config(model: str) -> dict[str, Any]:
        check_path(service, model)
        llm = service.llm
        return {
            "model_name": service.model_name,
            "input_datatype": "INT64",
            "output_datatype": "INT64",
            "max_seq_len": llm.max_model_len,
            "npu_mem_size": kv_gibibytes(service),
            "cpu_mem_size": 0,
            "world_size": llm.config.tensor_parallel_size,
            "model_weight_path": llm.config.model.rstrip("/").rpartition("/")[2],
            "model_instance_type": "Standard",
        }

    # After the longer paths: a model's name may hold slashes.
    @routes.get("/v2/models/{model:path}", summary="What the model takes and gives", tags=["Triton"])
    async def model_metadata(model: str) -> dict[str, Any]:
        check_path(service, model)
        return {
            "name": service.model_name,
            "platform": "MindIE Server",
            "inputs": [{"name": "input0", **_TENSOR}],
            "outputs": [{"name": "output0", **_TENSOR}],
        }

    @routes.get("/dresult", summary="Refused: prefill and decode are not split", tags=["MindIE"])
    async def decode_result() -> Response:
        return bad_request("prefill and decode are not split here: there are no results to fetch")


def check_path(service: Service, model: str) -> None:
    """The model of a path, where nothing is not the served one. Raises UnknownModelError."""
    service.check_model(model or "/")


def max_output_len(service: Service) -> int:
    """Tokens of an answer for which nothing else is said."""
    return service.config.default_max_tokens or service.llm.max_model_len


def kv_gibibytes(service: Service) -> int:
    """MindIE's npuMemSize: whole GiB for the KV cache of one rank; -1 if that is sized by what is free."""
    size = service.llm.config.kv_cache_memory
    return -1 if size is None else size // 2**30
