"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.sequence import Sequence
from wemm.errors import IntegrityError
from wemm.processing.image_processor import ProcessedImage


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence of a step."""

    sequence: Sequence
    num_new_tokens: int
    """Tokens [num_computed_tokens, num_computed_tokens + num_new_tokens) are computed."""

    @property
    def stop(self) -> int:
        """First position not computed after this step."""
        return self.sequence.num_computed_tokens + self.num_new_tokens

    @property
    def is_complete(self) -> bool:
        """All tokens are computed after this step, so the next one can be drawn."""
        return self.stop == self.sequence.num_tokens


@dataclass(frozen=True)
class SchedulerOutput:
    """A step: either the prefill of some sequences or one decode of all running ones."""

    is_prefill: bool
    scheduled: tuple[ScheduledSequence, ...]
    images: tuple[ProcessedImage, ...]
    """Distinct images to encode before the language model runs."""


class Scheduler:
    """First come, first served; waiting prompts go before running decodes, a long one in chunks.

    When blocks run out in decode, the youngest running sequence gives up its blocks and waits to be
    computed again from its tokens.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        encoder_cache: EncoderCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._kv_cache = kv_cache
        self._encoder_cache = encoder_cache
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """True while a sequence waits or runs."""
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and take back what it held."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._kv_cache.free(sequence.seq_id)
        self._encoder_cache.release(sequence.seq_id)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step and give every chosen sequence its blocks."""
        return self._schedule_prefill() or self._schedule_decode()

    def _schedule_prefill(self) -> SchedulerOutput | None:
        scheduled: list[ScheduledSequence] = []
        images: dict[str, ProcessedImage] = {}
        budget = self._max_num_batched_tokens
        while self._waiting and budget and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if not self._kv_cache.can_allocate(sequence.seq_id, sequence.num_tokens):
                break
            num_new = min(budget, sequence.num_tokens - sequence.num_computed_tokens)
            entry = ScheduledSequence(sequence, num_new)
            if entry.is_complete:
                self._waiting.popleft()
                self._running.append(sequence)
            self._kv_cache.allocate(sequence.seq_id, sequence.num_tokens)
            spans = {span.image.sha256: span.image for span in sequence.image_spans}
            self._encoder_cache.acquire(sequence.seq_id, spans)
            images.update({s: image for s, image in spans.items() if s not in self._encoder_cache})
            scheduled.append(entry)
            budget -= num_new
        return SchedulerOutput(True, tuple(scheduled), tuple(images.values())) if scheduled else None

    def _schedule_decode(self) -> SchedulerOutput:
        scheduled = []
        candidates = deque(self._running)
        while candidates:
            sequence = candidates.popleft()
            while not self._kv_cache.can_allocate(sequence.seq_id, sequence.num_tokens):
                if not candidates:
                    raise IntegrityError(f"{sequence.seq_id} does not fit into the KV cache alone")
                self._preempt(candidates.pop())
            self._kv_cache.allocate(sequence.seq_id, sequence.num_tokens)
            scheduled.append(ScheduledSequence(sequence, 1))
        return SchedulerOutput(False, tuple(scheduled), ())

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._running.remove(sequence)
        self._kv_cache.free(sequence.seq_id)
        sequence.num_computed_tokens = 0
        self._waiting.appendleft(sequence)
