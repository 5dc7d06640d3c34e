"""Token ids → answer text, stop strings and finish reason."""

from __future__ import annotations

from wemm.processing.tokenizer import Tokenizer
from wemm.request import SamplingParams


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

    def push(self, token_id: int) -> None:
        """Take the next token; sets `finish_reason` when it is the last."""
        self._num_tokens += 1
        if token_id == self._eos_id or token_id in self._stop_token_ids:
            self.stop_reason = None if token_id == self._eos_id else token_id
            self._finish("stop")
            return
        self._append(self._decoder.push(token_id))
        if self.finish_reason is None and self._num_tokens >= self._max_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self._append(self._decoder.flush())
        self.finish_reason = self.finish_reason or reason

    def _append(self, text: str) -> None:
        stops = self._params.stop_strings
        searched = max(0, len(self._text) - max((len(s) for s in stops), default=1) + 1)
        self._text += text
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
