"""Token ids → answer text, stop strings, loops and finish reason."""

from __future__ import annotations

import numpy as np

from wemm.processing.tokenizer import Tokenizer
from wemm.request import SamplingParams

_LONGEST_CYCLE = 128
_LEAST_REPEATED_TOKENS = 256
_LEAST_REPEATS = 8
_LOOK_EVERY = 32


class Answer:
    """The text of one answer as it grows, and why it ended."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, max_tokens: int) -> None:
        """`max_tokens` is what the parameters and max_model_len allow together."""
        self._params = params
        self._decoder = tokenizer.decoder(params.skip_special_tokens)
        self._eos_id = None if params.ignore_eos else tokenizer.im_end_id
        self._stop_token_ids = frozenset(params.stop_token_ids or ())
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._text = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """What can be shown: while the answer grows, never the beginning of a stop string."""
        return self._text if self.finish_reason else self._text[: len(self._text) - self._held_back()]

    @property
    def num_tokens_left(self) -> int:
        """Tokens that still may come."""
        return self._max_tokens - self._num_tokens

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return self._stop_token_ids if self._eos_id is None else self._stop_token_ids | {self._eos_id}

    def push(self, token_ids: list[int]) -> None:
        """Take the next token, the last of `token_ids`; sets `finish_reason` when the answer ends with it."""
        token_id = token_ids[-1]
        self._num_tokens = len(token_ids)
        if token_id in self.end_token_ids:
            self.stop_reason = None if token_id == self._eos_id else token_id
            self._finish("stop")
            return
        self._append(self._decoder.push(token_id))
        if self.finish_reason is None and self._params.repetition_guard and is_loop(token_ids):
            self._finish("repetition")
        if self.finish_reason is None and self.num_tokens_left <= 0:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self._append(self._decoder.flush())
        self.finish_reason = self.finish_reason or reason

    def _append(self, text: str) -> None:
        stops = self._params.stop_strings
        searched = max(0, len(self._text) - max((len(s) for s in stops), default=1) + 1)
        self._text += text
        if self._num_tokens < self._params.min_tokens:
            return
        found = [(self._text.find(s, searched), s) for s in stops]
        hits = [(position, s) for position, s in found if position >= 0]
        if hits:
            position, self.stop_reason = min(hits, key=lambda hit: hit[0])
            self._text = self._text[:position]
            self.finish_reason = "stop"

    def _held_back(self) -> int:
        longest = 0
        for stop in self._params.stop_strings:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def is_loop(token_ids: list[int]) -> bool:
    """True if an answer goes round in a circle: a cycle of up to 128 tokens, at least eight times over.

    And at least 256 tokens of it: long lines of dots and tables of zeros are shorter. Looked at every
    32 tokens.
    """
    if len(token_ids) % _LOOK_EVERY or len(token_ids) < _LEAST_REPEATED_TOKENS:
        return False
    tail = np.array(token_ids[-_LONGEST_CYCLE * _LEAST_REPEATS :])
    for cycle in range(1, _LONGEST_CYCLE + 1):
        length = max(_LEAST_REPEATED_TOKENS, cycle * _LEAST_REPEATS)
        if length > len(tail):
            break
        if np.array_equal(tail[-length:-cycle], tail[-length + cycle :]):
            return True
    return False
