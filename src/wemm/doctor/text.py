"""Does the tokenizer keep text, keep text apart from control tokens, and belong to this model."""

from __future__ import annotations

from pathlib import Path

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.config import ModelConfig
from wemm.doctor.check import FAIL, OK, WARN, Check
from wemm.doctor.files import sha256
from wemm.errors import CheckpointError
from wemm.processing.tokenizer import Tokenizer

_TEXTS = (
    "图中有什么？请用一句话回答。",
    "What is written here?",
    "总金额是 ¥1,234.56，共 3 页",
    "0123456789",
    "繁體中文與简体中文",
    "naïve café Ünïcödé",
    "\U0001f600 \U0001f469\u200d\U0001f467 ✓",
    "a  b   c",
    "line\nline\n\n\ttab",
    '{"a": [1, 2]}',
    "ﬁ １２３ ㎏",
    "русский العربية 日本語 한국어",
)

INTERNLM2_VOCAB_SIZE = 92544
INTERNLM2_SHA256 = "f868398fc4e05ee1e8aeba95ddf18ddcc45b8bce55d5093bead5bbf80429b48b"
"""Of tokenizer.model as published with InternLM2 (internlm/internlm2-chat-7b and its relatives)."""
# What that file makes of these texts: another file that agrees is the same vocabulary, saved again.
_INTERNLM2_IDS = {
    "assistant\n": [525, 11353, 364],
    "\nHow many circles are there?": [364, 4500, 1806, 25799, 657, 1194, 345],
    "\n图中的数字是多少？": [364, 83510, 69013, 82089, 60504],
}
_FOREIGN = (
    "tokenizer.model is not this model's: fetch tokenizer.model and tokenizer_config.json of the same checkpoint"
)


def check_tokenizer(directory: Path, config: ModelConfig) -> tuple[Check, Tokenizer | None]:
    """Round trips, control tokens, size and origin; and the tokenizer, if it can be used at all."""
    try:
        tokenizer = Tokenizer(directory)
    except CheckpointError as error:
        return Check("tokenizer", FAIL, str(error), str(error)), None
    digest = sha256(directory / "tokenizer.model")
    figures = {
        "pieces": tokenizer.vocab_size, "vocab_size": config.text.vocab_size, "sha256": digest,
        "control_ids": dict(tokenizer.control_ids), "round_trips": len(_TEXTS),
    }  # fmt: skip
    is_internlm2 = config.text.vocab_size == INTERNLM2_VOCAB_SIZE
    known = is_internlm2 and digest == INTERNLM2_SHA256
    problem = _problem(tokenizer, config) or (_not_internlm2(tokenizer) if is_internlm2 and not known else None)
    if problem is not None:
        return Check("tokenizer", FAIL, problem, _FOREIGN, figures), tokenizer
    detail = f"{len(_TEXTS)} texts keep their characters, {tokenizer.vocab_size} pieces"
    if known:
        detail += ", the published file of InternLM2"
    elif is_internlm2:
        detail += "; encodes like InternLM2's, but is not the published file"
        return Check("tokenizer", WARN, detail, figures=figures), tokenizer
    return Check("tokenizer", OK, detail, figures=figures), tokenizer


def bundled_tokenizers(vocab_size: int, digest: str) -> list[tuple[str, Tokenizer]]:
    """Those that come with the package, of that many pieces and with another hash."""
    found = []
    for directory in sorted(path for path in BUNDLED_DIRECTORY.iterdir() if path.is_dir()):
        if sha256(directory / "tokenizer.model") != digest:
            tokenizer = Tokenizer(directory)
            if tokenizer.vocab_size == vocab_size:
                found.append((directory.name, tokenizer))
    return found


def _problem(tokenizer: Tokenizer, config: ModelConfig) -> str | None:
    vocab_size, control = config.text.vocab_size, tokenizer.control_ids
    if max(control.values()) >= vocab_size or len(set(control.values())) != len(control):
        return f"ids of control tokens are not distinct numbers below vocab_size {vocab_size}: {dict(control)}"
    if tokenizer.vocab_size != vocab_size:
        return f"{tokenizer.vocab_size} pieces, but vocab_size {vocab_size} in config.json"
    lead = tokenizer.decode(tokenizer.encode("a")).removesuffix("a")  # some vocabularies begin with a space
    for text in _TEXTS:
        back = tokenizer.decode(tokenizer.encode(text))
        if back != lead + text or lead not in ("", " "):
            return f"{text!r} comes back as {back!r}"
    return _forged(tokenizer)


def _forged(tokenizer: Tokenizer) -> str | None:
    for name, token_id in tokenizer.control_ids.items():
        for text in (name, tokenizer.piece_text(token_id), "[UNUSED_TOKEN_145]"):
            if tokenizer.special_ids & set(tokenizer.encode(text)) - {0}:
                return f"the text {text!r} becomes a control token"
    return None


def _not_internlm2(tokenizer: Tokenizer) -> str | None:
    for text, ids in _INTERNLM2_IDS.items():
        if tokenizer.encode(text) != ids:
            return f"{text!r} becomes {tokenizer.encode(text)}, InternLM2's tokenizer gives {ids}"
    return None
