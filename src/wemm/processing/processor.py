"""Messages or text → `ProcessedPrompt`: everything the engine needs, nothing it must check again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wemm.errors import MediaError, PromptError, PromptTooLongError
from wemm.processing.chat_template import Control, ImagePart, Message, Segment, Text, render
from wemm.processing.image_processor import ImageProcessor, ProcessedImage
from wemm.processing.media import open_image
from wemm.processing.tokenizer import Tokenizer

_LARGE_TEXT = 2**16  # characters
IMAGE_TOKEN_ID = -200
"""Stands for every prompt position that an image fills."""

ReadImage = Callable[[Any, str], ProcessedImage]
"""(path, bytes, data: URL or PIL image; detail) → what the tower sees. Raises MediaError."""


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
    cache_salt: str = ""
    """Caches are shared among prompts of one salt only."""

    def salted(self, cache_salt: str) -> ProcessedPrompt:
        """The same prompt, apart from all with another salt."""
        if not cache_salt:
            return self
        return replace(
            self,
            cache_salt=cache_salt,
            image_spans=tuple(replace(s, image=_salted(s.image, cache_salt)) for s in self.image_spans),
        )

    @property
    def num_image_tokens(self) -> int:
        """Positions that come from images."""
        return sum(span.image.plan.num_tokens for span in self.image_spans)


def _salted(image: ProcessedImage, cache_salt: str) -> ProcessedImage:
    digest = hashlib.sha256(f"{cache_salt}\n{image.sha256}".encode())
    return replace(image, sha256=digest.hexdigest())


def image_reader(image_processor: ImageProcessor, reference_image_mode: bool = False) -> ReadImage:
    """Read, decode and resize in the calling thread."""
    return lambda source, detail: image_processor.process(open_image(source, reference_image_mode), detail)


class Processor:
    """The door through which every prompt enters."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        read_image: ReadImage,
        max_prompt_len: int,
        vocab_size: int,
    ) -> None:
        """`max_prompt_len` leaves room for one answer token; `vocab_size` bounds ids given directly."""
        self._tokenizer = tokenizer
        self._read_image = read_image
        self._max_prompt_len = max_prompt_len
        self._vocab_size = vocab_size

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
                if len(segment.text) > _LARGE_TEXT:
                    # Whatever its tokens are: to find them in megabytes takes seconds.
                    least = len(token_ids) + len(segment.text) // self._tokenizer.longest_piece
                    self._check_len(least, "at least ")
                token_ids += self._tokenizer.encode(segment.text)
            else:
                span = ImageSpan(len(token_ids), self._open_image(segment))
                spans.append(span)
                token_ids += [IMAGE_TOKEN_ID] * span.image.plan.num_tokens
        self._check_len(len(token_ids))
        return ProcessedPrompt(tuple(token_ids), tuple(spans))

    def _open_image(self, part: ImagePart) -> ProcessedImage:
        try:
            return self._read_image(part.source, part.detail)
        except MediaError as error:
            raise MediaError(f"{part.param}: {error}", part.param) from None

    def _check_len(self, length: int, about: str = "") -> None:
        if length > self._max_prompt_len:
            raise PromptTooLongError(
                f"the prompt has {about}{length} tokens, but max_model_len {self._max_prompt_len + 1} leaves room "
                f"for {self._max_prompt_len}; shorten it or raise --max-model-len"
            )
