"""Prompts → requests, in a few worker threads beside the engine: images are decoded and resized there.

What crosses to the engine is uint8 pixels and token ids. Pillow leaves the interpreter lock while it decodes
and resizes, so this overlaps with computing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from wemm.engine.sequence import Request
from wemm.engine.structured import GrammarCompiler
from wemm.errors import ParameterError
from wemm.processing.processor import ProcessedPrompt, Processor
from wemm.request import RequestMetrics, SamplingParams

_MAX_WORKERS = 4

Process = Callable[[Any], ProcessedPrompt]


class Intake:
    """Numbers requests in the order they are handed in, and prepares several at once."""

    def __init__(
        self,
        default_sampling_params: SamplingParams,
        grammars: GrammarCompiler,
        seed: int,
        num_workers: int | None = None,
    ) -> None:
        """`num_workers`: by default a few, as many as there are cores."""
        num_workers = num_workers or min(_MAX_WORKERS, os.cpu_count() or 1)
        self._default_sampling_params = default_sampling_params
        self._grammars = grammars
        self._seed = seed
        self._num_requests = 0
        self.lookahead = 2 * num_workers
        """How many requests are worth preparing ahead of the engine."""
        self._pool = ThreadPoolExecutor(num_workers, "wemm-intake")

    def submit(
        self,
        prompt: Any,
        process: Process,
        params: SamplingParams | None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> Future[Request]:
        """Begin to prepare a request. The future raises PromptError, MediaError, …; this ParameterError."""
        arrival_time = time.perf_counter()
        params = params or self._default_sampling_params
        _check_token_ids(params, self._grammars.vocab_size)
        _check_order(priority, timeout)
        self._num_requests += 1
        number = self._num_requests

        def prepare() -> Request:
            started = time.perf_counter()
            processed = process(prompt).salted(cache_salt)
            wanted = params.structured_outputs
            return Request(
                request_id=f"request-{number}",
                prompt=processed,
                sampling_params=params,
                seed=params.seed if params.seed is not None else self._seed * 2**32 + number,
                arrival_time=arrival_time,
                priority=priority,
                deadline=None if timeout is None else arrival_time + timeout,
                grammar=None if wanted is None else self._grammars.compile(wanted),
                metrics=RequestMetrics(processing=time.perf_counter() - started),
            )

        return self._pool.submit(prepare)

    def close(self) -> None:
        """Let the threads end; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def process_text_or_ids(processor: Processor) -> Process:
    """Raw text (BOS prepended) or token ids."""
    return lambda prompt: processor.text(prompt) if isinstance(prompt, str) else processor.token_ids(prompt)


def _check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    for name, token_ids in (("stop_token_ids", params.stop_token_ids or ()), ("logit_bias", params.biases)):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise ParameterError(f"{name} must be in [0, {vocab_size}). Given: {token_id}", name)


def _check_order(priority: int, timeout: float | None) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise ParameterError(f"priority must be an integer; smaller goes first. Given: {priority!r}", "priority")
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 < timeout < float("inf")):
        raise ParameterError(f"timeout must be seconds above 0. Given: {timeout!r}", "timeout")
