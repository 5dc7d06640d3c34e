"""Messages or text → `ProcessedPrompt`: everything the engine needs, nothing it must check again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wemm.errors import MediaError, PromptError, PromptTooLongError
from wemm.processing.chat_template import Control, ImagePart, Message, Segment, Text, render
from wemm.processing.image_processor import ImageProcessor, ProcessedImage
from wemm.processing.media import open_image
from wemm.processing.tokenizer import Tokenizer

IMAGE_TOKEN_ID = -200
"""Stands for every prompt position that an image fills."""


@dataclass(frozen=True)
class ImageSpan:
    """The prompt positions [start, start + num_tokens) of one image."""

    start: int
    image: ProcessedImage

    @property
    def stop(self) -> int:
        """First position after the image."""
        return self.start + self.image.plan.num_tokens


@dataclass(frozen=True)
class ProcessedPrompt:
    """A valid prompt."""

    token_ids: tuple[int, ...]
    image_spans: tuple[ImageSpan, ...] = ()

    @property
    def num_image_tokens(self) -> int:
        """Positions that come from images."""
        return sum(span.image.plan.num_tokens for span in self.image_spans)


class Processor:
    """The door through which every prompt enters."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        max_prompt_len: int,
        vocab_size: int,
        reference_image_mode: bool = False,
    ) -> None:
        """`max_prompt_len` leaves room for one answer token; `vocab_size` bounds ids given directly."""
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._max_prompt_len = max_prompt_len
        self._vocab_size = vocab_size
        self._reference_image_mode = reference_image_mode

    def chat(self, messages: Sequence[Message]) -> ProcessedPrompt:
        """A conversation, rendered by the chat template. Raises PromptError, MediaError."""
        return self._assemble(render(messages))

    def text(self, text: str) -> ProcessedPrompt:
        """Raw text: BOS and the text, no template. Raises PromptError."""
        if not isinstance(text, str):
            raise PromptError(f"a prompt is text or a list of token ids. Given: {type(text).__name__}")
        return self._assemble([Text(text)])

    def token_ids(self, token_ids: Sequence[int]) -> ProcessedPrompt:
        """Ids as they are, no BOS added. Raises PromptError."""
        if not isinstance(token_ids, Sequence) or isinstance(token_ids, bytes):
            raise PromptError(f"a prompt is text or a list of token ids. Given: {type(token_ids).__name__}")
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < self._vocab_size:
                raise PromptError(f"a token id is an integer in [0, {self._vocab_size}). Given: {token_id!r}")
        if not token_ids:
            raise PromptError("the prompt is empty: give at least one token id")
        self._check_len(len(token_ids))
        return ProcessedPrompt(tuple(token_ids))

    def _assemble(self, segments: Sequence[Segment]) -> ProcessedPrompt:
        token_ids = [self._tokenizer.bos_id]
        spans = []
        for segment in segments:
            if isinstance(segment, Control):
                token_ids.append(self._tokenizer.control_ids[segment.name])
            elif isinstance(segment, Text):
                token_ids += self._tokenizer.encode(segment.text)
            else:
                span = ImageSpan(len(token_ids), self._open_image(segment))
                spans.append(span)
                token_ids += [IMAGE_TOKEN_ID] * span.image.plan.num_tokens
        self._check_len(len(token_ids))
        return ProcessedPrompt(tuple(token_ids), tuple(spans))

    def _open_image(self, part: ImagePart) -> ProcessedImage:
        try:
            return self._image_processor.process(open_image(part.source, self._reference_image_mode))
        except MediaError as error:
            raise MediaError(f"{part.param}: {error}") from None

    def _check_len(self, length: int) -> None:
        if length > self._max_prompt_len:
            raise PromptTooLongError(
                f"the prompt has {length} tokens, but max_model_len {self._max_prompt_len + 1} leaves room "
                f"for {self._max_prompt_len}; shorten it or raise --max-model-len"
            )
