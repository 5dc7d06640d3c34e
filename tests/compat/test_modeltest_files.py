"""The files of modeltest can be read back, whatever an answer holds."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modeltest.precision import input_token_ids
from modeltest.result_files import (
    DEBUG_HEADER,
    E2E_TIME,
    END,
    INPUT,
    RESULT_HEADER,
    Case,
    Place,
    debug_block,
    debug_row,
    result_row,
    write_csv,
    write_debug_text,
)

from wemm.batch.question import Answer, user_turn

PLACE = Place(Path("out"), "CPU", "bf16", "textvqa", "wemm", 1, 2)
WORD = Path(__file__).parents[2] / "docs/images/word.png"


def parse(text):
    """(answer, image, query, seconds) of every block, as the module's text describes them."""
    lines, cases = [], []
    for line in text.split("\n")[:-1]:
        if line in (INPUT, E2E_TIME):
            lines.append(None)
        elif line == END:
            first = lines.index(None)
            second = lines.index(None, first + 1)
            answer, (image, *query), [seconds] = lines[:first], lines[first + 1 : second], lines[second + 1 :]
            cases.append(("\n".join(answer), image, "\n".join(query), seconds))
            lines = []
        else:
            lines.append(line.removeprefix("\\"))
    return cases


def case(text="red", query="what?", image="/i/a.png", **fields):
    return Case(
        7, image, query, Answer(text, seconds=1.5, timings={"queue": 0.5}), 0.6, ["red", "猫"], [1], **fields
    )


# Lone surrogates are no text that a file could hold.
pieces = st.sampled_from(["\n", "---", "===", "\\", INPUT, E2E_TIME, END, "猫", "\r", " ", "a"])
texts = st.lists(pieces).map("".join) | st.text(st.characters(codec="utf-8"))


@given(st.lists(st.tuples(texts, texts), max_size=4))
def test_what_was_written_is_read_back(pairs):
    written = "".join(debug_block(case(answer, query)) for answer, query in pairs)
    assert parse(written) == [(answer, "/i/a.png", query, "1.000000") for answer, query in pairs]


def test_a_plain_block_reads_as_it_is_documented(tmp_path):
    file = tmp_path / "new/output.txt"
    write_debug_text(file, [case("two\nlines\r", "what?")])
    assert file.read_bytes().decode() == (
        "two\nlines\r\n--- input ---\n/i/a.png\nwhat?\n--- e2e_time ---\n1.000000\n=== end ===\n"
    )


def test_a_question_without_an_answer_has_no_time(tmp_path):
    failed = Case(7, "/i/a.png", "what?", Answer(error="broken", error_type="MediaError"), None, ["red"], [])
    assert parse(debug_block(failed)) == [("", "/i/a.png", "what?", "")]
    assert debug_row(failed)[-3:] == ["error: broken", '["red"]', ""]


def test_the_files_lie_where_the_original_has_them():
    directory = "precision_test/textvqa/bf16/wemm"
    assert PLACE.result_csv == Path(f"out/results/CPU/{directory}/textvqa_pa_batch1_tp2_result.csv")
    assert PLACE.debug_csv == Path(f"out/debug/CPU/{directory}/textvqa_pa_batch1_tp2_debug_info.csv")
    now = datetime(2025, 1, 2, 3, 4, 5)
    assert PLACE.debug_text(now) == Path(f"out/debug/CPU/{directory}/output_20250102_030405.txt")


def test_pass_over_what_was_scored_is_the_value(tmp_path):
    summary = {"task": "textvqa", "num_samples": 4, "num_errors": 1, "num_scored": 3, "accuracy": 0.8,
               "interval": [0.5, 0.9]}  # fmt: skip
    file = tmp_path / "new/result.csv"
    write_csv(file, RESULT_HEADER, [result_row(summary, 0)])
    with file.open(newline="") as lines:
        [row] = csv.DictReader(lines)
    assert list(row)[:6] == ["Tasks", "N-Shot", "Total", "Pass", "Metric", "Value"]
    assert float(row["Pass"]) / (int(row["Total"]) - int(row["Errors"])) == pytest.approx(float(row["Value"]))
    assert (row["Metric"], row["CI low"], row["CI high"]) == ("acc", "0.5", "0.9")


def test_a_line_of_the_debug_table_holds_everything_of_a_question():
    row = dict(zip(DEBUG_HEADER, debug_row(case("a,b\n")), strict=True))
    assert row["key"] == 7
    assert json.loads(row["golden_result"]) == ["red", "猫"]
    assert (row["test_result"], row["pass"], json.loads(row["input_token_ids"])) == ("a,b\n", 0.6, [1])


def test_input_token_ids_are_those_the_engine_computes(llm):
    messages = user_turn("What is <image> written\nhere?", [WORD])
    prompt = llm._open.processor.chat(messages)
    assert input_token_ids(llm._open.tokenizer, messages, prompt.num_image_tokens) == list(prompt.token_ids)
