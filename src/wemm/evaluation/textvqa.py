"""TextVQA's files → questions and the answers that people gave.

DATA is a JSONL file, an object a line: image (absolute, or relative to the file), question, question_id. Beside it
lies NAME_annotations.json, NAME being what stands before the first dot of DATA's name:
{"annotations": [{"question_id", "answers": [{"answer", "answer_id", …} x 10]}]}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemm.batch.inputs import json_lines
from wemm.errors import ParameterError


@dataclass(frozen=True)
class Sample:
    """One question of the set."""

    question_id: int | str
    image: str
    """As the file names it."""
    image_path: str
    question: str
    answers: tuple[Mapping[str, Any], ...]
    """As annotated: `answer`, and mostly `answer_id`."""

    @property
    def references(self) -> list[str]:
        """What people answered."""
        return [answer["answer"] for answer in self.answers]


def annotations_file(data: Path) -> Path:
    """Where the answers of a data file lie."""
    return data.with_name(f"{data.name.split('.')[0]}_annotations.json")


def load_samples(data: Path, limit: int | None = None) -> list[Sample]:
    """The first `limit` questions, or all. Raises ParameterError naming file and line."""
    lines = list(json_lines(data))[:limit]
    if not lines:
        raise ParameterError(f"{data} has no questions")
    answers = _annotations(annotations_file(data))
    samples = [_sample(where, line, data.parent, answers) for where, line in lines]
    if len({sample.question_id for sample in samples}) < len(samples):
        raise ParameterError(f"{data}: a question_id occurs twice; every question needs its own")
    return samples


def data_sha256(data: Path) -> str:
    """Of questions and annotations together: which set a figure is about."""
    digest = hashlib.sha256(data.read_bytes())
    digest.update(annotations_file(data).read_bytes())
    return digest.hexdigest()


def _sample(where: str, line: Mapping[str, Any], directory: Path, answers: Mapping[int | str, Any]) -> Sample:
    for name in ("image", "question"):
        if not isinstance(line.get(name), str) or not line[name]:
            raise ParameterError(f"{where}: {name} must be text. Given: {line.get(name)!r}")
    question_id = line.get("question_id")
    if not isinstance(question_id, (int, str)) or isinstance(question_id, bool):
        raise ParameterError(f"{where}: question_id must be a number or text. Given: {question_id!r}")
    if question_id not in answers:
        raise ParameterError(f"{where}: question_id {question_id!r} has no annotation")
    given = answers[question_id]
    if not isinstance(given, list) or not given or not all(_is_answer(answer) for answer in given):
        raise ParameterError(
            f"the annotation of question_id {question_id!r} needs answers: a list of objects with `answer`"
        )
    path = (directory / Path(line["image"]).expanduser()).absolute()
    texts = tuple({**answer, "answer": str(answer["answer"])} for answer in given)
    return Sample(question_id, line["image"], str(path), line["question"], texts)


def _is_answer(answer: Any) -> bool:
    return isinstance(answer, dict) and isinstance(answer.get("answer"), (str, int, float))


def _annotations(file: Path) -> dict[int | str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))["annotations"]
        return {entry["question_id"]: entry["answers"] for entry in entries}
    except OSError as error:
        raise ParameterError(
            f"{file} cannot be read: {error.strerror or error}; the annotations lie beside the questions"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ParameterError(
            f'{file} must be {{"annotations": [{{"question_id", "answers"}}, …]}}: {problem}'
        ) from None
