"""The engine in this process as a chat model of lmms-eval. Imported by the harness only: it needs lmms_eval."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from wemm.batch.engine_client import EngineClient
from wemm.batch.question import Answer, Question
from wemm.engine.llm import LLM
from wemm.errors import ParameterError
from wemm.integrations import module_of
from wemm.integrations.lmms_eval import INSTALL
from wemm.processing.chat_template import Message
from wemm.progress import terminal_bar
from wemm.request import SamplingParams

lmms: Any = module_of("lmms-eval", "lmms_eval.api.model", INSTALL).lmms

FAILED = "[LMMS_EVAL_REQUEST_FAILED]"
"""Begins the answer to a request that could not be computed, as in the harness's own clients."""


class WeMM(lmms):  # type: ignore[misc]
    """`--model wemm --model_args model=/data/WeMM-Chat-2k-CN,max_num_seqs=64`.

    Further arguments are the fields of `wemm.config.EngineConfig`. The engine batches by `max_num_seqs`, so
    `--batch_size` changes nothing. Raises ClientError as `wemm.LLM` does.
    """

    is_simple = False

    def __init__(
        self,
        model: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = 1024,
        **options: Any,
    ) -> None:
        """`max_new_tokens` is for tasks that name no limit of their own."""
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ParameterError(
                "one process runs this model: start it without torchrun or accelerate, and share it by "
                f"tensor_parallel_size=2 in --model_args. Given: WORLD_SIZE={os.environ['WORLD_SIZE']}"
            )
        self.max_new_tokens = max_new_tokens
        self.llm = LLM(model, progress=terminal_bar, **options)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of `requests`. One that the engine refuses gets FAILED and the reason."""
        answers = [""] * len(requests)
        client = EngineClient(self.llm)
        with terminal_bar("answering", len(requests), "answers") as advance:
            for place, answer in client.answers(self._questions(requests)):
                answers[place] = _text(answer)
                advance(1)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: the engine reports log probabilities of tokens it draws, not of a given continuation."""
        raise NotImplementedError(
            "wemm reports log probabilities of the tokens it draws, not of a given continuation: "
            "choose the generate_until variant of this task"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: a task of several rounds asks by a protocol of its own."""
        raise NotImplementedError("wemm answers generate_until tasks only, not tasks of several rounds")

    def clean(self) -> None:
        """Called by the harness when all answers are there, before they are scored."""
        self.llm.close()
        super().clean()

    def _questions(self, requests: Sequence[Any]) -> Iterator[Question]:
        """Made one by one as the engine takes them: all the decoded images of a task would not fit in memory."""
        for request in requests:
            _, to_messages, generation_kwargs, document, task, split = request.args
            messages = [_message(message) for message in to_messages(self.task_dict[task][split][document])]
            yield Question(messages, sampling_params(generation_kwargs, self.max_new_tokens))


def _text(answer: Answer) -> str:
    return answer.text if answer.error is None else f"{FAILED} {answer.error}"


def _message(message: Mapping[str, Any]) -> Message:
    return {"role": message["role"], "content": [_part(part) for part in message["content"]]}


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part["type"] == "text":
        return part
    if part["type"] == "image":
        return {"type": "image", "image": part["url"]}
    raise NotImplementedError(f"wemm reads images and text; this task shows it {part['type']}")


def sampling_params(generation_kwargs: Mapping[str, Any] | None, max_new_tokens: int) -> SamplingParams:
    """What a task's `generation_kwargs` mean here; greedy unless it asks for sampling. Raises ParameterError.

    A blank `until` is dropped: the harness fills it in where a task says nothing, and it would end every answer
    of more than one paragraph.
    """
    given = dict(generation_kwargs or {})
    if (given.get("num_beams") or 1) > 1:
        raise ParameterError(f"this model does not search beams for a task. Given: num_beams={given['num_beams']}")
    until = given.get("until") or ()
    stop = [text for text in ([until] if isinstance(until, str) else until) if text.strip()]
    shares = {name: given[name] for name in ("top_p", "top_k") if given.get(name)}
    max_tokens = int(given.get("max_new_tokens") or max_new_tokens)
    return SamplingParams(temperature=_temperature(given), max_tokens=max_tokens, stop=stop, **shares)


def _temperature(given: Mapping[str, Any]) -> float:
    if given.get("do_sample") is False:
        return 0.0
    unsaid = 1.0 if given.get("do_sample") else 0.0
    temperature = given.get("temperature")
    return unsaid if temperature is None else float(temperature)
