"""A folder or a JSONL file → what is asked, item by item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from wemm.batch.question import Question, user_turn
from wemm.errors import ParameterError
from wemm.processing.chat_template import Message
from wemm.request import SamplingParams

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_WHOLE_RUN = {"n", "logprobs", "structured_outputs"}
_SAMPLING_KEYS = frozenset(field.name for field in fields(SamplingParams)) - _WHOLE_RUN


@dataclass(frozen=True)
class Item:
    """One line of the output, but for the answer."""

    line: Mapping[str, Any]
    question: Question


def read_items(
    source: Path, prompts: Sequence[str], sampling: SamplingParams, recursive: bool = False
) -> list[Item]:
    """Every image of a folder with every prompt, or every line of a JSONL file. Raises ParameterError.

    A line has `messages`, or `prompt` and `image` (a path or a list of them, relative to the file), or is one
    of OpenAI's batch format (`body`). Sampling parameters beside them hold for that line. A line without a
    prompt of its own takes each of `prompts`.
    """
    if source.is_dir():
        return list(_from_folder(source, prompts, sampling, recursive))
    if not source.exists():
        raise ParameterError(f"{source} does not exist: give a folder of images or a JSONL file")
    return list(_from_jsonl(source, prompts, sampling))


def read_prompts(file: Path) -> list[str]:
    """One question per line; empty lines are left out. Raises ParameterError."""
    prompts = [line.strip() for line in _text(file).splitlines() if line.strip()]
    if not prompts:
        raise ParameterError(f"{file} has no question: write one per line")
    return prompts


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of every line that is not empty. Raises ParameterError."""
    for number, text in enumerate(_text(file).split("\n"), 1):
        if not text.strip():
            continue
        where = f"line {number} of {file}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"{where} is not JSON: {error}") from None
        if not isinstance(line, dict):
            raise ParameterError(f"{where} must be an object. Given: {text[:80]}")
        yield where, line


def _from_folder(
    folder: Path, prompts: Sequence[str], sampling: SamplingParams, recursive: bool
) -> Iterator[Item]:
    if not prompts:
        raise ParameterError("a folder has no questions: give --prompt TEXT or --questions FILE")
    found = sorted(folder.rglob("*") if recursive else folder.iterdir())
    images = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not images:
        hint = "" if recursive else ", or --recursive for the folders in it"
        raise ParameterError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)}){hint}")
    for image in images:
        name = image.relative_to(folder).as_posix()
        for prompt in prompts:
            question = Question(user_turn(prompt, [image.absolute()]), sampling)
            yield Item({"image": name, "prompt": prompt}, question)


def _from_jsonl(file: Path, prompts: Sequence[str], sampling: SamplingParams) -> Iterator[Item]:
    for where, line in json_lines(file):
        body = line.get("body", line)
        if not isinstance(body, dict):
            raise ParameterError(f"{where}: body must be an object. Given: {body!r}")
        params = _sampling(where, body, sampling)
        if "messages" in body:
            messages = _messages(where, body["messages"], file.parent)
            yield Item(line, Question(messages, params))
            continue
        images = _images(where, body, file.parent)
        for prompt in _own_prompt(where, body) or prompts:
            yield Item({**line, "prompt": prompt}, Question(user_turn(prompt, images), params))
        if "prompt" not in body and not prompts:
            raise ParameterError(
                f"{where} has neither prompt nor messages: add one, or give --prompt or --questions"
            )


def _own_prompt(where: str, body: Mapping[str, Any]) -> list[str]:
    if "prompt" not in body:
        return []
    if not isinstance(body["prompt"], str):
        raise ParameterError(f"{where}: prompt must be text. Given: {body['prompt']!r}")
    return [body["prompt"]]


def _images(where: str, body: Mapping[str, Any], directory: Path) -> list[str]:
    images = body.get("images", body.get("image", []))
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ParameterError(f"{where}: image must be a path or a list of paths. Given: {images!r}")
    return [_path(image, directory) for image in images]


def _messages(where: str, messages: Any, directory: Path) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ParameterError(f"{where}: messages must be a list of objects. Given: {messages!r}")
    return [_message(message, directory) for message in messages]


def _message(message: Message, directory: Path) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part(part, directory) for part in content]}


def _part(part: Any, directory: Path) -> Any:
    if isinstance(part, dict) and part.get("type") == "image" and isinstance(part.get("image"), str):
        return {**part, "image": _path(part["image"], directory)}
    return part


def _path(image: str, directory: Path) -> str:
    # Absolute: an answer of an earlier run is known again from wherever the next one is started.
    is_data = image[:5].lower() == "data:"
    return image if is_data else str((directory / Path(image).expanduser()).absolute())


def _sampling(where: str, body: Mapping[str, Any], default: SamplingParams) -> SamplingParams:
    own = {name: body[name] for name in _SAMPLING_KEYS if body.get(name) is not None}
    if "max_completion_tokens" in body:
        own["max_tokens"] = body["max_completion_tokens"]
    try:
        return replace(default, **own)
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ParameterError(f"{file} cannot be read: {reason}") from None
