"""The original's result files: the figures as CSV, and every question with its answer, to be read or parsed.

debug/…/output_TIMESTAMP.txt has one block per question:

    ANSWER, as many lines as it has
    --- input ---
    IMAGE
    TEXT, as many lines as it has
    --- e2e_time ---
    SECONDS
    === end ===

A line of an answer or a text that begins with ---, === or a backslash has a backslash before it. SECONDS are
without the time spent waiting for other questions; there are none where there is no answer.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from wemm.batch.question import Answer
from wemm.errors import StorageError

INPUT, E2E_TIME, END = "--- input ---", "--- e2e_time ---", "=== end ==="
RESULT_HEADER = ("Tasks", "N-Shot", "Total", "Pass", "Metric", "Value", "Errors", "CI low", "CI high")
DEBUG_HEADER = ("key", "queries", "input_token_ids", "output_token_ids", "test_result", "golden_result", "pass")


@dataclass(frozen=True)
class Case:
    """One question, answered and scored."""

    key: int | str
    image: str
    query: str
    """As the model was asked."""
    answer: Answer
    score: float | None
    """None: there is no answer."""
    references: Sequence[str]
    input_token_ids: Sequence[int]
    """Image positions hold IMAGE_TOKEN_ID (-200)."""


@dataclass(frozen=True)
class Place:
    """Where the files of a run lie below its output directory."""

    output: Path
    device: str
    """NPU, GPU or CPU."""
    data_type: str
    """fp16, bf16 or fp32."""
    task_name: str
    model_name: str
    batch_size: int
    tp: int

    @property
    def result_csv(self) -> Path:
        """The figures."""
        return self._directory("results") / f"{self._stem}_result.csv"

    @property
    def debug_csv(self) -> Path:
        """Every question, a line each."""
        return self._directory("debug") / f"{self._stem}_debug_info.csv"

    def debug_text(self, now: datetime) -> Path:
        """Every question, to be read."""
        return self._directory("debug") / f"output_{now:%Y%m%d_%H%M%S}.txt"

    @property
    def _stem(self) -> str:
        return f"{self.task_name}_pa_batch{self.batch_size}_tp{self.tp}"

    def _directory(self, kind: str) -> Path:
        return (
            self.output / kind / self.device / "precision_test" / self.task_name / self.data_type / self.model_name
        )


def result_row(summary: Mapping[str, Any], shots: int) -> list[Any]:
    """In the order of RESULT_HEADER. Pass is the sum of the scores, Value their mean over the scored questions."""
    low, high = summary["interval"]
    passed = round(summary["accuracy"] * summary["num_scored"], 6)
    counts = (summary["task"], shots, summary["num_samples"], passed)
    return [*counts, "acc", summary["accuracy"], summary["num_errors"], low, high]


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Raises StorageError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from None


def debug_row(case: Case) -> list[Any]:
    """In the order of DEBUG_HEADER; token ids and references are JSON, `pass` is the score."""
    answered = case.answer.error is None
    return [
        case.key,
        case.query,
        json.dumps(list(case.input_token_ids)),
        json.dumps(list(case.answer.token_ids or ())),
        case.answer.text if answered else f"error: {case.answer.error}",
        json.dumps(list(case.references), ensure_ascii=False),
        "" if case.score is None else case.score,
    ]


def debug_block(case: Case) -> str:
    """One block of output_TIMESTAMP.txt."""
    answer = case.answer
    seconds = "" if answer.error else f"{answer.seconds - answer.timings.get('queue', 0.0):.6f}"
    parts = [_marked(answer.text), INPUT, _marked(case.image), _marked(case.query), E2E_TIME, seconds, END]
    return "".join(f"{part}\n" for part in parts)


def write_debug_text(file: Path, cases: Sequence[Case]) -> None:
    """Raises StorageError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8", newline="") as lines:
            lines.writelines(debug_block(case) for case in cases)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from None


def _marked(text: str) -> str:
    return re.sub(r"(?m)^(?=---|===|\\)", r"\\", text)
