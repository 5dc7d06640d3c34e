"""CUDA graphs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from wemm.kernels import Recorder

logger = logging.getLogger(__name__)


def record(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]] | None:
    """Call it once for real and once to capture what it launches; None if it asks the device for a value.

    All graphs share one pool of memory: a replay may overwrite what an earlier one left, its result excepted.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function()  # compiles kernels and makes cuBLAS's workspaces, which a capture must not
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, _pool(), stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:
            logger.warning("not captured: %s", str(error).splitlines()[0])
            return None
    torch.cuda.current_stream().wait_stream(stream)
    return result, graph.replay


@functools.cache
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()


RECORDER = Recorder(record, holds_torch=True)
