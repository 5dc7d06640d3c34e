"""The engine as it would answer here, watched: one conversation stage by stage, then the canaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from wemm.config import EngineConfig, ModelConfig
from wemm.doctor.canaries import CANARIES, conversation
from wemm.doctor.check import FAIL, Check
from wemm.doctor.stages import Ranges, Recording, observed
from wemm.engine.llm import LLM
from wemm.errors import CheckpointError, EngineError, InsufficientMemoryError, WemmError
from wemm.processing.chat_template import Message
from wemm.progress import ProgressBar
from wemm.request import SamplingParams

_MAX_ANSWER = 16


@dataclass(frozen=True)
class EngineRun:
    """What the engine did with one conversation."""

    token_ids: tuple[int, ...]
    recording: Recording
    ranges: Ranges
    error: EngineError | None
    answers: Sequence[str]
    """To the canaries, if they were asked."""


def run_engine(
    config: EngineConfig,
    messages: Sequence[Message],
    max_tokens: int,
    canaries_for: ModelConfig | None,
    progress: ProgressBar,
) -> EngineRun | Check:
    """Answer `messages` greedily with the kernels and dtype of `config`, watching every stage.

    Asks the canaries too if told for which model. A failed Check if the engine does not come up.
    Raises ParameterError, DeviceError, PromptError.
    """
    # Nothing may come from a cache, and drafts would mix in rows of tokens that are not in the answer.
    plain = replace(
        config,
        enable_prefix_caching=False,
        image_cache_memory=0,
        num_speculative_tokens=0,
        enforce_eager=True,  # a replayed step passes no module that could be watched
        max_num_seqs=min(config.max_num_seqs, len(CANARIES)),
    )
    try:
        with LLM(progress=progress, **vars(plain)) as llm:
            run = _watch(llm, messages, max_tokens)
            if canaries_for is None or run.error is not None:
                return run
            return replace(run, answers=_answers(llm, canaries_for, progress))
    except (CheckpointError, InsufficientMemoryError) as error:
        return Check("engine", FAIL, str(error), str(error))
    except WemmError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever keeps the engine from running is a finding
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        cause = f"the engine does not run here ({reason}): install the package again, or try --device cpu"
        return Check("engine", FAIL, reason, cause)


def _watch(llm: LLM, messages: Sequence[Message], max_tokens: int) -> EngineRun:
    recording, ranges, error = Recording(), Ranges(), None
    token_ids: tuple[int, ...] = ()
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, repetition_guard=False)
    with observed(llm.model, recording.take, ranges):
        try:
            for output in llm.stream_chat(messages, params):
                token_ids = tuple(output.outputs[0].token_ids)
        except EngineError as refused:
            error = refused
    return EngineRun(token_ids, recording, ranges, error, ())


def _answers(llm: LLM, config: ModelConfig, progress: ProgressBar) -> list[str]:
    conversations = [conversation(canary, config) for canary in CANARIES]
    params = SamplingParams(max_tokens=_MAX_ANSWER, temperature=0.0)
    try:
        outputs = llm.chat(conversations, params, progress)
    except EngineError as error:
        return [str(error)] * len(CANARIES)
    return [output.outputs[0].text.strip() for output in outputs]
