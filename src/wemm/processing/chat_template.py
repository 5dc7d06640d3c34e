"""Messages → segments: text, control tokens and images, in the order the model reads them.

The original's template, kept to the letter for [image, text]: BOS, <|im_start|>user NL IMAGE NL
TEXT <|im_end|><|im_start|>assistant NL. There is no newline after <|im_end|>. Further turns, system
messages and several images are our extension by the same rules: parts of a message are joined by
a newline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wemm.errors import PromptError
from wemm.processing.resize import DETAILS
from wemm.processing.tokenizer import IM_END, IM_START

ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """Plain text: encoded as such, whatever it spells."""

    text: str


@dataclass(frozen=True)
class Control:
    """A control token by name."""

    name: str


@dataclass(frozen=True)
class ImagePart:
    """An image, and where in the messages it stands (for errors)."""

    source: Any
    param: str
    detail: str = DETAILS[0]
    """One of DETAILS."""


Segment = Text | Control | ImagePart


def render(messages: Sequence[Message]) -> list[Segment]:
    """Segments of a conversation up to and including the assistant's header. Raises PromptError."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise PromptError("messages must be a non-empty list of {role, content}", "messages")
    segments: list[Segment] = []
    for i, message in enumerate(messages):
        role, parts = _parse_message(message, f"messages[{i}]")
        segments += [Control(IM_START), Text(f"{role}\n")]
        for j, part in enumerate(parts):
            segments += [Text("\n"), part] if j else [part]
        segments.append(Control(IM_END))
    if messages[-1]["role"] != "user":
        raise PromptError(f"the last message must be the user's. Given: {messages[-1]['role']!r}", "messages")
    segments += [Control(IM_START), Text("assistant\n")]
    return _merge_text(segments)


def _parse_message(message: Any, param: str) -> tuple[str, list[Text | ImagePart]]:
    if not isinstance(message, Mapping):
        problem = f"{param} must be an object with role and content. Given: {type(message).__name__}"
        raise PromptError(problem, param)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        problem = f"{param}.role must be one of {', '.join(ROLES)}. Given: {role!r}"
        raise PromptError(problem, f"{param}.role")
    if isinstance(content, str):
        return role, [Text(content)]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)) or not content:
        problem = f"{param}.content must be a string or a non-empty list of parts"
        raise PromptError(problem, f"{param}.content")
    parts = [_parse_part(part, f"{param}.content[{j}]") for j, part in enumerate(content)]
    if role != "user" and any(isinstance(part, ImagePart) for part in parts):
        raise PromptError(f"{param}: only the user's messages may hold images", f"{param}.content")
    return role, parts


def _parse_part(part: Any, param: str) -> Text | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image" and part.get("image") is not None:
        return ImagePart(part["image"], f"{param}.image", _parse_detail(part, f"{param}.detail"))
    if kind == "image_url":
        holder = part.get("image_url")
        url = holder.get("url") if isinstance(holder, Mapping) else holder
        if not isinstance(url, bytes) and (not isinstance(url, str) or ":" not in url):
            raise PromptError(f"{param}.image_url must hold a URL", f"{param}.image_url")
        detail = _parse_detail(holder if isinstance(holder, Mapping) else {}, f"{param}.image_url.detail")
        return ImagePart(url, f"{param}.image_url", detail)
    raise PromptError(
        f'{param} must be {{"type": "text", "text": …}}, {{"type": "image", "image": …}} '
        'or {"type": "image_url", "image_url": {"url": …}}',
        param,
    )


def _parse_detail(holder: Mapping[str, Any], param: str) -> str:
    detail = holder.get("detail") or DETAILS[0]
    if detail not in DETAILS:
        raise PromptError(f"{param} must be one of {', '.join(DETAILS)}. Given: {detail!r}", param)
    return detail


def _merge_text(segments: Sequence[Segment]) -> list[Segment]:
    # Neighbouring texts are one text: the tokenizer must see "user\nWhy" whole, as the original's does.
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if isinstance(segment, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + segment.text)
        else:
            merged.append(segment)
    return [segment for segment in merged if segment != Text("")]
