"""VQA accuracy as the original's test tool (modeltest, task textvqa) computes it, to compare with its numbers.

What differs from vqa_accuracy.py:

- The prediction is cut at the first end marker. An empty one becomes "-1", which the rule for marks
  then makes "1".
- The references are not normalised like the prediction. If they are all one text, they are left as they are; if
  not, marks and periods are replaced, and that is all. A reference with a capital letter, a number word, an
  article or a contraction without its apostrophe matches no prediction. Nor does one with a space at an end or two
  in a row, which a replaced mark leaves: "red!" becomes "red ".
- "Others" are the entries that differ from this one as a whole. Where nothing but the answer is in an entry (no
  answer_id), equal answers exclude each other: ten equal ones give 0, five of ten give 0.5 and not 1.
- Commas and question marks are marks like the others: "red,blue" becomes "red blue", and "1,000-2,000" loses its
  hyphen. "'s" stays with its word, so "thats" matches "that's".
- A prediction of more than 2048 characters after the cut is refused.

The same in both: the tables, and that at most 32 periods are removed.

The original writes the replaced marks back into its annotations, so a question asked twice may be scored otherwise
the second time. Not so here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from wemm.errors import ParameterError
from wemm.evaluation.metrics.answer_words import replace_marks, replace_words
from wemm.evaluation.metrics.vqa_accuracy import ENOUGH_MATCHES

END_MARKERS = (
    "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<｜eot_id|>", "###", "</s>",
)  # fmt: skip
MAX_CHARACTERS = 2048

_END_MARKER = re.compile("|".join(map(re.escape, END_MARKERS)))


def modeltest_accuracy(prediction: str, answers: Sequence[Mapping[str, Any]]) -> float:
    """0..1 for one question. `answers`: the annotation's entries, {"answer": text, "answer_id": 1, …}.

    Raises ParameterError, whose `param` is "prediction" where the text is too long: the original counts such a
    question as failed, with a score of 0. `param` is "answers" where they are none, too long or without a text.
    """
    given = _normalise_prediction(prediction)
    entries = _normalise_answers(answers)
    matching = [entry for entry in entries if entry["answer"] == given]
    counts = (sum(other != entry for other in matching) for entry in entries)
    return sum(min(ENOUGH_MATCHES, count) for count in counts) / (ENOUGH_MATCHES * len(entries))


def _normalise_prediction(prediction: str) -> str:
    # Only a text without any character: one of spaces stays empty.
    text = _END_MARKER.split(prediction or "-1", maxsplit=1)[0]
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return replace_words(_replace_marks(text, "prediction"))


def _normalise_answers(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    texts = [entry.get("answer") for entry in answers]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ParameterError(
            f'answers must be entries with a text under "answer". Given: {answers!r:.100}', "answers"
        )
    if len(set(texts)) == 1:
        return [dict(entry) for entry in answers]
    return [{**entry, "answer": _replace_marks(entry["answer"], "answers")} for entry in answers]


def _replace_marks(text: str, param: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise ParameterError(
            f"modeltest scores texts of at most {MAX_CHARACTERS} characters. Given: {len(text)}; lower max_tokens",
            param,
        )
    return replace_marks(text)
