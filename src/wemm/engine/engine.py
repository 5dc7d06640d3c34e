"""The engine: requests in, `step()` until they are done, outputs out.

Where a device computes beside the CPU, a step is scheduled and launched while the one before is computed: tokens
drawn there go into it on the device, and are known here when the next step is under way. Sequences that end with
them are computed once more in vain. A step whose tokens decide what follows (drafts, grammars) is waited for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.model_input import model_input
from wemm.engine.model_runner import Runner, numerical_error
from wemm.engine.output import Answer
from wemm.engine.sampler import Draws, SampledToken, SamplingRow, sample
from wemm.engine.scheduler import Limits, ScheduledSequence, Scheduler, VisionSlice
from wemm.engine.sequence import Request, Sequence
from wemm.engine.speculation import Speculator
from wemm.errors import EngineError, RankError, RequestTimeoutError, StepError, StructuredOutputError, WemmError
from wemm.model.wemm import WemmModel
from wemm.platforms.transfer import HostCopy
from wemm.processing.tokenizer import Tokenizer
from wemm.request import CompletionOutput, Logprob, RequestOutput

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Progress:
    """A request under way."""

    request: Request
    sequences: list[Sequence]
    error: WemmError | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or all(s.answer.finish_reason for s in self.sequences)


@dataclass(frozen=True)
class _Launched:
    """A step in the hands of the device."""

    scheduled: tuple[ScheduledSequence, ...]
    draws: Draws
    is_finite: HostCopy
    first_draws: dict[str, int]
    """Of its complete sequences, by id: which of the draws is the token behind the last known one."""

    @property
    def decides_what_follows(self) -> bool:
        return any(entry.decides_what_follows for entry in self.scheduled)


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now, and counts since its start."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_steps: int
    num_computed_tokens: int
    """Rows of the language model, drafts included."""
    num_computed_image_tokens: int
    """Those that came from images."""
    num_prefix_tokens: int
    """Tokens of sequences given blocks."""
    num_prefix_cached_tokens: int
    """Those of them that needed no computing."""
    num_image_queries: int
    """Images that answers needed."""
    num_encoded_images: int
    """Images that went through the vision tower; the other queries were cache hits."""
    num_tower_calls: int
    image_cache_bytes: int
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int
    """Draft tokens that came true."""
    seconds_awaiting_device: float
    """In which there was nothing to do here before the tokens of a step were known."""


class Engine:
    """Computes requests in steps. Single-threaded: one caller at a time."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        kv_cache: KVCacheManager,
        encoder_cache: EncoderCache,
        limits: Limits,
        max_model_len: int,
        num_speculative_tokens: int,
        async_scheduling: bool,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._kv_cache = kv_cache
        self._encoder_cache = encoder_cache
        self._embed_bytes_per_token = limits.embed_bytes_per_token
        self._max_model_len = max_model_len
        self._num_speculative_tokens = num_speculative_tokens
        self._async_scheduling = async_scheduling
        self._launched: _Launched | None = None
        self._scheduler = Scheduler(kv_cache, encoder_cache, limits)
        self._requests: dict[str, _Progress] = {}
        self._changed: dict[str, _Progress] = {}
        self._num_steps = 0
        self._num_computed_tokens = 0
        self._num_computed_image_tokens = 0
        self._seconds_awaiting_device = 0.0

    @property
    def model(self) -> WemmModel:
        """Rank 0's."""
        return self._runner.model

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    @property
    def stats(self) -> EngineStats:
        """Sizes now, counts since the start."""
        scheduler, prefix, images = self._scheduler, self._kv_cache.stats, self._encoder_cache.stats
        return EngineStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_blocks=self._kv_cache.num_blocks,
            num_free_blocks=self._kv_cache.num_free_blocks,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_computed_image_tokens=self._num_computed_image_tokens,
            num_prefix_tokens=prefix.num_tokens,
            num_prefix_cached_tokens=prefix.num_cached_tokens,
            num_image_queries=images.num_queries,
            num_encoded_images=images.num_encoded,
            num_tower_calls=scheduler.stats.num_tower_calls,
            image_cache_bytes=self._encoder_cache.num_bytes,
            num_preemptions=scheduler.stats.num_preemptions,
            num_draft_tokens=scheduler.stats.num_draft_tokens,
            num_accepted_tokens=scheduler.stats.num_accepted_tokens,
            seconds_awaiting_device=self._seconds_awaiting_device,
        )

    def add_request(self, request: Request) -> None:
        """Queue a request: one sequence per answer asked for."""
        room = self._max_model_len - len(request.prompt.token_ids)
        max_tokens = min(request.sampling_params.max_tokens, room)
        sequences = [
            Sequence(
                f"{request.request_id}#{index}",
                request,
                index,
                Answer(self._tokenizer, request.sampling_params, max_tokens),
                # A grammar is walked one token at a time.
                Speculator(0 if request.grammar else self._num_speculative_tokens),
                request.grammar.walk() if request.grammar else None,
            )
            for index in range(request.sampling_params.n)
        ]
        self._requests[request.request_id] = _Progress(request, sequences)
        for sequence in sequences:
            self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it held; unknown ids are ignored."""
        progress = self._requests.pop(request_id, None)
        self._changed.pop(request_id, None)
        if progress is not None:
            for sequence in progress.sequences:
                self._scheduler.remove(sequence)

    def step(self) -> list[RequestOutput]:
        """Launch one batch; returns the new state of every request that it, or the one before, brought forward."""
        self._give_up_late_requests()
        if self._launched is not None and self._launched.decides_what_follows:
            self._collect()
        if self._scheduler.has_work:
            plan = self._scheduler.schedule()
            self._num_steps += 1
            if plan.vision is not None:
                self._collect()  # an image takes longer than a token
                self._encode_images(plan.vision)
            launched = self._launch(tuple(entry for entry in plan.scheduled if self._is_wanted(entry.sequence)))
            self._collect()
            self._launched = launched
            if not self._async_scheduling:
                self._collect()
            self._runner.drop_images(self._encoder_cache.take_dropped())
        return self._outputs()

    def close(self) -> None:
        """Release other ranks. The engine cannot be used afterwards."""
        self._runner.close()

    def check_integrity(self) -> None:
        """Raises IntegrityError if blocks or images are lost or held for nobody."""
        self._kv_cache.check_integrity()
        self._encoder_cache.check_integrity()
        if not self._requests:
            self._kv_cache.check_idle()
            self._encoder_cache.check_idle()

    def _give_up_late_requests(self) -> None:
        now = time.perf_counter()
        for progress in list(self._requests.values()):
            request = progress.request
            if request.deadline is not None and now > request.deadline:
                seconds = request.deadline - request.arrival_time
                self._fail(progress, RequestTimeoutError(f"no complete answer within {seconds:g} s"))

    def _is_wanted(self, sequence: Sequence) -> bool:
        progress = self._requests.get(sequence.request.request_id)
        is_ours = progress is not None and progress.request is sequence.request and progress.error is None
        return is_ours and sequence.answer.finish_reason is None

    def _encode_images(self, vision: VisionSlice) -> None:
        holders = {image.sha256: self._holders(image.sha256) for image in vision.images}
        waiting = {p.request.request_id: p for progresses in holders.values() for p in progresses}
        for progress in waiting.values():
            _record_queue(progress.request)
        started = time.perf_counter()
        errors: Iterable[WemmError | None]
        try:
            errors = self._runner.encode(vision)
        except RankError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, only the requests of these images fail
            self._scheduler.cancel_encoding()
            errors = [_step_error("vision encoding", error)] * len(vision.images)
        for progress in waiting.values():
            progress.request.metrics.vision += time.perf_counter() - started
        for image, failure in zip(vision.images, errors, strict=False):  # no results before the last layer
            if failure is None:
                num_bytes = image.plan.num_tokens * self._embed_bytes_per_token
                self._encoder_cache.store(image.sha256, num_bytes)
            else:
                for progress in holders[image.sha256]:
                    self._fail(progress, failure)

    def _holders(self, sha256: str) -> list[_Progress]:
        request_ids = dict.fromkeys(seq_id.rsplit("#", 1)[0] for seq_id in self._encoder_cache.holders(sha256))
        return [self._requests[request_id] for request_id in request_ids]

    def _launch(self, scheduled: tuple[ScheduledSequence, ...]) -> _Launched | None:
        """Nothing here waits for the device."""
        if not scheduled:
            return None
        for entry in scheduled:
            _record_queue(entry.sequence.request)
        before = self._launched
        drawn, first_draws = (before.draws.token_ids, before.first_draws) if before else (None, {})
        try:
            inputs = model_input(scheduled, self._kv_cache, first_draws)
            forwarded = self._runner.forward(inputs, drawn)
            rows: list[SamplingRow] = []
            next_draws: dict[str, int] = {}
            for entry in scheduled:
                if entry.is_complete:
                    next_draws[entry.sequence.seq_id] = len(rows)
                    rows += _sampling_rows(entry, drawn, first_draws)
            launched = _Launched(
                scheduled, sample(forwarded.logits, rows), HostCopy(forwarded.is_finite), next_draws
            )
        except RankError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, only the requests of this step fail
            self._fail_step(scheduled, error)
            return None
        self._num_computed_tokens += len(inputs.input_ids)
        self._num_computed_image_tokens += len(inputs.image_rows)
        for entry in scheduled:
            self._scheduler.advance(entry)
        return launched

    def _collect(self) -> None:
        """Wait for the step that was launched, and take its tokens."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        started = time.perf_counter()
        try:
            tokens, is_finite = launched.draws.fetch(), launched.is_finite.wait().tolist()
        except Exception as error:  # noqa: BLE001 - here a device says what went wrong in a step
            self._fail_step(launched.scheduled, error)
            return
        finally:
            self._seconds_awaiting_device += time.perf_counter() - started
        results = iter(zip(tokens, is_finite, strict=True))
        for entry in launched.scheduled:
            if not entry.is_complete:
                continue
            drawn = [next(results) for _ in range(1 + len(entry.draft_token_ids))]
            if self._is_wanted(entry.sequence):  # it may have ended, or failed with another answer, meanwhile
                self._take(entry, drawn)

    def _fail_step(self, scheduled: Iterable[ScheduledSequence], error: Exception) -> None:
        failure = _step_error("step", error)
        for entry in scheduled:
            if self._is_wanted(entry.sequence):
                self._fail(self._requests[entry.sequence.request.request_id], failure)

    def _take(self, entry: ScheduledSequence, drawn: Iterable[tuple[SampledToken, list[bool]]]) -> None:
        """Take the token behind a sequence, and those behind its drafts as far as these were right."""
        sequence = entry.sequence
        sequence.num_pending_tokens -= 1
        progress = self._requests[sequence.request.request_id]
        num_accepted = -1
        for (token, is_finite), guess in zip(drawn, (*entry.draft_token_ids, None), strict=True):
            if not all(is_finite):
                stage = "logits" if is_finite[0] else "language_model"
                self._fail(progress, numerical_error(stage, self._runner.dtype))
                return
            try:
                self._append(sequence, token)
            except StructuredOutputError as failure:
                self._fail(progress, failure)
                return
            num_accepted += 1
            if token.token_id != guess or sequence.answer.finish_reason:
                break
        if entry.draft_token_ids:
            self._scheduler.accept_drafts(entry, num_accepted)
        if sequence.answer.finish_reason:
            self._scheduler.remove(sequence)
        self._changed[sequence.request.request_id] = progress

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        sequence.output_token_ids.append(token.token_id)
        sequence.cumulative_logprob += token.logprob
        if sequence.params.logprobs is not None:
            sequence.logprobs.append(self._logprobs(token))
        sequence.answer.push(sequence.output_token_ids)
        if sequence.grammar is not None and sequence.answer.finish_reason is None:
            sequence.grammar.accept(token.token_id)
        _record_token(sequence.request)

    def _fail(self, progress: _Progress, error: WemmError) -> None:
        if progress.error is None:
            progress.error = error
            self._changed[progress.request.request_id] = progress
            for sequence in progress.sequences:
                self._kv_cache.unpublish(sequence.seq_id)
                self._scheduler.remove(sequence)

    def _logprobs(self, token: SampledToken) -> dict[int, Logprob]:
        entries = {token_id: (value, rank) for rank, (token_id, value) in enumerate(token.top, start=1)}
        entries.setdefault(token.token_id, (token.logprob, token.rank))
        return {
            token_id: Logprob(value, rank, self._tokenizer.token_text(token_id))
            for token_id, (value, rank) in entries.items()
        }

    def _outputs(self) -> list[RequestOutput]:
        outputs = [_request_output(progress) for progress in self._changed.values()]
        self._changed.clear()
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs


