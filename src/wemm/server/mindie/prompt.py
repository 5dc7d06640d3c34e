"""What a prompt says: raw text, or the parts of one question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from wemm.errors import ClientError, ParameterError
from wemm.server.body import parse_json
from wemm.server.openai.protocol import Items, Part, TextPart
from wemm.server.service import Messages

_PARTS: TypeAdapter[list[Part]] = TypeAdapter(Items[Part])
_KNOWN_TYPES = frozenset({"text", "image_url", "video_url", "audio_url", "input_audio"})
_SCHEME_LEN = 8


@dataclass(frozen=True)
class Prompt:
    """A text that the model continues, or one message that it answers."""

    source: str | Messages
    """As a Question takes it."""
    text: str
    """What it says in words."""

    @property
    def has_images(self) -> bool:
        """Whether it is more than text."""
        return not isinstance(self.source, str) and any(
            part["type"] != "text" for message in self.source for part in message["content"]
        )


def read_prompt(given: str | Sequence[Part], param: str) -> Prompt:
    """Raises ParameterError."""
    parts = _spelled_parts(given, param) if isinstance(given, str) else given
    if parts is None:
        assert isinstance(given, str)
        return Prompt(given, given)
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    content = [_template_part(part) for part in parts]
    return Prompt([{"role": "user", "content": content}], "\n".join(texts))


def _spelled_parts(text: str, param: str) -> list[Part] | None:
    """The parts, if the text is a JSON list of such.

    MindIE takes every JSON list for one and fails where it is none ("[1, 2]"): here that is text.
    """
    if not (text.startswith("[") and text.rstrip().endswith("]")):
        return None
    try:
        value = parse_json(text.encode())
    except (ClientError, UnicodeEncodeError):
        return None
    if not value or not all(isinstance(part, dict) and part.get("type") in _KNOWN_TYPES for part in value):
        return None
    try:
        return _PARTS.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ParameterError(f"{param}[{problem['loc'][0]}]: {problem['msg']}", param) from None


def _template_part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    holder = part.image_url
    url, detail = (holder, None) if isinstance(holder, str) else (holder.url, holder.detail)
    return {"type": "image_url", "image_url": {"url": _full_url(url), "detail": detail}}


def _full_url(url: str) -> str:
    """MindIE also takes bare base64 of a JPEG, and a path."""
    if ":" in url[:_SCHEME_LEN]:
        return url
    if "." not in url:  # a name of an image ends in .jpg, .jpeg or .png; base64 has no dot
        return f"data:image/jpeg;base64,{url}"
    return f"file://{quote(url)}" if url.startswith("/") else url
