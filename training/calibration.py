"""Pictures and questions to calibrate nano on, drawn as training drew them, from seeds that it never saw.

python -m training.calibration DIRECTORY --count 128

writes the images and questions.jsonl, which `wemm quantize --calibrate` reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from training.images import TRAINING_FONTS, Picture, draw_shapes, draw_text, random_text, sample_size
from training.tasks import TEXT_TASKS, Question, ask_scene, ask_text, sample_scene, sample_text

_TASKS = ("number", "word", "colour", "count", "exists", "relation", "describe")
_SEED = 30_003


def write_samples(directory: Path, count: int, seed: int = _SEED) -> Path:
    """Write the samples, one task after the other; returns the path of the jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture, question = _sample(np.random.default_rng([seed, i]), _TASKS[i % len(_TASKS)])
        name = f"{i:05d}.png"
        picture.image.save(directory / name)
        lines.append(json.dumps({"image": name, "prompt": question.text}, ensure_ascii=False) + "\n")
    jsonl = directory / "questions.jsonl"
    jsonl.write_text("".join(lines), encoding="utf-8")
    return jsonl


def _sample(rng: np.random.Generator, task: str) -> tuple[Picture, Question]:
    if task in TEXT_TASKS:
        text = random_text(rng, *sample_text(rng, task))
        return draw_text(rng, text, sample_size(rng, (1.2, 4.0)), TRAINING_FONTS), ask_text(rng, task, text)
    while True:
        picture = draw_shapes(rng, sample_scene(rng, task, 8), sample_size(rng, (0.6, 2.4)))
        question = ask_scene(rng, task, picture)
        if question is not None:
            return picture, question


def _main(
    directory: Annotated[Path, typer.Argument(help="Where to write.")],
    count: Annotated[int, typer.Option(help="Pictures, each with a question.")] = 128,
    seed: Annotated[int, typer.Option(help="Another seed gives other samples.")] = _SEED,
) -> None:
    """Write pictures and questions to calibrate on."""
    print(write_samples(directory, count, seed))


if __name__ == "__main__":
    typer.run(_main)
