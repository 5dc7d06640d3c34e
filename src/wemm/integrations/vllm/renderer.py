"""Messages → token ids with one image token per image, by our chat template; the images go beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.params import ChatParams

from wemm.errors import ClientError
from wemm.integrations.vllm.tokenizer import VllmTokenizer
from wemm.processing.chat_template import Message


class WemmRenderer(BaseRenderer[VllmTokenizer]):
    """A `vllm.renderers.BaseRenderer`. Text stays text: it never passes through a template's language."""

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], TokensPrompt]:
        """→ the conversation as vLLM parsed it, and its prompt. Raises VLLMValidationError."""
        parsed = parse_chat_messages(messages, self.model_config, **self._parsing(params))
        return self._prompt(params, *parsed)

    async def render_messages_async(
        self, messages: list[Any], params: ChatParams
    ) -> tuple[list[Any], TokensPrompt]:
        """The same, while images are fetched."""
        parsed = await parse_chat_messages_async(messages, self.model_config, **self._parsing(params))
        return self._prompt(params, *parsed)

    def _parsing(self, params: ChatParams) -> dict[str, Any]:
        return {
            "content_format": "openai",  # parts stay apart
            "media_io_kwargs": params.media_io_kwargs,
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    def _prompt(
        self, params: ChatParams, conversation: list[Any], images: Any, uuids: Any
    ) -> tuple[list[Any], TokensPrompt]:
        if params.chat_template_kwargs.get("continue_final_message"):
            raise VLLMValidationError("an answer cannot be continued: the last message must be the user's")
        try:
            token_ids = self.get_tokenizer().encode_messages([_message(message) for message in conversation])
        except ClientError as error:
            raise VLLMValidationError(str(error), parameter=error.param) from None
        prompt = TokensPrompt(prompt_token_ids=token_ids)
        if images is not None:
            prompt["multi_modal_data"] = images
        if uuids is not None:
            prompt["multi_modal_uuids"] = uuids
        return conversation, prompt


def _message(message: Mapping[str, Any]) -> Message:
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        # The image itself travels apart from the conversation, in the order of the parts.
        content = [{**part, "image": True} if part.get("type") == "image" else part for part in content]
    return {"role": message["role"], "content": content or ""}
