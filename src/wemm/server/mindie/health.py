"""How the service is: ready, busy, starting, stopping or broken, and whether an inference goes through."""

from __future__ import annotations

import asyncio
from enum import IntEnum

from wemm.engine.async_llm import AsyncLLM
from wemm.request import SamplingParams
from wemm.server.service import Service

_FIRST = -(2**31)
_ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)


class ServiceStatus(IntEnum):
    """MindIE's numbers."""

    NORMAL = 1
    ABNORMAL = 2
    STOPPING = 3
    STARTING = 4
    BUSY = 5

    @property
    def is_alive(self) -> bool:
        """Whether it is worth waiting for."""
        return self is not ServiceStatus.ABNORMAL


def status_of(service: Service) -> tuple[ServiceStatus, str]:
    """And what to say about it."""
    admission, supervisor = service.admission, service.supervisor
    if service.draining:
        return ServiceStatus.STOPPING, "Service is stopping"
    if not supervisor.is_ready:
        status = ServiceStatus.ABNORMAL if supervisor.has_given_up else ServiceStatus.STARTING
        return status, f"Service is not ready: {supervisor.why_not_ready}"
    if admission.num_requests >= admission.max_requests or admission.num_bytes >= admission.max_bytes:
        return ServiceStatus.BUSY, "Service is alive but busy"
    return ServiceStatus.NORMAL, ""


async def infers_within(llm: AsyncLLM, seconds: float) -> bool:
    """Whether one token is drawn in time, before everything that waits; else whether the engine is at work.

    A step over large images may take longer than a probe waits: busy is not dead.
    """
    num_steps = llm.stats.num_steps
    try:
        await asyncio.wait_for(_infer(llm), seconds)
    except asyncio.TimeoutError:
        return llm.stats.num_steps > num_steps
    return True


async def _infer(llm: AsyncLLM) -> None:
    prompt = [llm.tokenizer.bos_id]
    async for _ in llm.generate(prompt, _ONE_TOKEN, priority=_FIRST, cache_salt="health"):
        pass
