"""Makes the tokenizer of `nano`: InternLM2's kind (BPE with byte fallback), small enough for its vocabulary.

python -m training.tokenizer DIRECTORY
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import sentencepiece

from training.images import DIGITS, LETTERS
from training.tasks import CHINESE_WORDS, every_text

VOCAB_SIZE = 768
_ADDED_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
# As in the real vocabulary, where the chat tokens are pieces with another spelling.
_FIRST_UNUSED = 141
_EXTRA = "abcdefghijklmnopqrstuvwxyz.,?!:;'\"()-+*/%&@#<>=_。，？！：；、（）的是不了在我有你他这中大上个国"


def make_tokenizer(directory: Path) -> None:
    """Write tokenizer.model and tokenizer_config.json."""
    # Questions and answers follow a newline in every prompt. Every capital and digit is a piece of its
    # own: they never stand side by side here, so none merge.
    lines = [f"\n{text}" for text in every_text()]
    lines += ["user", "assistant"] * 100 + [*_EXTRA, *DIGITS, *LETTERS] * 2
    unused = [f"[UNUSED_TOKEN_{_FIRST_UNUSED + i}]" for i in range(len(_ADDED_TOKENS))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=[*unused, "\n", *CHINESE_WORDS],
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    names = ("<unk>", "<s>", "</s>", *_ADDED_TOKENS)
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": name, **flags} for i, name in enumerate(names)},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_tokenizer(Path(sys.argv[1]))
