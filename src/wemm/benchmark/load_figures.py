"""What an open load shows: percentiles, throughput, errors, goodput; as figures, as a table, as a chart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from wemm.benchmark.charts import saved_axes
from wemm.benchmark.load import Answer, Exchange, read_answer
from wemm.benchmark.result import nearest_rank
from wemm.errors import ParameterError

_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "worst": 1.0}
_LATE_SECONDS = 0.01
_LATE_SHARE = 0.1
_CACHED_SHARE = 0.25  # every prompt begins alike


@dataclass(frozen=True)
class ServiceLevel:
    """What counts as good, in milliseconds; None: whatever."""

    first_token: float | None = None
    inter_token: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether anything was asked."""
        return self.first_token is not None or self.inter_token is not None

    def is_met(self, first_token: float, per_token: float | None) -> bool:
        """By one request, in seconds; one token alone has no time per further token."""
        return _within(first_token, self.first_token) and _within(per_token or 0.0, self.inter_token)


def _within(seconds: float, milliseconds: float | None) -> bool:
    return milliseconds is None or 1e3 * seconds <= milliseconds


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Nearest rank: each is a value that was measured. None without any."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {name: nearest_rank(ordered, share) for name, share in _PERCENTILES.items()}


def figures(rate: float, exchanges: Sequence[Exchange], level: ServiceLevel) -> dict[str, Any]:
    """Of one rate, ready for JSON; seconds, tokens and requests per second.

    `inter_token` are all gaps between events that carry tokens, `per_token` is the mean of each request:
    (last - first) / (tokens - 1). Both count like `first_token` and `total` for answered requests alone.
    """
    answers = [read_answer(exchange) for exchange in exchanges]
    answered = [pair for pair in zip(exchanges, answers, strict=True) if pair[1].error is None]
    start = min(exchange.due for exchange in exchanges)
    seconds = max(exchange.ended for exchange in exchanges) - start
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    num_prompt_tokens = sum(answer.num_prompt_tokens for _, answer in answered)
    result: dict[str, Any] = {
        "request_rate": "inf" if math.isinf(rate) else rate,
        "num_requests": len(exchanges),
        "num_errors": errors.total(),
        "errors": dict(errors.most_common()),
        "duration": seconds,
        "seconds": _latencies(answered),
        "offered_per_s": _offered(exchanges),
        "requests_per_s": len(answered) / seconds,
        "output_tokens_per_s": sum(answer.num_output_tokens for _, answer in answered) / seconds,
        "prompt_tokens_per_s": num_prompt_tokens / seconds,
        "cached_share": sum(answer.num_cached_tokens for _, answer in answered) / max(1, num_prompt_tokens),
        "lateness_p99": (percentiles([exchange.lateness for exchange in exchanges]) or {})["p99"],
    }
    if level.is_set:
        good = sum(level.is_met(a.token_times[0] - e.due, _per_token(a)) for e, a in answered)
        result["goodput"] = {"requests_per_s": good / seconds, "share": good / len(exchanges)}
    return result


def _latencies(answered: Sequence[tuple[Exchange, Answer]]) -> dict[str, dict[str, float] | None]:
    per_token = [_per_token(answer) for _, answer in answered]
    return {
        "queue": percentiles([exchange.queue for exchange, _ in answered]),
        "first_token": percentiles([answer.token_times[0] - exchange.due for exchange, answer in answered]),
        "inter_token": percentiles([gap for _, answer in answered for gap in _gaps(answer)]),
        "per_token": percentiles([value for value in per_token if value is not None]),
        "total": percentiles([exchange.ended - exchange.due for exchange, _ in answered]),
    }


def _gaps(answer: Answer) -> list[float]:
    return [later - earlier for earlier, later in pairwise(answer.token_times)]


def _per_token(answer: Answer) -> float | None:
    if answer.num_output_tokens < 2:
        return None
    return (answer.token_times[-1] - answer.token_times[0]) / (answer.num_output_tokens - 1)


def _offered(exchanges: Sequence[Exchange]) -> float | None:
    """Requests per second as they were drawn; None where all were due at once."""
    moments = [exchange.due for exchange in exchanges]
    span = max(moments) - min(moments)
    return (len(moments) - 1) / span if span else None


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What the reader of `run`'s figures must know, a line each."""
    return [f"rate {_name(rate)}: {text}" for rate in result["rates"] for text in _doubts(rate)]


