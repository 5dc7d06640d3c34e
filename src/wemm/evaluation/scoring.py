"""Answers → scores → one accuracy, by either tool's rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wemm.batch.question import Answer
from wemm.errors import ParameterError
from wemm.evaluation.metrics.interval import wilson_interval
from wemm.evaluation.metrics.modeltest_accuracy import modeltest_accuracy
from wemm.evaluation.metrics.vqa_accuracy import vqa_accuracy
from wemm.evaluation.textvqa import Sample

SCORINGS = ("official", "modeltest")


@dataclass(frozen=True)
class Score:
    """One question by both rules; None: nothing that could be scored."""

    official: float | None
    modeltest: float


@dataclass(frozen=True)
class Accuracy:
    """A mean of scores in 0..1 with its 95 % interval."""

    accuracy: float
    num_scored: int

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end."""
        return wilson_interval(self.accuracy, self.num_scored)


def score(sample: Sample, answer: Answer) -> Score:
    """A question without an answer has no official score. The original's tool scores it 0."""
    if answer.error is not None:
        return Score(None, 0.0)
    try:
        modeltest = modeltest_accuracy(answer.text, sample.answers)
    except ParameterError:
        modeltest = 0.0  # a text too long for it: it counts the question as failed
    return Score(vqa_accuracy(answer.text, sample.references), modeltest)


def mean(scores: Sequence[Score], scoring: str) -> Accuracy:
    """Over the questions that have a score."""
    values = [value for value in (getattr(score, scoring) for score in scores) if value is not None]
    return Accuracy(sum(values) / len(values) if values else 0.0, len(values))
