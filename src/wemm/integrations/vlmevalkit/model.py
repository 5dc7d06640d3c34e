"""WeMM as a model of VLMEvalKit. Imported when registered: it needs vlmeval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wemm.batch.endpoint_client import EndpointClient
from wemm.batch.engine_client import EngineClient
from wemm.batch.question import Client, Question
from wemm.engine.llm import LLM
from wemm.errors import ParameterError
from wemm.integrations import module_of
from wemm.integrations.vlmevalkit import INSTALL
from wemm.integrations.vlmevalkit.prompts import MULTIPLE_CHOICE, SUFFIXES, multiple_choice
from wemm.progress import terminal_bar
from wemm.request import SamplingParams

BaseModel: Any = module_of("VLMEvalKit", "vlmeval.vlm.base", INSTALL).BaseModel
DATASET_TYPE: Any = module_of("VLMEvalKit", "vlmeval.dataset", INSTALL).DATASET_TYPE
FAILED = "Failed to obtain answer via API."
"""Begins an answer that the kit counts as failed and asks for again with --reuse."""

Part = Mapping[str, str]
"""{"type": "text" or "image", "value": the text or a file}."""
Content = Sequence[Part]


class WeMM(BaseModel):  # type: ignore[misc]
    """The engine in this process (`model`), or the endpoint at `base_url`, asked by --api-nproc threads.

    As in the kit's own wrapper, a question is its first image and then its texts; `interleave` instead keeps all
    images where they stand. Answers are greedy, of `max_tokens` at most. Further options are, for the engine, the
    fields of `wemm.config.EngineConfig`; for an endpoint, `api_key` and `timeout`. Raises ClientError where the
    model cannot be loaded or the endpoint not reached.
    """

    INTERLEAVE = False
    allowed_types = ("text", "image")

    def __init__(
        self,
        model: str | None = None,
        base_url: str | None = None,
        max_tokens: int = 512,
        interleave: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.INTERLEAVE = interleave
        self.is_api = base_url is not None
        self._sampling = SamplingParams(max_tokens=max_tokens)
        self._client = _client(model, base_url, options)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether `build_prompt` writes this data set's questions, and not the data set itself."""
        return bool(DATASET_TYPE(dataset) == MULTIPLE_CHOICE)

    def build_prompt(self, line: Mapping[str, Any], dataset: str | None = None) -> list[dict[str, str]]:
        """A row of a multiple-choice data set → its message."""
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": multiple_choice(line)}]

    def generate_inner(self, message: Content, dataset: str | None = None) -> str:
        """The answer, or FAILED and why."""
        parts = list(message) if self.INTERLEAVE else self._image_first(message, dataset)
        suffix = SUFFIXES.get(dataset or "")
        if suffix:
            parts.append({"type": "text", "value": parts.pop()["value"] + suffix})
        messages = [{"role": "user", "content": [_part(part) for part in parts]}]
        [(_, answer)] = self._client.answers([Question(messages, self._sampling)])
        return answer.text if answer.error is None else f"{FAILED} {answer.error}"

    def _image_first(self, message: Content, dataset: str | None) -> list[Part]:
        text, image = self.message_to_promptimg(message, dataset=dataset)
        images = [] if image is None else [{"type": "image", "value": image}]
        return [*images, {"type": "text", "value": text}]


def _client(model: str | None, base_url: str | None, options: dict[str, Any]) -> Client:
    if base_url is not None:
        return EndpointClient(base_url, model, **options)
    if model is not None:
        return EngineClient(LLM(model, progress=terminal_bar, **options))
    raise ParameterError("give model, a checkpoint, or base_url, an endpoint. Given: neither")


def _part(part: Part) -> dict[str, str]:
    return {"type": part["type"], part["type"]: part["value"]}
