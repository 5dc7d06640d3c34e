"""LLM: the offline door. Prompts in, answers out, in the order they were given."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice, repeat
from pathlib import Path
from types import TracebackType
from typing import Any

from wemm.config import EngineConfig, engine_config
from wemm.engine.beam_search import Complete, beam_search
from wemm.engine.build import BuiltEngine, build_engine
from wemm.engine.engine import EngineStats
from wemm.engine.intake import Intake, Process, process_text_or_ids
from wemm.engine.sequence import Request
from wemm.engine.structured import GrammarCompiler
from wemm.errors import EngineError, ParameterError, PromptError, WemmError
from wemm.model.wemm import WemmModel
from wemm.processing.chat_template import Message
from wemm.processing.processor import ProcessedPrompt
from wemm.progress import Advance, ProgressBar, silent
from wemm.request import BeamSearchParams, RequestOutput, SamplingParams

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
        self.config: EngineConfig = engine_config(model, options)
        self._built: BuiltEngine | None = build_engine(self.config, progress)
        vocab_size = self._built.source.config.text.vocab_size
        grammars = GrammarCompiler(self._built.tokenizer, vocab_size)
        self._intake = Intake(self._built.default_sampling_params, grammars, self.config.seed)
        self._mailboxes: dict[str, deque[RequestOutput]] = {}

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        progress: ProgressBar = silent,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of conversations.

        A message is {"role": "system" | "user" | "assistant", "content": TEXT or list of parts}; a part is
        {"type": "text", "text": …}, {"type": "image", "image": path, bytes or PIL image} or
        {"type": "image_url", "image_url": {"url": "data:…"}}. Without `sampling_params`, the checkpoint's
        generation_config.json decides, greedy if it says nothing. Beside streams under way, requests of
        smaller `priority` go first. `timeout` are seconds that each may take. Raises PromptError, MediaError,
        RequestTimeoutError, NumericalError.
        """
        conversations = [messages] if _is_conversation(messages) else messages
        process = self._open.processor.chat
        return self._run(conversations, process, sampling_params, progress, priority, timeout)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        progress: ProgressBar = silent,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Continue raw text (BOS is prepended, no template) or token ids, one prompt or a list."""
        process = process_text_or_ids(self._open.processor)
        is_token_ids = isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)
        is_single = isinstance(prompts, str) or is_token_ids
        return self._run(
            [prompts] if is_single else prompts, process, sampling_params, progress, priority, timeout
        )

    def chat_as_completed(
        self,
        conversations: Iterable[Sequence[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Answer any number of conversations, taken as they are needed; yields (place, output) as each is done.

        A request that fails harms no other: its output's `error` says why, whether the prompt was refused
        or the engine gave it up. Raises RankError.
        """
        is_one = sampling_params is None or isinstance(sampling_params, SamplingParams)
        params: Any = repeat(sampling_params) if is_one else sampling_params
        # Not strict: to end with the shorter is what `repeat` is for.
        prompts = zip(conversations, params, strict=False)
        return self._as_completed(prompts, self._open.processor.chat, priority, timeout)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one conversation; yields its state after every token, the last one `finished`."""
        request = self._intake.submit(messages, self._open.processor.chat, sampling_params).result()
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

    def beam_search(
        self, messages: Sequence[Message], params: BeamSearchParams, progress: ProgressBar = silent
    ) -> RequestOutput:
        """The most probable answers to one conversation that `beam_width` beams find, best first."""
        built = self._open
        prompt = built.processor.chat(messages)
        max_tokens = min(params.max_tokens, self.max_model_len - len(prompt.token_ids))

        def complete(prompts: Sequence[ProcessedPrompt], one: SamplingParams) -> list[RequestOutput]:
            return self._run(prompts, lambda ready: ready, one, silent, priority=0, timeout=None)

        with progress("searching", max_tokens, "tokens") as advance:
            outputs = beam_search(prompt, params, max_tokens, built.tokenizer, _counted(complete, advance))
        return RequestOutput("beam-search", prompt.token_ids, outputs, True, prompt.num_image_tokens)

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What an absent `sampling_params` means for this checkpoint."""
        return self._open.default_sampling_params

    @property
    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        return self._open.engine.stats

    @property
    def model(self) -> WemmModel:
        """The network, of rank 0, to be watched by hooks; what it holds belongs to the engine."""
        return self._open.engine.model

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self._open.memory_plan.max_model_len

    def close(self) -> None:
        """Release weights, caches and other ranks; further calls raise EngineError."""
        built, self._built = self._built, None
        if built is not None:
            self._intake.close()
            built.engine.close()

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
        process: Process,
        sampling_params: Params,
        progress: ProgressBar,
        priority: int,
        timeout: float | None,
    ) -> list[RequestOutput]:
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise PromptError(f"give one prompt or a list of them. Given: {type(prompts).__name__}")
        params = _per_prompt(sampling_params, len(prompts))
        outputs: dict[int, RequestOutput] = {}
        completed = self._as_completed(zip(prompts, params, strict=True), process, priority, timeout)
        with progress("answering", len(prompts), "answers") as advance, contextlib.closing(completed):
            for place, output in completed:
                outputs[place] = _checked(output)
                advance(1)
        return [outputs[place] for place in range(len(prompts))]

    def _as_completed(
        self,
        prompts: Iterable[tuple[Any, SamplingParams | None]],
        process: Process,
        priority: int,
        timeout: float | None,
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """(place, final output) of every prompt, as each is done."""
        # Prompts are prepared a little ahead of the engine, never all: a long list of images must not be
        # held as pixels at once.
        waiting = enumerate(prompts)
        preparing: deque[tuple[int, Future[Request]]] = deque()
        running: dict[str, tuple[int, deque[RequestOutput]]] = {}
        try:
            while True:
                for place, (prompt, params) in islice(waiting, self._intake.lookahead - len(preparing)):
                    preparing.append((place, self._prepare(prompt, process, params, priority, timeout)))
                if not preparing and not running:
                    return
                while preparing and len(running) < self.config.max_num_seqs:
                    place, future = preparing[0]
                    if running and not future.done():
                        break
                    preparing.popleft()
                    try:
                        request = future.result()
                    except WemmError as error:
                        yield place, RequestOutput("", (), (), finished=True, error=error)
                    else:
                        running[request.request_id] = place, self._submit(request)
                self._step()
                for request_id in [i for i, (_, mailbox) in running.items() if mailbox and mailbox[-1].finished]:
                    place, mailbox = running.pop(request_id)
                    self._forget(request_id)
                    yield place, mailbox[-1]
        finally:
            for _, future in preparing:
                future.cancel()
            for request_id in running:
                self._forget(request_id)

    def _prepare(self, *prompt: Any) -> Future[Request]:
        """What `Intake.submit` takes → the request to come; parameters out of range fail it like a bad prompt."""
        try:
            return self._intake.submit(*prompt)
        except WemmError as error:
            refused: Future[Request] = Future()
            refused.set_exception(error)
            return refused

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


def _counted(complete: Complete, advance: Advance) -> Complete:
    def counted(prompts: Sequence[ProcessedPrompt], params: SamplingParams) -> list[RequestOutput]:
        advance(1)
        return complete(prompts, params)

    return counted


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
