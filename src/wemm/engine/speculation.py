"""Speculative decoding by prompt lookup: what followed the last few tokens before may follow them again.

Answers that repeat the prompt or themselves (text read from an image, lists, tables) are then computed
several tokens at a time. A draft is verified by the model itself, and every token is drawn from a hash
of the seed and its position (`sampler.py`): the answer is the same with and without, greedy or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

_NGRAM = 3
_MAX_PAUSE = 64


class Speculator:
    """Drafts for one sequence; it drafts more where drafts come true, and pauses where they do not."""

    def __init__(self, max_draft_tokens: int) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._length = min(2, max_draft_tokens)
        self._pause, self._pause_until = 1, 0
        self._num_indexed = 0
        self._last_end: dict[tuple[int, ...], int] = {}

    def propose(self, token_ids: Sequence[int], num_pending: int = 0) -> list[int]:
        """Tokens that may follow `token_ids` (prompt and answer so far) and `num_pending` more; often none."""
        self._index(token_ids)
        if len(token_ids) < self._pause_until:
            return []
        end = self._last_end.get(tuple(token_ids[-_NGRAM:]))
        if end is None:
            return []
        followed = list(token_ids[end:])
        # Where the end of the sequence is reached, the guess goes on with itself: a cycle goes round.
        draft = [followed[i % len(followed)] for i in range(num_pending, num_pending + self._length)]
        return list(takewhile(lambda token_id: token_id >= 0, draft))  # an image follows nothing

    def record(self, num_tokens: int, num_drafted: int, num_accepted: int) -> None:
        """How a draft came out, made when the sequence had `num_tokens` tokens."""
        if num_accepted == num_drafted:
            self._length = min(2 * self._length, self._max_draft_tokens)
            self._pause = 1
        elif num_accepted < num_drafted / 2:
            self._length = max(1, self._length // 2)
        if num_accepted == 0:
            self._pause = min(2 * self._pause, _MAX_PAUSE)
            self._pause_until = num_tokens + self._pause

    def _index(self, token_ids: Sequence[int]) -> None:
        # The n-gram that ends the sequence is left for the next call: nothing follows it yet.
        for end in range(max(self._num_indexed, _NGRAM), len(token_ids)):
            self._last_end[tuple(token_ids[end - _NGRAM : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))
