"""The held-out set: other seeds, image sizes and fonts that no training image has, balanced answers.

python -m training.held_out DIRECTORY --count 500

writes the images and, in TextVQA's file format, nano_val.jsonl and nano_val_annotations.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from training.images import (
    HELD_OUT_FONTS,
    TRAINING_FONTS,
    Picture,
    draw_shapes,
    draw_text,
    random_text,
    sample_size,
)
from training.tasks import (
    LANGUAGES,
    MAX_COUNT,
    TEXT_TASKS,
    Question,
    ask_scene,
    ask_text,
    sample_scene,
    sample_text,
)
from wemm.progress import terminal_bar

SETS = (
    "number",
    "word",
    "number, new font",
    "word, new font",
    "colour",
    "count",
    "exists",
    "relation",
    "describe",
)
_NEW_FONT = ", new font"
_SEED = 20_002
_NUM_ANSWERS = 10


@dataclass(frozen=True)
class Item:
    """One question about one image of its own."""

    set_name: str
    picture: Picture
    question: Question
    new_size: bool
    """True if no training image has this long edge."""


def held_out_items(set_name: str, count: int, seed: int = _SEED) -> Iterator[Item]:
    """Items of one set; languages alternate, every second pair has an image size never trained on."""
    for i in range(count):
        rng = np.random.default_rng([seed, SETS.index(set_name), i])
        language, new_size = LANGUAGES[i % 2], i % 4 >= 2
        task = set_name.removesuffix(_NEW_FONT)
        if task in TEXT_TASKS:
            fonts = HELD_OUT_FONTS if set_name.endswith(_NEW_FONT) else TRAINING_FONTS
            alphabet, lengths = sample_text(rng, task)
            text = random_text(rng, alphabet, lengths)
            picture = draw_text(rng, text, sample_size(rng, (1.2, 4.0), new_size), fonts)
            yield Item(set_name, picture, ask_text(rng, task, text, language), new_size)
        else:
            wanted = _balanced_answer(task, language, i // 4)
            while True:
                size = sample_size(rng, (0.6, 2.4), new_size)
                picture = draw_shapes(rng, sample_scene(rng, task, 8), size)
                question = ask_scene(rng, task, picture, language)
                if question is not None and wanted in (None, question.answer):
                    break
            yield Item(set_name, picture, question, new_size)


def _balanced_answer(task: str, language: str, i: int) -> str | None:
    """What the i-th item of a language and size must be answered with, where answers are few."""
    if task == "exists":
        return (("yes", "no") if language == "en" else ("有", "没有"))[i % 2]
    return str(i % (MAX_COUNT + 1)) if task == "count" else None


def write_held_out(directory: Path, count: int, seed: int = _SEED) -> Path:
    """Write the set as TextVQA files; returns the path of the jsonl. Image paths in it are relative to it."""
    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with terminal_bar("drawing", count * len(SETS), "images") as advance:
        for set_name in SETS:
            for item in held_out_items(set_name, count, seed):
                question_id = len(lines)
                name = f"images/{question_id:05d}.png"
                item.picture.image.save(directory / name)
                question, answer = item.question.text, item.question.answer
                lines.append({"image": name, "question": question, "question_id": question_id, "answer": answer,
                              "set": set_name, "language": item.question.language})  # fmt: skip
                answers = [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i in range(_NUM_ANSWERS)
                ]
                annotations.append({"question_id": question_id, "question": question, "answers": answers})
                advance(1)
    jsonl = directory / "nano_val.jsonl"
    jsonl.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    text = json.dumps({"annotations": annotations}, ensure_ascii=False)
    (directory / "nano_val_annotations.json").write_text(text, encoding="utf-8")
    return jsonl


def _main(
    directory: Annotated[Path, typer.Argument(help="Where to write.")],
    count: Annotated[int, typer.Option(help="Items per set.")] = 500,
    seed: Annotated[int, typer.Option(help="Another seed gives another set.")] = _SEED,
) -> None:
    """Write the held-out set in TextVQA's file format."""
    print(write_held_out(directory, count, seed))


if __name__ == "__main__":
    typer.run(_main)
