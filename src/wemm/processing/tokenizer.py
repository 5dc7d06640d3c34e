"""InternLM2's SentencePiece tokenizer: safe encoding of user text, exact incremental decoding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from wemm.checkpoint.json_file import read_json
from wemm.errors import CheckpointError, ConfigError, PromptError

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space
# The vocabulary's own names of the two chat tokens, for a directory that lists no added tokens.
_FALLBACK_PIECES = {"[UNUSED_TOKEN_146]": IM_START, "[UNUSED_TOKEN_145]": IM_END}


class Tokenizer:
    """Text ↔ ids. Control tokens exist as ids only: no text, whatever it spells, becomes one."""

    def __init__(self, directory: Path) -> None:
        """Read tokenizer.model and the control tokens beside it. Raises CheckpointError."""
        path = directory / "tokenizer.model"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the tokenizer of the checkpoint there")
        sentencepiece.SetMinLogLevel(2)  # it warns about a piece of the real vocabulary at every start
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path}: not a SentencePiece model ({error})") from None
        self.vocab_size: int = self._model.vocab_size()
        try:
            self._pieces: list[str] = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: a piece of the vocabulary is not UTF-8 ({error.reason})") from None
        self.longest_piece: int = max(map(len, self._pieces))
        """Characters that one token spells at most."""
        self.bos_id: int = self._model.bos_id()
        self.control_ids: Mapping[str, int] = self._read_control_ids(directory)
        self._control_names = {token_id: name for name, token_id in self.control_ids.items()}
        special = {i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i)}
        self.special_ids: frozenset[int] = frozenset(special | set(self.control_ids.values()))
        # The vocabulary spells some control ids as ordinary pieces ("[UNUSED_TOKEN_145]" is the stop
        # token): cutting such a spelling in two keeps the text and loses the id.
        spellings = [self._pieces[i] for i in self.special_ids if i < self.vocab_size]
        cuts = [f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in spellings if len(s) > 1]
        self._cut = re.compile("|".join(cuts))
        self._space_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._byte_of: dict[int, int] = {
            i: int(self._pieces[i][3:5], 16) for i in range(self.vocab_size) if self._model.is_byte(i)
        }

    def _read_control_ids(self, directory: Path) -> dict[str, int]:
        control: dict[str, int] = {}
        tokenizer_config, added_tokens = directory / "tokenizer_config.json", directory / "added_tokens.json"
        if tokenizer_config.exists():
            decoder = read_json(tokenizer_config).get("added_tokens_decoder") or {}
            if not isinstance(decoder, dict):
                raise ConfigError(f"{tokenizer_config}: added_tokens_decoder must be an object of id → token")
            for token_id, token in decoder.items():
                content = token.get("content") if isinstance(token, dict) else None
                control[_token_name(tokenizer_config, content)] = _token_id(tokenizer_config, token_id)
        if added_tokens.exists():
            for content, token_id in read_json(added_tokens).items():
                control[content] = _token_id(added_tokens, token_id)
        for piece, name in _FALLBACK_PIECES.items():
            token_id = self._model.piece_to_id(piece)
            if name not in control and token_id != self._model.unk_id():
                control[name] = token_id
        missing = [name for name in (IM_START, IM_END) if name not in control]
        if missing:
            raise CheckpointError(
                f"{directory}: no id for {' and '.join(missing)}; tokenizer_config.json lists them "
                "under added_tokens_decoder"
            )
        return control

    @property
    def im_end_id(self) -> int:
        """The token that ends a turn: generation stops at it."""
        return self.control_ids[IM_END]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: never a control id, no BOS. Raises PromptError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"text is not valid Unicode: {error.reason} at position {error.start}") from None
        ids: list[int] = []
        for i, stretch in enumerate(text.split(_SPACE)):
            if i:  # SentencePiece would read the character as a space
                ids += self._space_bytes
            for piece in self._cut.split(stretch):
                ids += self._model.encode(piece)
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of complete ids; bytes that are not UTF-8 become U+FFFD, one each."""
        decoder = self.decoder(skip_special_tokens)
        return "".join([decoder.push(token_id) for token_id in token_ids]) + decoder.flush()

    def decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for ids that arrive one by one."""
        return IncrementalDecoder(self, skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token on its own, control tokens by name, for display."""
        return self.decode([token_id], skip_special_tokens=False)

    def byte_of(self, token_id: int) -> int | None:
        """The byte of a byte-fallback token."""
        return self._byte_of.get(token_id)

    def id_of_byte(self, byte: int) -> int:
        """The byte-fallback token of a byte."""
        return int(self._model.piece_to_id(f"<0x{byte:02X}>"))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to an answer; empty outside the vocabulary."""
        byte = self.byte_of(token_id)
        return self.piece_text(token_id).encode() if byte is None else bytes([byte])

    def spelling(self, token_id: int) -> str:
        """A token as the vocabulary spells it, spaces and bytes too, control tokens by name; empty outside it."""
        if token_id in self._control_names:
            return self._control_names[token_id]
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else ""

    def piece_text(self, token_id: int) -> str:
        """The text of a token that is not a byte token; empty outside the vocabulary."""
        if token_id in self._control_names:
            return self._control_names[token_id]
        return self._pieces[token_id].replace(_SPACE, " ") if 0 <= token_id < self.vocab_size else ""


def _token_name(path: Path, content: Any) -> str:
    if not isinstance(content, str) or not content:
        raise ConfigError(f"{path}: an added token needs a content. Given: {content!r}")
    return content


def _token_id(path: Path, value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ConfigError(f"{path}: a token id is an integer >= 0. Given: {value!r}")
    return value


class IncrementalDecoder:
    """Ids in, text out, never half a character: the concatenation equals `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._pending = b""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token."""
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            self._pending += bytes([byte])
            return self._take(final=False)
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return ""
        return self._take(final=True) + self._tokenizer.piece_text(token_id)

    def flush(self) -> str:
        """What an answer that ends inside a character still owes."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        text = ""
        while self._pending:
            length = _utf8_length(self._pending[0])
            try:
                text += self._pending[:length].decode()
            except UnicodeDecodeError as error:
                if not final and error.reason == "unexpected end of data":
                    break
                text, length = text + "\N{REPLACEMENT CHARACTER}", 1
            self._pending = self._pending[length:]
        return text


def _utf8_length(lead: int) -> int:
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
