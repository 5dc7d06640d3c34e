"""VQA accuracy by the official rules of TextVQA: an answer counts by how many of ten people gave it.

The tools differ. Here: MMF's EvalAIAnswerProcessor and TextVQAAccuracyEvaluator (facebookresearch/mmf,
m4c_evaluators.py), made to score as TextVQA's server does. Predictions and references are treated alike. Against
the rules of visualqa.org/evaluation.html:

- A comma is removed, not replaced: "red,blue" becomes "redblue". So is a question mark.
- "'s" is set apart before contractions are looked up: "that's" becomes "that 's" but "thats" becomes "that's",
  and the two do not match.
- Other marks become a space or vanish by what stands beside them (`replace_marks`).
- A period goes unless a digit follows it, whatever stands before: "5." and "a.m." lose theirs, "No.5" keeps it.
  The tool's pattern means to ask for a digit before, too, but `(?!<=\\d)` never asks. Only the first 32 go.

The VQA data set's own tool (GT-Vision-Lab/VQA, vqaEval.py) has neither of the first two, and skips all rules,
lower case too, where the references are one text.

The rules are made for English. Chinese passes through: no word is changed, full-width marks and digits stay, so
"红色。" does not match "红色". Nothing is added to the official rules for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from wemm.errors import ParameterError
from wemm.evaluation.metrics.answer_words import replace_marks, replace_words

ENOUGH_MATCHES = 3
"""An answer is fully right if so many other people gave it."""


def normalise(answer: str) -> str:
    """The text in which two answers are compared.

    Not idempotent in two corners: an apostrophe-s that appears late ("thats" → "that's" → "that 's"), and more
    than 32 periods.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return replace_words(replace_marks(text))


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """0..1: the mean over the references of min(1, matches among the others / 3). Raises ParameterError.

    "Others" leaves one reference out by position, so equal answers do not hide each other. With ten references
    0, 1, 2, 3, 4 or more matches give 0, 0.3, 0.6, 0.9, 1. MMF takes ten and no other number. The same mean over
    fewer than four never reaches 1, and over a single one it is 0: compare for equality there.
    """
    if not references:
        raise ParameterError(
            "vqa_accuracy needs the answers of people, usually ten. Given: none", param="references"
        )
    given = normalise(prediction)
    total = len(references)
    matches = sum(normalise(reference) == given for reference in references)
    # Leaving a match out leaves one fewer; leaving another answer out leaves them all.
    without_a_match = matches * min(ENOUGH_MATCHES, matches - 1)
    without_another = (total - matches) * min(ENOUGH_MATCHES, matches)
    return (without_a_match + without_another) / (ENOUGH_MATCHES * total)