def is_late(lateness: float, first_token: float) -> bool:
    """Whether the client's own delay shows in the time to the first token; both in seconds."""
    return lateness > max(_LATE_SECONDS, _LATE_SHARE * first_token)


def _doubts(rate: Mapping[str, Any]) -> Iterator[str]:
    first_token = (rate["seconds"]["first_token"] or {}).get("p50", 0.0)
    late = rate["lateness_p99"]
    if is_late(late, first_token):
        yield (
            f"requests left up to {1e3 * late:.0f} ms late (p99), this client was the bottleneck; "
            "give it a machine of its own or a lower rate"
        )
    if rate["num_errors"]:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in rate["errors"].items())
        yield f"{rate['num_errors']} of {rate['num_requests']} requests failed ({kinds})"
    if rate["cached_share"] > _CACHED_SHARE:
        share = f"{rate['cached_share']:.0%}"
        yield f"{share} of the prompt tokens came from the endpoint's cache; change --workload-seed"


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns with their units, and a row for each rate."""
    latencies = [
        (name, percentile)
        for name in ("first_token", "inter_token", "total")
        for percentile in ("p50", "p95", "p99")
    ]
    columns = ["offered (1/s)", "answered (1/s)", "errors", *(f"{name} {p} (ms)" for name, p in latencies)]
    columns += ["output (tokens/s)", "prompt (tokens/s)", "late p99 (ms)"]
    good = any("goodput" in rate for rate in result["rates"])
    return columns + ["good (1/s)"] * good, [_row(rate, latencies, good) for rate in result["rates"]]


def _row(rate: Mapping[str, Any], latencies: Sequence[tuple[str, str]], good: bool) -> list[Any]:
    seconds = rate["seconds"]
    row = [rate["request_rate"], rate["requests_per_s"], rate["num_errors"]]
    row += ["-" if seconds[name] is None else 1e3 * seconds[name][p] for name, p in latencies]
    row += [rate["output_tokens_per_s"], rate["prompt_tokens_per_s"], 1e3 * rate["lateness_p99"]]
    return [*row, rate["goodput"]["requests_per_s"]] if good else row


def chart(result: Mapping[str, Any], path: Path) -> None:
    """Latency and throughput over the rate. Raises ParameterError: no matplotlib, path, nothing answered."""
    rates = [rate for rate in result["rates"] if rate["seconds"]["first_token"]]
    if not rates:
        raise ParameterError(f"--plot {path}: no request was answered, there is nothing to draw")
    with saved_axes(path, 13, 4, columns=3) as axes:
        _draw_latency(axes[0], rates, "first_token")
        _draw_latency(axes[1], rates, "inter_token")
        _draw_throughput(axes[2], rates)
        for each in axes:
            each.set_xticks(range(len(rates)), [_name(rate) for rate in rates])
            each.set(xlabel="offered requests per second", ylim=(0, None))
            each.margins(x=0.08)
            each.grid(alpha=0.3)
            each.legend(frameon=False)


def _name(rate: Mapping[str, Any]) -> str:
    return f"{float(rate['request_rate']):g}"


def _draw_latency(axes: Any, rates: Sequence[Mapping[str, Any]], name: str) -> None:
    for percentile, style in (("p50", "o-"), ("p95", "s--")):
        values = [(rate["seconds"][name] or {}).get(percentile, math.nan) for rate in rates]
        axes.plot(range(len(rates)), [1e3 * value for value in values], style, label=percentile)
    axes.set(ylabel=f"{name} [ms]")


def _draw_throughput(axes: Any, rates: Sequence[Mapping[str, Any]]) -> None:
    offered = [rate["request_rate"] for rate in rates]
    numbers = [math.nan if rate == "inf" else rate for rate in offered]
    axes.plot(range(len(rates)), numbers, ":", color="grey", label="offered")
    axes.plot(range(len(rates)), [rate["requests_per_s"] for rate in rates], "o-", label="answered")
    if all("goodput" in rate for rate in rates):
        good = [rate["goodput"]["requests_per_s"] for rate in rates]
        axes.plot(range(len(rates)), good, "s--", label="within the limits")
    axes.set(ylabel="requests per second")
