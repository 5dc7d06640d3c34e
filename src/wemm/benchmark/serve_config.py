"""What `wemm bench serve` asks of an endpoint: the field texts are its `--help`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from wemm.config import option
from wemm.errors import ParameterError

if TYPE_CHECKING:
    from wemm.benchmark.workload import Workload

_LEAST = {"requests": 1, "max_concurrency": 1, "images": 1, "words": 0, "output_len": 1, "workload_seed": 0}
_POSITIVE = ("burstiness", "timeout", "slo_first_token", "slo_inter_token")


@dataclass(frozen=True)
class ServeBenchmark:
    """What is asked of which endpoint, and how fast. Raises ParameterError."""

    base_url: str = option("http://127.0.0.1:8000/v1", "The endpoint, with its /v1.")
    model: str | None = option(None, "Model to ask for. Default: the first that the endpoint lists.")
    api_key: str | None = field(
        default=None, repr=False, metadata={"help": "Key of the endpoint. Also read from OPENAI_API_KEY."}
    )
    request_rate: str = option(
        "inf", "Requests per second, whether or not earlier ones are answered; several with commas: 1,2,4. inf: "
        "all at once."
    )  # fmt: skip
    burstiness: float = option(1.0, "1: Poisson arrivals; less: in bursts; more: evenly spaced.")
    requests: int = option(64, "Requests at each rate.")
    max_concurrency: int | None = option(
        None, "Requests under way at most; what waits for others to end counts as queue. Default: no limit."
    )
    image_size: str = option("640x480", "Size of the images in pixels, WxH; none: text alone.")
    images: int | None = option(None, "Different images. Default: one per request.")
    words: int = option(12, "Words of each question.")
    output_len: int = option(64, "Tokens of each answer.")
    ignore_eos: bool = option(
        True, "Ask for all tokens by ignore_eos and repetition_guard, which OpenAI's own API does not know."
    )
    workload_seed: int = option(
        0, "Seed of arrivals, images and questions. The same once more may be answered from the endpoint's caches."
    )
    timeout: float = option(600.0, "Seconds for one answer; then it counts as an error.")
    slo_first_token: float | None = option(None, "Milliseconds to the first token for goodput.")
    slo_inter_token: float | None = option(None, "Milliseconds per token after the first for goodput.")

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        _ = self.rates
        _ = self.workload(0)
        for name, bound in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ParameterError(f"{_flag(name)} must be at least {bound}. Given: {value}", name)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ParameterError(f"{_flag(name)} must be a number above 0. Given: {value}", name)

    @property
    def rates(self) -> list[float]:
        """Requests per second, in the order given. Raises ParameterError."""
        try:
            rates = [float(text) for text in self.request_rate.split(",")]
        except ValueError:
            rates = []
        if not rates or not all(rate > 0 for rate in rates):
            raise ParameterError(
                f"--request-rate takes numbers above 0 or inf, with commas. Given: {self.request_rate!r}",
                "request_rate",
            )
        return rates

    def workload(self, index: int) -> Workload:
        """Of the rate with that index: a seed of its own, or caches would answer the second rate."""
        from wemm.benchmark.workload import Workload, parse_size

        size = parse_size(self.image_size)
        return Workload(self.requests, size, self.images or self.requests, self.words, self.workload_seed + index)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.username
    except ValueError:
        is_good = False
    if not is_good:  # and it may hold a password: it is not repeated
        raise ParameterError(
            "--base-url is written like http://127.0.0.1:8000/v1, with the key apart in --api-key", "base_url"
        )
