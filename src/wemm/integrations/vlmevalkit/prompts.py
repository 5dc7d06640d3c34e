"""How WeMM is asked in VLMEvalKit: the words of the kit's own WeMM wrapper, so that scores compare.

Other questions go out as the kit's data sets write them; TextVQA's and its kin end in "Answer the question using a
single word or phrase." there.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

LETTER = {
    "en": "\nAnswer with the option's letter from the given choices directly.",
    "zh": "\n请直接回答选项字母。",
}
"""Behind a question with options."""
DIRECTLY = {"en": "\nAnswer the question directly.", "zh": "\n请直接回答问题。"}
"""Behind a question of such a data set that has none."""
SUFFIXES = {"HallusionBench": " Please answer yes or no. Answer the question using a single word or phrase."}
"""Data set → behind every question of it."""
MULTIPLE_CHOICE = "MCQ"
"""The kit's type of the data sets that `multiple_choice` is for."""


def multiple_choice(line: Mapping[str, Any]) -> str:
    """A row of the data set → hint, question and options, one a line, and what to answer with."""
    options = [f"{letter}. {line[letter]}" for letter in string.ascii_uppercase if _is_given(line, letter)]
    hint = [str(line["hint"])] if _is_given(line, "hint") else []
    text = "\n".join([*hint, str(line["question"]), *options])
    return text + (LETTER if options else DIRECTLY)[_language(text)]


def _is_given(line: Mapping[str, Any], name: str) -> bool:
    value = line.get(name)
    return value is not None and value == value  # an empty cell of a table is NaN


def _language(text: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"
