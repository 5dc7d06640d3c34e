"""What the next step computes: which sequences, how many tokens of each, which part of which images.

The order is that of priority, then of arrival. Every running sequence gets a token of the budget before
any gets a second one, so decodes never wait for a long prompt; what is left of the budget goes to prompts,
in chunks. When blocks run out, the last in order gives up its own and waits to be computed again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager, next_block_hash
from wemm.engine.sequence import Sequence
from wemm.errors import IntegrityError
from wemm.processing.image_processor import ProcessedImage

_MAX_PASSED_OVER = 64
"""How often a waiting sequence may see a later one of higher priority go first."""
MAX_SPECULATING = 8
"""With more sequences than this a step is no longer bound by reading weights, and drafts cost what they save."""


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence of a step."""

    sequence: Sequence
    start: int
    """First position computed in this step."""
    num_new_tokens: int
    is_complete: bool
    """All tokens are computed after this step, so the next one can be drawn."""
    draft_token_ids: tuple[int, ...] = ()
    """Guesses computed behind them, to be kept as far as they turn out right."""

    @property
    def stop(self) -> int:
        """First position not computed after this step, drafts aside."""
        return self.start + self.num_new_tokens

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.num_new_tokens + len(self.draft_token_ids)

    @property
    def decides_what_follows(self) -> bool:
        """What it draws must be known before the sequence is scheduled again."""
        return bool(self.draft_token_ids) or (self.is_complete and self.sequence.waits_for_its_tokens)


@dataclass(frozen=True)
class VisionSlice:
    """Part of one vision-tower call: some layers for a pack of images."""

    images: tuple[ProcessedImage, ...]
    first_layer: int
    last_layer: int
    """Exclusive."""
    is_complete: bool
    """The images have embeddings after it."""


@dataclass(frozen=True)
class SchedulerOutput:
    """A step. Sequences with one row come first."""

    scheduled: tuple[ScheduledSequence, ...]
    vision: VisionSlice | None = None


@dataclass(eq=False)
class _Queued:
    """A sequence in the scheduler's hands."""

    sequence: Sequence
    number: int
    """Order of arrival."""
    passed_over: int = 0

    @property
    def rank(self) -> tuple[float, int]:
        """Smaller goes first; who was passed over too often goes before everybody."""
        overdue = self.passed_over >= _MAX_PASSED_OVER
        return -float("inf") if overdue else self.sequence.request.priority, self.number


@dataclass
class _Encoding:
    """The vision-tower call under way."""

    images: tuple[ProcessedImage, ...]
    next_layer: int = 0


@dataclass
class SchedulerStats:
    """Counts since the start."""

    num_preemptions: int = 0
    num_tower_calls: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True)
class Limits:
    """How much a step may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_patches: int
    """Vision work of a step, in patches through the whole tower."""
    max_image_patches: int
    """Patches of one vision-tower call."""
    num_vision_layers: int
    embed_bytes_per_token: int
    embed_bytes_per_call: int
    """Embeddings of the largest vision-tower call."""

    @property
    def max_running(self) -> int:
        """Sequences under way together: each gets a token of the budget in every step."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


