"""LLM: the offline door. Prompts in, answers out, in the order they were given."""

from __future__ import annotations

import difflib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from wemm.config import EngineConfig
from wemm.engine.build import BuiltEngine, build_engine
from wemm.engine.sequence import Request
from wemm.errors import EngineError, ParameterError, PromptError
from wemm.processing.chat_template import Message
from wemm.processing.processor import ProcessedPrompt
from wemm.progress import ProgressBar, silent
from wemm.request import RequestMetrics, RequestOutput, SamplingParams

Prompt = str | Sequence[int]
"""Raw text, or token ids."""
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A loaded model that answers.

        with LLM("path/to/WeMM-Chat-2k-CN") as llm:
            [output] = llm.chat([{"role": "user", "content": [
                {"type": "image", "image": "cat.jpg"},
                {"type": "text", "text": "图中有什么？"}]}], SamplingParams(max_tokens=64))
            print(output.outputs[0].text)

    Options are the fields of `wemm.config.EngineConfig`. Raises ClientError for whatever the caller
    can mend: ModelNotFoundError, CheckpointError, DeviceError, InsufficientMemoryError, ParameterError.
    """

    def __init__(self, model: str | Path, *, progress: ProgressBar = silent, **options: Any) -> None:
        known = EngineConfig.help()
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
                raise ParameterError(f"unknown option {name!r}{hint}")
        self.config = EngineConfig(model=str(model), **options)
        self._built: BuiltEngine | None = build_engine(self.config, progress)
        self._num_requests = 0
        self._mailboxes: dict[str, deque[RequestOutput]] = {}

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        progress: ProgressBar = silent,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of conversations.

        A message is {"role": "system" | "user" | "assistant", "content": TEXT or list of parts}; a part is
        {"type": "text", "text": …}, {"type": "image", "image": path, bytes or PIL image} or
        {"type": "image_url", "image_url": {"url": "data:…"}}. Without `sampling_params`, the checkpoint's
        generation_config.json decides, greedy if it says nothing. Raises PromptError, MediaError, NumericalError.
        """
        processor = self._open.processor
        conversations = [messages] if _is_conversation(messages) else messages
        return self._run(conversations, processor.chat, sampling_params, progress)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        progress: ProgressBar = silent,
    ) -> list[RequestOutput]:
        """Continue raw text (BOS is prepended, no template) or token ids, one prompt or a list."""
        processor = self._open.processor

        def process(prompt: Any) -> ProcessedPrompt:
            return processor.text(prompt) if isinstance(prompt, str) else processor.token_ids(prompt)

        is_token_ids = isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)
        is_single = isinstance(prompts, str) or is_token_ids
        return self._run([prompts] if is_single else prompts, process, sampling_params, progress)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one conversation; yields its state after every token, the last one `finished`."""
        request = self._request(messages, self._open.processor.chat, sampling_params)
        mailbox = self._submit(request)
        try:
            while True:
                while mailbox:
                    output = _checked(mailbox.popleft())
                    yield output
                    if output.finished:
                        return
                self._step()
        finally:
            self._forget(request.request_id)

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What an absent `sampling_params` means for this checkpoint."""
        return self._open.default_sampling_params

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self._open.memory_plan.max_model_len

    def close(self) -> None:
        """Release weights and caches; further calls raise EngineError."""
        self._built = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open(self) -> BuiltEngine:
        if self._built is None:
            raise EngineError("this LLM is closed")
        return self._built

    def _run(
        self,
        prompts: Any,
        process: Callable[[Any], ProcessedPrompt],
        sampling_params: Params,
        progress: ProgressBar,
    ) -> list[RequestOutput]:
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise PromptError(f"give one prompt or a list of them. Given: {type(prompts).__name__}")
        params = _per_prompt(sampling_params, len(prompts))
        waiting = iter(zip(prompts, params, strict=True))
        finished: dict[str, RequestOutput] = {}
        order: list[str] = []
        running: dict[str, deque[RequestOutput]] = {}
        with progress("answering", len(prompts), "answers") as advance:
            try:
                while len(finished) < len(prompts):
                    # Prompts are processed as the engine drains, so that a long list of images is
                    # never held as pixels all at once.
                    while len(running) < self.config.max_num_seqs and len(order) < len(prompts):
                        prompt, prompt_params = next(waiting)
                        request = self._request(prompt, process, prompt_params)
                        order.append(request.request_id)
                        running[request.request_id] = self._submit(request)
                    self._step()
                    for request_id in [i for i, mailbox in running.items() if mailbox and mailbox[-1].finished]:
                        finished[request_id] = _checked(running.pop(request_id)[-1])
                        advance(1)
            finally:
                for request_id in order:
                    self._forget(request_id)
        return [finished[request_id] for request_id in order]

    def _submit(self, request: Request) -> deque[RequestOutput]:
        """Hand a request to the engine; its states arrive in the returned mailbox."""
        self._open.engine.add_request(request)
        return self._mailboxes.setdefault(request.request_id, deque())

    def _step(self) -> None:
        """One engine step for everyone under way."""
        for output in self._open.engine.step():
            self._mailboxes[output.request_id].append(output)

    def _forget(self, request_id: str) -> None:
        self._mailboxes.pop(request_id, None)
        if self._built is not None:
            self._built.engine.abort(request_id)

    def _request(
        self, prompt: Any, process: Callable[[Any], ProcessedPrompt], params: SamplingParams | None
    ) -> Request:
        arrival_time = time.perf_counter()
        params = params or self._open.default_sampling_params
        _check_stop_token_ids(params, self._open.source.config.text.vocab_size)
        processed = process(prompt)
        self._num_requests += 1
        seed = params.seed if params.seed is not None else self.config.seed * 2**32 + self._num_requests
        return Request(
            request_id=f"request-{self._num_requests}",
            prompt=processed,
            sampling_params=params,
            seed=seed,
            arrival_time=arrival_time,
            metrics=RequestMetrics(processing=time.perf_counter() - arrival_time),
        )


def _checked(output: RequestOutput) -> RequestOutput:
    if output.error is not None:
        raise output.error
    return output


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], Mapping)


def _per_prompt(params: Params, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ParameterError(f"{len(params)} sampling_params for {count} prompts; give one, or one per prompt")
    return list(params)


def _check_stop_token_ids(params: SamplingParams, vocab_size: int) -> None:
    for token_id in params.stop_token_ids or ():
        if not 0 <= token_id < vocab_size:
            raise ParameterError(f"stop_token_ids must be in [0, {vocab_size}). Given: {token_id}")
