"""The engine: requests in, `step()` until they are done, outputs out."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from wemm.engine.decode import decode_batch
from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.model_runner import ModelRunner
from wemm.engine.output import Answer
from wemm.engine.prefill import prefill_batch
from wemm.engine.sampler import SampledToken, sample
from wemm.engine.scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from wemm.engine.sequence import Request, Sequence
from wemm.errors import WemmError
from wemm.model.batch import Batch
from wemm.processing.tokenizer import Tokenizer
from wemm.request import CompletionOutput, Logprob, RequestOutput


@dataclass(eq=False)
class _Progress:
    """A request under way."""

    request: Request
    sequences: list[Sequence]
    error: WemmError | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or all(s.answer.finish_reason for s in self.sequences)


class Engine:
    """Computes requests in steps. Single-threaded: one caller at a time."""

    def __init__(
        self,
        model_runner: ModelRunner,
        tokenizer: Tokenizer,
        kv_cache: KVCacheManager,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._model_runner = model_runner
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._kv_cache = kv_cache
        self._encoder_cache = EncoderCache()
        self._scheduler = Scheduler(kv_cache, self._encoder_cache, max_num_seqs, max_num_batched_tokens)
        self._requests: dict[str, _Progress] = {}

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def add_request(self, request: Request) -> None:
        """Queue a request: one sequence per answer asked for."""
        room = self._max_model_len - len(request.prompt.token_ids)
        max_tokens = min(request.sampling_params.max_tokens, room)
        sequences = []
        for index in range(request.sampling_params.n):
            # torch's CPU generator looks at 32 bits of a seed; this one at 128.
            generator = np.random.Generator(np.random.Philox(key=request.seed + (index << 64)))
            answer = Answer(self._tokenizer, request.sampling_params, max_tokens)
            sequences.append(Sequence(f"{request.request_id}#{index}", request, index, generator, answer))
        self._requests[request.request_id] = _Progress(request, sequences)
        for sequence in sequences:
            self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it held; unknown ids are ignored."""
        progress = self._requests.pop(request_id, None)
        if progress is not None:
            for sequence in progress.sequences:
                self._scheduler.remove(sequence)

    def step(self) -> list[RequestOutput]:
        """Compute one batch; returns the new state of every request in it."""
        if not self._scheduler.has_work:
            return []
        step = self._scheduler.schedule()
        _record_queue(step)
        scheduled = self._encode_images(step)
        if scheduled:
            batch = self._prepare(step.is_prefill, scheduled)
            logits, errors = self._model_runner.forward(batch)
            tokens = sample(logits, [entry.sequence if entry.is_complete else None for entry in scheduled])
            for entry, token, error in zip(scheduled, tokens, errors, strict=True):
                self._update(entry, token, error)
        return self._outputs(step)

    def check_integrity(self) -> None:
        """Raises IntegrityError if blocks or images are lost or held for nobody."""
        self._kv_cache.check_integrity()
        self._encoder_cache.check_integrity()
        if not self._requests:
            self._kv_cache.check_idle()
            self._encoder_cache.check_idle()

    def _encode_images(self, step: SchedulerOutput) -> tuple[ScheduledSequence, ...]:
        """Encode the step's images; returns the sequences all of whose images have embeddings."""
        if not step.images:
            return step.scheduled
        started = time.perf_counter()
        failed: dict[str, WemmError] = {}
        results = self._model_runner.encode_images(step.images)
        for image, result in zip(step.images, results, strict=True):
            if isinstance(result, WemmError):
                failed[image.sha256] = result
            else:
                self._encoder_cache.store(image.sha256, result)
        seconds = time.perf_counter() - started
        encoded = {image.sha256 for image in step.images}
        remaining = []
        for entry in step.scheduled:
            hashes = [span.image.sha256 for span in entry.sequence.image_spans]
            errors = [failed[sha256] for sha256 in hashes if sha256 in failed]
            if encoded.intersection(hashes):
                entry.sequence.request.metrics.vision = seconds
            if errors:
                self._fail(entry.sequence, errors[0])
            else:
                remaining.append(entry)
        return tuple(remaining)

    def _prepare(self, is_prefill: bool, scheduled: tuple[ScheduledSequence, ...]) -> Batch:
        device = self._model_runner.device
        if is_prefill:
            return prefill_batch(scheduled, self._kv_cache, self._encoder_cache, device)
        return decode_batch(scheduled, self._kv_cache, device)

    def _update(self, entry: ScheduledSequence, token: SampledToken | None, error: WemmError | None) -> None:
        sequence = entry.sequence
        if error is not None:
            self._fail(sequence, error)
            return
        sequence.num_computed_tokens = entry.stop
        if token is None:
            return
        sequence.output_token_ids.append(token.token_id)
        sequence.cumulative_logprob += token.logprob
        if sequence.params.logprobs is not None:
            sequence.logprobs.append(self._logprobs(token))
        sequence.answer.push(token.token_id)
        _record_token(sequence.request)
        if sequence.answer.finish_reason:
            self._scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, error: WemmError) -> None:
        progress = self._requests[sequence.request.request_id]
        progress.error = error
        for other in progress.sequences:
            self._scheduler.remove(other)

    def _logprobs(self, token: SampledToken) -> dict[int, Logprob]:
        entries = {token_id: (value, rank) for rank, (token_id, value) in enumerate(token.top, start=1)}
        entries.setdefault(token.token_id, (token.logprob, token.rank))
        return {
            token_id: Logprob(value, rank, self._tokenizer.token_text(token_id))
            for token_id, (value, rank) in entries.items()
        }

    def _outputs(self, step: SchedulerOutput) -> list[RequestOutput]:
        request_ids = dict.fromkeys(entry.sequence.request.request_id for entry in step.scheduled)
        outputs = []
        for request_id in request_ids:
            progress = self._requests[request_id]
            outputs.append(_request_output(progress))
            if progress.finished:
                del self._requests[request_id]
        return outputs


def _record_queue(step: SchedulerOutput) -> None:
    now = time.perf_counter()
    for entry in step.scheduled:
        request = entry.sequence.request
        if not request.metrics.queue:
            request.metrics.queue = now - request.arrival_time - request.metrics.processing


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