class Scheduler:
    """Owns the order of sequences; asks the caches for room."""

    def __init__(self, kv_cache: KVCacheManager, encoder_cache: EncoderCache, limits: Limits) -> None:
        self.stats = SchedulerStats()
        self._kv_cache = kv_cache
        self._encoder_cache = encoder_cache
        self._limits = limits
        self._waiting: list[_Queued] = []
        self._running: list[_Queued] = []
        self._encoding: _Encoding | None = None
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """True while a sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that own blocks."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._num_added += 1
        self._enqueue(_Queued(sequence, self._num_added))

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and take back what it held."""
        self._waiting = [queued for queued in self._waiting if queued.sequence is not sequence]
        self._running = [queued for queued in self._running if queued.sequence is not sequence]
        self._kv_cache.free(sequence.seq_id)
        self._encoder_cache.release(sequence.seq_id)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step and give every chosen sequence its blocks."""
        num_preemptions = self.stats.num_preemptions
        scheduled = self._schedule_running()
        if self.stats.num_preemptions == num_preemptions:  # else a newcomer would be the next to give way
            self._schedule_waiting(scheduled)
        scheduled.sort(key=lambda entry: entry.num_rows > 1)
        return SchedulerOutput(tuple(scheduled), self._schedule_vision())

    def advance(self, entry: ScheduledSequence) -> None:
        """The tokens of a scheduled sequence are computed before anything that is launched from now on."""
        sequence = entry.sequence
        sequence.num_computed_tokens = entry.stop
        sequence.num_pending_tokens += entry.is_complete
        needed = {span.image.sha256 for span in sequence.images_needed(sequence.num_computed_tokens)}
        passed = {span.image.sha256 for span in sequence.image_spans} - needed
        if passed:
            self._encoder_cache.release(sequence.seq_id, passed)
        self._kv_cache.publish(sequence)

    def accept_drafts(self, entry: ScheduledSequence, num_accepted: int) -> None:
        """So many of the drafts of a sequence were right: they are computed, too."""
        sequence = entry.sequence
        sequence.speculator.record(entry.stop, len(entry.draft_token_ids), num_accepted)
        self.stats.num_draft_tokens += len(entry.draft_token_ids)
        self.stats.num_accepted_tokens += num_accepted
        sequence.num_computed_tokens = entry.stop + num_accepted
        self._kv_cache.publish(sequence)

    def cancel_encoding(self) -> None:
        """Give up the vision-tower call under way."""
        self._encoding = None

    def _schedule_running(self) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        budget = self._limits.max_num_batched_tokens
        candidates = sorted(self._running, key=_rank)
        while candidates:
            queued = candidates.pop(0)
            sequence = queued.sequence
            # Everyone behind keeps a token.
            num_new = min(self._num_ready(sequence, sequence.num_computed_tokens), budget - len(candidates))
            if num_new < 1:
                continue
            while candidates and not self._kv_cache.can_grow(sequence.seq_id, sequence.num_tokens):
                self._preempt(candidates.pop())
            if not self._kv_cache.can_grow(sequence.seq_id, sequence.num_tokens):
                if len(self._running) == 1:
                    raise IntegrityError(f"{sequence.seq_id} does not fit into the KV cache alone")
                self._preempt(queued)
                break
            self._kv_cache.grow(sequence.seq_id, sequence.num_tokens)
            draft = self._draft(sequence, budget - len(candidates) - num_new)
            scheduled.append(_scheduled(sequence, num_new, draft))
            budget -= scheduled[-1].num_rows
        return scheduled

    def _draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        if not sequence.is_decoding or len(self._running) > MAX_SPECULATING:
            return ()
        room = min(room, sequence.num_tokens_left - 1)
        draft: list[int] = []
        if room > 0:
            known = sequence.tokens(0, sequence.num_known_tokens)
            draft = sequence.speculator.propose(known, sequence.num_pending_tokens)[:room]
        if not draft or not self._kv_cache.can_grow(sequence.seq_id, sequence.num_tokens + len(draft)):
            return ()
        self._kv_cache.grow(sequence.seq_id, sequence.num_tokens + len(draft))
        return tuple(draft)

    def _preempt(self, queued: _Queued) -> None:
        sequence = queued.sequence
        self.stats.num_preemptions += 1
        self._running.remove(queued)
        self._kv_cache.free(sequence.seq_id)
        sequence.num_computed_tokens = 0
        self._enqueue(queued)

    def _enqueue(self, queued: _Queued) -> None:
        self._encoder_cache.hold(queued.sequence.seq_id, [s.image.sha256 for s in queued.sequence.image_spans])
        insort(self._waiting, queued, key=_rank)

    def _schedule_waiting(self, scheduled: list[ScheduledSequence]) -> None:
        budget = self._limits.max_num_batched_tokens - sum(entry.num_rows for entry in scheduled)
        block_size = self._kv_cache.block_size
        under_way: set[bytes] = set()
        for entry in scheduled:
            under_way.update(entry.sequence.block_hashes[entry.start // block_size : entry.stop // block_size])
        for queued in list(self._waiting):
            if budget < 1 or len(self._running) >= self._limits.max_running:
                break
            sequence = queued.sequence
            start = self._kv_cache.num_cached_tokens(sequence)
            if next_block_hash(sequence.block_hashes, start, block_size) in under_way:
                continue  # computed for another one in this very step: in the next it is shared
            num_new = min(self._num_ready(sequence, start), budget)
            if num_new < 1:
                continue
            if not self._kv_cache.can_admit(sequence):
                break  # nobody behind may take the blocks it waits for
            sequence.num_computed_tokens = self._kv_cache.admit(sequence)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            self._waiting.remove(queued)
            self._running.append(queued)
            entry = _scheduled(sequence, num_new)
            under_way.update(sequence.block_hashes[entry.start // block_size : entry.stop // block_size])
            scheduled.append(entry)
            budget -= num_new
            self._pass_over(queued)

    def _pass_over(self, admitted: _Queued) -> None:
        for queued in self._waiting:
            queued.passed_over += queued.number < admitted.number
        self._waiting.sort(key=_rank)

    def _num_ready(self, sequence: Sequence, start: int) -> int:
        """Tokens from `start` on whose images have embeddings; 0 while the next image has none.

        And 0 for an answer that ends with a token not known yet.
        """
        if sequence.num_tokens_left < 1:
            return 0
        needed = sequence.images_needed(start)
        missing = [span for span in needed if span.image.sha256 not in self._encoder_cache]
        if not missing:
            return sequence.num_tokens - start
        return 0 if missing[0] is needed[0] else missing[0].start - start

    def _schedule_vision(self) -> VisionSlice | None:
        encoding = self._encoding
        if encoding is not None and not any(self._encoder_cache.holders(i.sha256) for i in encoding.images):
            encoding = None  # all who wanted them are gone
        if encoding is None:
            images = self._images_to_encode()
            if not images:
                self._encoding = None
                return None
            encoding = _Encoding(images)
            self.stats.num_tower_calls += 1
        num_patches = sum(image.plan.num_patches for image in encoding.images)
        num_layers = self._limits.num_vision_layers
        first = encoding.next_layer
        encoding.next_layer = min(
            num_layers, first + max(1, self._limits.max_num_batched_patches * num_layers // num_patches)
        )
        is_complete = encoding.next_layer == num_layers
        self._encoding = None if is_complete else encoding
        return VisionSlice(encoding.images, first, encoding.next_layer, is_complete)

    def _images_to_encode(self) -> tuple[ProcessedImage, ...]:
        """Of the sequences that are next; the first image always, more as far as they fit."""
        images: dict[str, ProcessedImage] = {}
        limits, num_patches = self._limits, 0
        room = max(self._encoder_cache.capacity, limits.embed_bytes_per_call) - self._encoder_cache.num_held_bytes
        for image in self._missing_images():
            if image.sha256 in images:
                continue
            num_patches += image.plan.num_patches
            room -= image.plan.num_tokens * limits.embed_bytes_per_token
            if images and (num_patches > limits.max_image_patches or room < 0):
                break
            images[image.sha256] = image
        return tuple(images.values())

    def _missing_images(self) -> Iterator[ProcessedImage]:
        for queued in sorted(self._running, key=_rank):
            yield from self._missing_of(queued.sequence, queued.sequence.num_computed_tokens)
        for queued in self._waiting[: self._limits.max_running]:
            yield from self._missing_of(queued.sequence, self._kv_cache.num_cached_tokens(queued.sequence))

    def _missing_of(self, sequence: Sequence, start: int) -> Iterator[ProcessedImage]:
        for span in sequence.images_needed(start):
            if span.image.sha256 not in self._encoder_cache:
                yield span.image


def _scheduled(sequence: Sequence, num_new_tokens: int, draft: tuple[int, ...] = ()) -> ScheduledSequence:
    start = sequence.num_computed_tokens
    is_complete = start + num_new_tokens == sequence.num_tokens
    return ScheduledSequence(sequence, start, num_new_tokens, is_complete, draft)


def _rank(queued: _Queued) -> tuple[float, int]:
    return queued.rank
