"""Ask what is not answered yet, keep every answer at once, and write all of them in order at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemm.batch.inputs import Item
from wemm.batch.journal import Journal
from wemm.batch.order import image_order
from wemm.batch.question import Answer, Client, Question, keys
from wemm.progress import ProgressBar


def answer_all(
    client: Client,
    questions: Sequence[Question],
    journal: Journal,
    progress: ProgressBar,
    describe: Callable[[], str] = lambda: "answering",
    hear: Callable[[int, Answer], None] = lambda place, answer: None,
) -> list[Answer]:
    """Answers in the order of the questions; those in the journal are not asked again.

    `hear` is told every answer as it is known, those of an earlier run first; `describe` is what the bar says.
    Raises StorageError, EndpointError, RankError: all that was answered is in the journal then.
    """
    names = keys(questions)
    answers = {
        place: Answer.from_record(journal.records[name])
        for place, name in enumerate(names)
        if name in journal.records
    }
    for place, answer in answers.items():
        hear(place, answer)
    remaining = [place for place in image_order(questions) if place not in answers]
    asked = client.answers(questions[place] for place in remaining)
    with progress(describe, len(remaining), "answers") as advance, contextlib.closing(asked):
        for i, answer in asked:
            place = remaining[i]
            answers[place] = answer
            journal.append(names[place], answer.record())
            hear(place, answer)
            advance(1)
    return [answers[place] for place in range(len(questions))]


@dataclass(frozen=True)
class BatchSummary:
    """What a batch came to."""

    num_items: int
    num_errors: int
    first_error: str | None
    num_kept: int
    """Answered by an earlier run."""


def run_batch(
    client: Client,
    items: Sequence[Item],
    target: Path,
    settings: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    progress: ProgressBar,
) -> BatchSummary:
    """Answer every item and write TARGET: a line per item, in order, its input with the answer beside it."""
    with Journal(target, settings, resume, overwrite) as journal:
        num_kept = len(journal.records)
        answers = answer_all(client, [item.question for item in items], journal, progress)
        journal.publish({**item.line, **answer.record()} for item, answer in zip(items, answers, strict=True))
    errors = [answer.error for answer in answers if answer.error is not None]
    return BatchSummary(len(items), len(errors), errors[0] if errors else None, num_kept)
