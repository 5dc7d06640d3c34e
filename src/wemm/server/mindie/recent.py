"""Averages over the last requests, as /metrics-json shows them."""

from __future__ import annotations

from collections import deque

from wemm.request import RequestOutput

_WINDOW = 1000


class RecentTimes:
    """Seconds to the first token and between tokens, means over the last thousand requests."""

    def __init__(self) -> None:
        self._first_token: deque[float] = deque(maxlen=_WINDOW)
        self._between_tokens: deque[float] = deque(maxlen=_WINDOW)

    def add(self, output: RequestOutput, num_tokens: int) -> None:
        """A request was answered with so many tokens."""
        self._first_token.append(output.metrics.first_token)
        per_answer = num_tokens / max(1, len(output.outputs))
        if per_answer > 1:
            self._between_tokens.append(output.metrics.decode / (per_answer - 1))

    @property
    def first_token(self) -> float:
        """0 before the first request."""
        return _mean(self._first_token)

    @property
    def between_tokens(self) -> float:
        """0 before the first answer of two tokens."""
        return _mean(self._between_tokens)


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values) if values else 0.0
