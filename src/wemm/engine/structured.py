"""Answers that must follow a JSON schema, a regular expression or a list of choices, by llguidance.

A grammar is compiled once per request, where prompts are prepared; each answer walks it token by token and says
which tokens may come next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from wemm.errors import ParameterError, StructuredOutputError
from wemm.processing.tokenizer import Tokenizer
from wemm.request import StructuredOutputsParams

_ANY_OBJECT = {"type": "object"}
_BEFORE = "assistant\n"
# JSON allows any amount of white space between tokens, and a model that is in doubt may never stop writing it.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\r\t]{0,16}"}


class GrammarCompiler:
    """Grammars over one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's: rows of logits are that long."""
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Raises ParameterError: not a schema or expression that can be followed, or llguidance is absent."""
        llguidance = _import_llguidance()
        matcher_type = llguidance.LLMatcher
        try:
            if params.regex is not None:
                source = matcher_type.grammar_from_regex(params.regex)
            elif params.choice is not None:
                choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
                source = matcher_type.grammar_from_lark(f"start: {choices}")
            else:
                schema = _ANY_OBJECT if params.json_object else params.json
                source = matcher_type.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
            matcher = matcher_type(self._vocabulary, source, log_level=0)
        except ValueError as error:
            raise ParameterError(f"structured_outputs.{params.kind}: {error}", "structured_outputs") from None
        if matcher.is_error():
            problem = f"structured_outputs.{params.kind}: {' '.join(matcher.get_error().split())}"
            raise ParameterError(problem, "structured_outputs")
        return Grammar(matcher, self.vocab_size)

    @cached_property
    def _vocabulary(self) -> Any:
        llguidance, tokenizer = _import_llguidance(), self._tokenizer
        special = sorted(tokenizer.special_ids)
        spelled = _Vocabulary(tokenizer, self.vocab_size, special)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(spelled), n_vocab=self.vocab_size)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, special_ids: Sequence[int]) -> None:
        self.eos_token_id = tokenizer.im_end_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = list(special_ids)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self._tokenizer = tokenizer
        self._before = tokenizer.encode(_BEFORE)

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a stretch of an answer. Before a text on its own SentencePiece may put a space."""
        spelled = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode(_BEFORE + spelled.decode(errors="replace"))[len(self._before) :]
        if b"".join(self.tokens[token_id] for token_id in ids) == spelled:
            return ids
        return [self._tokenizer.id_of_byte(byte) for byte in spelled]


class Grammar:
    """A compiled grammar at its beginning."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def walk(self) -> GrammarWalk:
        """For one answer."""
        return GrammarWalk(self._matcher.deep_copy(), self._vocab_size)


class GrammarWalk:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor:
        """bool [vocab_size]: tokens that may come next; the end token where the answer may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_))

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token. Raises StructuredOutputError if the grammar has no place for it."""
        if not self._matcher.consume_token(token_id):
            # Behind the first sentence it prints the whole grammar.
            reason = " ".join(self._matcher.get_error().split("<state>")[0].split())
            raise StructuredOutputError(f"the grammar failed: {reason}")


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ParameterError("structured_outputs needs llguidance: pip install 'wemm[structured]'") from None
    return llguidance
