"""What is asked and what came of it, whoever answers: the engine in this process or a service."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from wemm.errors import WemmError
from wemm.processing.chat_template import Message
from wemm.request import SamplingParams


@dataclass(frozen=True)
class Question:
    """One conversation to continue."""

    messages: Sequence[Message]
    """Image parts hold paths, or `data:` URLs."""
    sampling: SamplingParams

    @property
    def image_paths(self) -> list[str]:
        """Files that the messages show, in order."""
        parts = [part for message in self.messages for part in _parts(message)]
        return [str(part["image"]) for part in parts if part.get("type") == "image"]


@dataclass(frozen=True)
class Answer:
    """The answer, or why there is none."""

    text: str = ""
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    """None: a service does not tell."""
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """From being asked to the last token."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds per stage, where the engine is ours."""
    error: str | None = None
    error_type: str | None = None

    @classmethod
    def failed(cls, error: WemmError, error_type: str | None = None) -> Answer:
        """No answer, and why."""
        return cls(error=str(error), error_type=error_type or type(error).__name__)

    def record(self) -> dict[str, Any]:
        """JSON-ready: an error alone, or everything but the error."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        if self.error is not None:
            return {"error": self.error, "error_type": self.error_type}
        return values

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Answer:
        """What `record` made; other keys are left alone."""
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        if known.get("token_ids") is not None:
            known["token_ids"] = tuple(known["token_ids"])
        return cls(**known)


class Client(Protocol):
    """Whoever answers."""

    @property
    def model(self) -> str:
        """Its name."""

    def answers(self, questions: Iterable[Question]) -> Generator[tuple[int, Answer], None, None]:
        """(place, answer) as each is done; questions are taken as they are needed.

        What fails for one question is its answer's `error`; what would fail for all of them is raised.
        """


def user_turn(text: str, images: Iterable[str | Path] = ()) -> list[Message]:
    """One user message, the images before the text."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": str(image)} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def keys(questions: Iterable[Question]) -> list[str]:
    """A name for every question that follows from what is asked, so that it survives a restart.

    The same question again is another item: it gets a number behind its name.
    """
    seen: Counter[str] = Counter()
    names = []
    for question in questions:
        asked = json.dumps([question.messages, asdict(question.sampling)], sort_keys=True, default=str)
        name = hashlib.sha256(asked.encode()).hexdigest()[:24]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def _parts(message: Message) -> Iterable[Mapping[str, Any]]:
    content = message.get("content")
    return [] if content is None or isinstance(content, str) else content