def _sampling_rows(
    entry: ScheduledSequence, drawn: torch.Tensor | None, draws: dict[str, int]
) -> list[SamplingRow]:
    sequence, draft = entry.sequence, list(entry.draft_token_ids)
    pending = None
    if sequence.num_pending_tokens and drawn is not None:
        at = draws[sequence.seq_id]
        pending = drawn[at : at + 1]
    return [
        SamplingRow(
            params=sequence.params,
            seed=sequence.request.seed,
            index=sequence.index,
            prompt_token_ids=sequence.request.prompt.token_ids,
            output_token_ids=[*sequence.output_token_ids, *draft[:i]] if draft else sequence.output_token_ids,
            pending_token_id=pending,
            end_token_ids=sequence.answer.end_token_ids,
            allowed=sequence.grammar.allowed() if sequence.grammar else None,
        )
        for i in range(1 + len(draft))
    ]


def _step_error(what: str, error: Exception) -> EngineError:
    logger.error("%s failed", what, exc_info=error)
    return error if isinstance(error, EngineError) else StepError(f"{what} failed: {error!r}")


def _record_queue(request: Request) -> None:
    if not request.metrics.queue:
        request.metrics.queue = time.perf_counter() - request.arrival_time - request.metrics.processing


def _record_token(request: Request) -> None:
    metrics, elapsed = request.metrics, time.perf_counter() - request.arrival_time
    if not metrics.first_token:
        metrics.first_token = elapsed
        metrics.prefill = elapsed - metrics.processing - metrics.queue - metrics.vision
    metrics.total = elapsed
    metrics.decode = elapsed - metrics.first_token


def _request_output(progress: _Progress) -> RequestOutput:
    request = progress.request
    return RequestOutput(
        request_id=request.request_id,
        prompt_token_ids=request.prompt.token_ids,
        outputs=tuple(_completion(sequence) for sequence in progress.sequences),
        finished=progress.finished,
        num_image_tokens=request.prompt.num_image_tokens,
        num_cached_tokens=progress.sequences[0].num_cached_tokens or 0,
        metrics=request.metrics,
        error=progress.error,
    )


def _completion(sequence: Sequence) -> CompletionOutput:
    wanted = sequence.params.logprobs is not None
    return CompletionOutput(
        index=sequence.index,
        text=sequence.answer.text,
        token_ids=tuple(sequence.output_token_ids),
        cumulative_logprob=sequence.cumulative_logprob if wanted else None,
        logprobs=tuple(sequence.logprobs) if wanted else None,
        finish_reason=sequence.answer.finish_reason,
        stop_reason=sequence.answer.stop_reason,
    )
