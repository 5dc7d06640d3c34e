"""vLLM's streams: JSON objects with a NUL behind each, no events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.responses import StreamingResponse

from wemm.server.service import Service
from wemm.server.stream import NOT_STORED, until_failure

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
        pieces = until_failure(objects, service, lambda error: nul_object(describe(error)))
        super().__init__(pieces, media_type="text/plain", headers=NOT_STORED)
