"""Our tokenizer behind vLLM's interface: no text, whatever it spells, becomes a control token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from huggingface_hub import snapshot_download
from transformers import BatchEncoding

from wemm.checkpoint.checkpoint import read_config
from wemm.processing.chat_template import Control, Message, Text, render
from wemm.processing.tokenizer import IM_END, Tokenizer

_FILES = ["*.json", "tokenizer.model"]
IMAGE = "<image>"
"""How the image token is shown; text that spells it stays text."""


class VllmTokenizer:
    """A `vllm.tokenizers.TokenizerLike`."""

    is_fast = False
    truncation_side = "left"

    def __init__(self, directory: Path, name: str) -> None:
        """Raises CheckpointError."""
        self._tokenizer = Tokenizer(directory)
        self.name_or_path = name
        self.image_token_id = read_config(directory).text.vocab_size
        """The placeholder of an image in a prompt of ids."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        *args: Any,
        trust_remote_code: bool = False,
        revision: str | None = None,
        download_dir: str | None = None,
        **kwargs: Any,
    ) -> VllmTokenizer:
        """Of a directory or a hub id. Raises CheckpointError."""
        directory = Path(path_or_repo_id)
        if not directory.is_dir():
            name = str(path_or_repo_id)
            directory = Path(
                snapshot_download(name, revision=revision, cache_dir=download_dir, allow_patterns=_FILES)
            )
        return cls(directory, str(path_or_repo_id))

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """A conversation by the chat template, one image token per image. Raises PromptError."""
        token_ids = [self.bos_token_id]
        for segment in render(messages):
            if isinstance(segment, Control):
                token_ids.append(self._tokenizer.control_ids[segment.name])
            elif isinstance(segment, Text):
                token_ids += self._tokenizer.encode(segment.text)
            else:
                token_ids.append(self.image_token_id)
        return token_ids

    def apply_chat_template(self, messages: Sequence[Message], tools: Any = None, **kwargs: Any) -> list[int]:
        """Ids; the template is the model's own whatever `kwargs` say. Raises PromptError."""
        return self.encode_messages(messages)

    def encode(
        self,
        text: str,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Ids of plain text, behind a BOS unless `add_special_tokens` is off. Raises PromptError."""
        token_ids = [self.bos_token_id] if add_special_tokens else []
        token_ids += self._tokenizer.encode(text)
        return token_ids[-max_length:] if truncation and max_length else token_ids

    def __call__(
        self,
        text: str | list[str],
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """As `encode`, for one text or several."""
        options = truncation, max_length, add_special_tokens
        if isinstance(text, str):
            return BatchEncoding({"input_ids": self.encode(text, *options)})
        return BatchEncoding({"input_ids": [self.encode(one, *options) for one in text]})

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        ids = [ids] if isinstance(ids, int) else ids
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id != self.image_token_id]
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))

    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str]:
        """Each id's own spelling in the vocabulary; empty for one outside."""
        special = self._special_ids if skip_special_tokens else frozenset[int]()
        return [self._token(token_id) for token_id in ids if token_id not in special]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Text of tokens: bytes joined to characters."""
        text = ""
        decoder = self._tokenizer.decoder(skip_special_tokens=False)
        for token in tokens:
            token_id = self._vocab.get(token)
            if token_id == self.image_token_id:
                text += decoder.flush() + IMAGE
            elif token_id is not None:
                text += decoder.push(token_id)
        return text + decoder.flush()

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The way back; one that is not in the vocabulary becomes its unknown token, 0."""
        if isinstance(tokens, str):
            return self._vocab.get(tokens, 0)
        return [self._vocab.get(token, 0) for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        """Token → id, the image token included."""
        return dict(self._vocab)

    def get_added_vocab(self) -> dict[str, int]:
        """None: every token is decoded the same way."""
        return {}

    def num_special_tokens_to_add(self) -> int:
        """The BOS."""
        return 1

    def __len__(self) -> int:
        return self.image_token_id + 1

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: Any) -> VllmTokenizer:
        return self  # nothing in it changes

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self.image_token_id

    @property
    def max_token_id(self) -> int:
        """The image token."""
        return self.image_token_id

    @property
    def max_chars_per_token(self) -> int:
        """Characters that one token spells at most."""
        return self._tokenizer.longest_piece

    @property
    def bos_token_id(self) -> int:
        """Begins every prompt."""
        return self._tokenizer.bos_id

    @property
    def eos_token_id(self) -> int:
        """Ends an answer: the end of a turn."""
        return self._tokenizer.im_end_id

    @property
    def pad_token_id(self) -> int:
        """Never read."""
        return self.eos_token_id

    @property
    def eos_token(self) -> str:
        """By name."""
        return IM_END

    @cached_property
    def all_special_ids(self) -> list[int]:
        """What text never becomes and answers never show."""
        return sorted(self._special_ids)

    @cached_property
    def all_special_tokens(self) -> list[str]:
        """The same by name."""
        return self.convert_ids_to_tokens(self.all_special_ids)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return self._tokenizer.special_ids | {self.image_token_id}

    @cached_property
    def _vocab(self) -> Mapping[str, int]:
        ids = [*range(self._tokenizer.vocab_size), self.image_token_id]
        return {self._token(token_id): token_id for token_id in ids}

    def _token(self, token_id: int) -> str:
        return IMAGE if token_id == self.image_token_id else self._tokenizer.spelling(token_id)
