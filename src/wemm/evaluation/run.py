"""Ask every question of a set, score the answers, write what came out: samples.jsonl and summary.json."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from wemm import __version__
from wemm.batch.journal import Journal
from wemm.batch.question import Answer, Client, Question, user_turn
from wemm.batch.run import answer_all
from wemm.config import option
from wemm.errors import ClientError, ParameterError, StorageError
from wemm.evaluation.scoring import SCORINGS, Score, mean, score
from wemm.evaluation.textvqa import Sample, data_sha256, load_samples
from wemm.progress import ProgressBar
from wemm.request import SamplingParams

DEFAULT_SUFFIX = " Answer the question using a single word or phrase."


@dataclass(frozen=True)
class TextVqaSettings:
    """What is asked, how, and how it is scored."""

    data: Path = field(metadata={"help": "JSONL of questions; NAME_annotations.json lies beside it."})
    output: Path = field(metadata={"help": "Directory for samples.jsonl and summary.json."})
    scoring: str = option(
        "official",
        "official: VQA accuracy as TextVQA's own evaluation computes it. modeltest: as the original's test tool "
        "does; docs/evaluation.md says where they differ. The summary has both figures either way.",
    )
    prompt_prefix: str = option("", "Text before every question.")
    prompt_suffix: str = option(
        DEFAULT_SUFFIX,
        "Text behind every question. The default is what the original's tool asks its other models; what it asked "
        "WeMM is not known.",
    )
    limit: int | None = option(None, "Only the first questions, this many.")
    resume: bool = option(False, "Go on where a run that ended early stopped.")
    overwrite: bool = option(False, "Start again, whatever is there.")

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ParameterError(f"scoring must be {' or '.join(SCORINGS)}. Given: {self.scoring!r}")
        if self.limit is not None and self.limit < 1:
            raise ParameterError(f"limit must be at least 1. Given: {self.limit}")

    @property
    def samples_file(self) -> Path:
        """Where answers are kept, and what stands at the end."""
        return self.output / "samples.jsonl"

    def question(self, sample: Sample, sampling: SamplingParams) -> Question:
        """As the model is asked."""
        text = f"{self.prompt_prefix}{sample.question}{self.prompt_suffix}"
        return Question(user_turn(text, [sample.image_path]), sampling)


@dataclass(frozen=True)
class Evaluation:
    """A finished run."""

    samples: Sequence[Sample]
    answers: Sequence[Answer]
    scores: Sequence[Score]
    summary: Mapping[str, Any]
    """As in summary.json."""


def evaluate(
    client: Client,
    settings: TextVqaSettings,
    sampling: SamplingParams,
    client_settings: Mapping[str, Any],
    progress: ProgressBar,
) -> Evaluation:
    """Run to the end, or raise with every answer kept for `resume`.

    Raises ParameterError, StorageError, EndpointError, RankError; ClientError if no question was answered.
    """
    samples = load_samples(settings.data, settings.limit)
    questions = [settings.question(sample, sampling) for sample in samples]
    started = time.perf_counter()
    scored = _Scores(samples, settings.scoring)
    target = settings.samples_file
    asked = {**client_settings, **_asked(settings, sampling)}
    with Journal(target, asked, settings.resume, settings.overwrite) as journal:
        # That of an earlier run must not stand beside half of this one.
        (settings.output / "summary.json").unlink(missing_ok=True)
        answers = answer_all(client, questions, journal, progress, scored.describe, scored.hear)
        scores = scored.in_order()
        journal.publish(_line(*one, settings, sampling) for one in zip(samples, answers, scores, strict=True))
    errors = [answer.error for answer in answers if answer.error is not None]
    if len(errors) == len(answers):
        raise ClientError(f"no question was answered (see {target}); the first: {errors[0]}")
    summary = _summary(client, settings, sampling, client_settings, scores, len(errors))
    summary["seconds"] = round(time.perf_counter() - started, 3)
    _write(settings.output / "summary.json", summary)
    return Evaluation(samples, answers, scores, summary)


class _Scores:
    """Every answer scored once, as it is heard; and the mean so far, for the bar."""

    def __init__(self, samples: Sequence[Sample], scoring: str) -> None:
        self._samples = samples
        self._scoring = scoring
        self._scores: dict[int, Score] = {}
        self._total = 0.0
        self._num_scored = 0

    def hear(self, place: int, answer: Answer) -> None:
        one = self._scores[place] = score(self._samples[place], answer)
        value = getattr(one, self._scoring)
        if value is not None:
            self._total += value
            self._num_scored += 1

    def describe(self) -> str:
        if not self._num_scored:
            return "textvqa"
        return f"textvqa, {100 * self._total / self._num_scored:.2f} % so far"

    def in_order(self) -> list[Score]:
        return [self._scores[place] for place in range(len(self._samples))]


def _summary(
    client: Client,
    settings: TextVqaSettings,
    sampling: SamplingParams,
    client_settings: Mapping[str, Any],
    scores: Sequence[Score],
    num_errors: int,
) -> dict[str, Any]:
    accuracy = mean(scores, settings.scoring)
    return {
        "task": "textvqa",
        "model": client.model,
        "scoring": settings.scoring,
        "accuracy": accuracy.accuracy,
        "interval": list(accuracy.interval),
        "num_samples": len(scores),
        "num_errors": num_errors,
        "num_scored": accuracy.num_scored,
        "accuracies": {scoring: mean(scores, scoring).accuracy for scoring in SCORINGS},
        "data_sha256": data_sha256(settings.data),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "wemm": __version__,
        "settings": {**client_settings, **_asked(settings, sampling), "data": str(settings.data)},
    }


def _asked(settings: TextVqaSettings, sampling: SamplingParams) -> dict[str, Any]:
    """What answers depend on. Not `limit`: a longer run may go on with a shorter one's answers."""
    return {
        "prompt_prefix": settings.prompt_prefix,
        "prompt_suffix": settings.prompt_suffix,
        "sampling": asdict(sampling),
    }


def _line(
    sample: Sample, answer: Answer, scored: Score, settings: TextVqaSettings, sampling: SamplingParams
) -> dict[str, Any]:
    asked = settings.question(sample, sampling).messages[-1]["content"][-1]["text"]
    return {
        "question_id": sample.question_id,
        "image": sample.image,
        "question": sample.question,
        "prompt": asked,
        "references": sample.references,
        "score": getattr(scored, settings.scoring),
        "scores": asdict(scored),
        **answer.record(),
    }


def _write(path: Path, summary: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None
