"""Prometheus metrics: what every stage takes, what is cached, what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wemm.engine.engine import EngineStats
from wemm.request import RequestOutput
from wemm.server.admission import Admission

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
STAGES = {
    "fetch": "Images: reading them from data: URLs, hosts and files.",
    "decode": "Images: decoding one, in its own process.",
    "preprocess": "Images: resizing one.",
    "queue": "From the prepared prompt to its first step.",
    "vision": "Vision tower and downsampler.",
    "prefill": "Prompt through the language model.",
    "first_token": "From arrival to the first token of the answer.",
    "inter_token": "Between one token of an answer and the next, mean of a request.",
    "total": "From arrival to the end of the answer.",
}


class Metrics:
    """One registry per service."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name}
        self._labels = labels
        self._listeners: list[Callable[[RequestOutput, int], None]] = []

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, text, list(labels), buckets=tuple(buckets), registry=self.registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, [*labels, *more], registry=self.registry)

        self._stages = {
            stage: histogram(f"wemm_{stage}_seconds", text, _SECONDS).labels(**labels)
            for stage, text in STAGES.items()
        }
        self._prompt_tokens = histogram("wemm_request_prompt_tokens", "Tokens of a prompt.", _TOKENS).labels(
            **labels
        )
        self._answer_tokens = histogram(
            "wemm_request_generation_tokens", "Tokens of all answers to a request.", _TOKENS
        ).labels(**labels)
        self._tokens = counter("wemm_tokens", "Tokens by kind: prompt, image, cached, generation.", "kind")
        self._requests = counter("wemm_requests", "Requests by how they ended.", "outcome")
        self._errors = counter("wemm_errors", "Refused and failed requests by type of error.", "type")
        self._cancelled = counter("wemm_cancelled", "Requests whose client left, by stage.", "stage")

    def watch(
        self,
        stats: Callable[[], EngineStats | None],
        ready: Callable[[], bool],
        num_restarts: Callable[[], int],
        admission: Admission,
    ) -> None:
        """Show the numbers of others, read when asked."""
        self.registry.register(_StateCollector(self._labels, stats, ready, num_restarts, admission))

    def listen(self, listener: Callable[[RequestOutput, int], None]) -> None:
        """Call it with every finished request and the number of tokens of its answers."""
        self._listeners.append(listener)

    def observe(self, stage: str, seconds: float) -> None:
        """One duration of a stage. From any thread."""
        self._stages[stage].observe(seconds)

    def finished(self, output: RequestOutput, num_answer_tokens: int) -> None:
        """A request was answered."""
        metrics = output.metrics
        for stage in ("queue", "prefill", "first_token", "total"):
            self.observe(stage, getattr(metrics, stage))
        if metrics.vision:
            self.observe("vision", metrics.vision)
        per_answer = num_answer_tokens / max(1, len(output.outputs))
        if per_answer > 1:
            self.observe("inter_token", metrics.decode / (per_answer - 1))
        num_prompt_tokens = len(output.prompt_token_ids)
        self._prompt_tokens.observe(num_prompt_tokens)
        self._answer_tokens.observe(num_answer_tokens)
        for kind, count in (
            ("prompt", num_prompt_tokens),
            ("image", output.num_image_tokens),
            ("cached", output.num_cached_tokens),
            ("generation", num_answer_tokens),
        ):
            self._tokens.labels(**self._labels, kind=kind).inc(count)
        self._requests.labels(**self._labels, outcome="success").inc()
        for listener in self._listeners:
            listener(output, num_answer_tokens)

    def failed(self, kind: str) -> None:
        """A request was refused or failed."""
        self._requests.labels(**self._labels, outcome="error").inc()
        self._errors.labels(**self._labels, type=kind).inc()

    def cancelled(self, stage: str) -> None:
        """The client left."""
        self._requests.labels(**self._labels, outcome="cancelled").inc()
        self._cancelled.labels(**self._labels, stage=stage).inc()

    def page(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self.registry)


class _StateCollector(Collector):
    def __init__(
        self,
        labels: dict[str, str],
        stats: Callable[[], EngineStats | None],
        ready: Callable[[], bool],
        num_restarts: Callable[[], int],
        admission: Admission,
    ) -> None:
        self._labels = labels
        self._stats = stats
        self._ready = ready
        self._num_restarts = num_restarts
        self._admission = admission

    def collect(self) -> Iterable[Metric]:
        """Gauges and counters of the engine that runs now; without one, only that there is none."""
        yield self._gauge("wemm_ready", "1 while the service can answer.", self._ready())
        restarts = self._num_restarts()
        yield self._counter("wemm_engine_restarts", "Times the engine was started again.", restarts)
        admission = self._admission
        yield self._gauge("wemm_accepted_requests", "Requests under way, in any stage.", admission.num_requests)
        yield self._gauge("wemm_accepted_bytes", "Bytes of their bodies and pixels.", admission.num_bytes)
        stats = self._stats()
        if stats is None:
            return
        used = stats.num_blocks - stats.num_free_blocks
        yield self._gauge("wemm_requests_waiting", "Answers that wait for their first step.", stats.num_waiting)
        yield self._gauge("wemm_requests_running", "Answers being computed.", stats.num_running)
        yield self._gauge("wemm_kv_cache_usage", "Share of KV blocks in use.", used / max(1, stats.num_blocks))
        yield self._gauge("wemm_image_cache_bytes", "Visual embeddings kept.", stats.image_cache_bytes)
        for name, text, value in (
            ("wemm_engine_steps", "Steps.", stats.num_steps),
            ("wemm_computed_tokens", "Rows through the language model.", stats.num_computed_tokens),
            ("wemm_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_prefix_tokens),
            ("wemm_prefix_cache_hits", "Those found there.", stats.num_prefix_cached_tokens),
            ("wemm_image_cache_queries", "Images that requests needed.", stats.num_image_queries),
            ("wemm_image_cache_misses", "Those that went through the tower.", stats.num_encoded_images),
            ("wemm_preemptions", "Answers put back for lack of KV blocks.", stats.num_preemptions),
            ("wemm_draft_tokens", "Tokens guessed ahead.", stats.num_draft_tokens),
            ("wemm_accepted_tokens", "Guesses that came true.", stats.num_accepted_tokens),
            ("wemm_awaiting_device_seconds", "With nothing else to do.", stats.seconds_awaiting_device),
        ):
            yield self._counter(name, text, value)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family
