"""vLLM's streams: JSON objects with a NUL behind each, no events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse

from wemm.server.service import Service

NUL = "\0"


def nul_object(body: Mapping[str, Any]) -> str:
    """One object of a stream."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")) + NUL


class NulStream(StreamingResponse):
    """Objects of an iterator that may fail in the middle; the last one then says why."""

    def __init__(
        self,
        objects: AsyncGenerator[str, None],
        service: Service,
        describe: Callable[[Exception], Mapping[str, Any]],
    ) -> None:
        """`describe` makes an object of whatever failed."""
        super().__init__(
            _until_failure(objects, service, describe),
            media_type="text/plain",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


async def _until_failure(
    objects: AsyncGenerator[str, None], service: Service, describe: Callable[[Exception], Mapping[str, Any]]
) -> AsyncGenerator[str, None]:
    try:
        async with aclosing(objects):
            async for line in objects:
                yield line
    except Exception as error:  # noqa: BLE001 - the status is sent: whatever it is, it becomes an object
        service.note(error)
        yield nul_object(describe(error))
