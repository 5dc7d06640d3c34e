"""Accuracy on the held-out set, per task and language, through the engine; and what breaks it.

python -m training.evaluate --count 500 --output docs/nano.json

An answer is right if it is the expected one, character by character. The last columns repeat the test
with the image path damaged: without PLoRA, with the visual tokens of each image shuffled, with the
image of another item. A model that reads its images must fail there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from training.held_out import SETS, Item, held_out_items
from training.tasks import LANGUAGES
from wemm import LLM, SamplingParams
from wemm.evaluation.metrics.interval import wilson_interval
from wemm.progress import terminal_bar

GOALS = {
    "number": 0.98, "word": 0.95, "word, new font": 0.90,
    "colour": 0.99, "count": 0.96, "relation": 0.93, "exists": 0.92,
}  # fmt: skip
_MAX_TOKENS = 48


@dataclass(frozen=True)
class Score:
    """Right answers of some items."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / max(1, self.total)

    def as_json(self) -> dict[str, Any]:
        """With its 95 % interval."""
        low, high = wilson_interval(self.accuracy, self.total)
        return {"accuracy": round(self.accuracy, 4), "low": round(low, 4), "high": round(high, 4), "n": self.total}

    def __str__(self) -> str:
        low, high = wilson_interval(self.accuracy, self.total)
        return f"{100 * self.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def answers(llm: LLM, items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
    """What the model says about each item, greedily."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image},
                                      {"type": "text", "text": item.question.text}]}]
        for item, image in zip(items, images, strict=True)
    ]  # fmt: skip
    outputs = llm.chat(conversations, SamplingParams(max_tokens=_MAX_TOKENS), progress=terminal_bar)
    return [output.outputs[0].text for output in outputs]


def right(items: Sequence[Item], given: Sequence[str]) -> list[bool]:
    """Whether each answer is the expected one."""
    return [item.question.answer == text.strip() for item, text in zip(items, given, strict=True)]


def score(flags: Sequence[bool]) -> Score:
    """Count."""
    return Score(sum(flags), len(flags))


def shuffle_visual_tokens(llm: LLM) -> None:
    """From now on the grid tokens of every image arrive in random order."""
    generator = torch.Generator().manual_seed(0)

    def shuffle(module: torch.nn.Module, arguments: Any, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[torch.randperm(len(tokens), generator=generator)]

    llm.model.downsampler.register_forward_hook(shuffle)


def evaluate(model: str, count: int, damaged_count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Scores of every set: whole, by language, by size, and damaged."""
    items = {name: list(held_out_items(name, count)) for name in SETS}
    report: dict[str, Any] = {name: {} for name in SETS}
    with LLM(model, **options) as llm:
        for name, members in items.items():
            flags = right(members, answers(llm, members, [item.picture.image for item in members]))
            report[name]["all"] = score(flags)
            for language in LANGUAGES:
                chosen = [f for f, i in zip(flags, members, strict=True) if i.question.language == language]
                report[name][language] = score(chosen)
            report[name]["new size"] = score([f for f, i in zip(flags, members, strict=True) if i.new_size])
            others = [item.picture.image for item in [*members[1:], members[0]]][:damaged_count]
            few = members[:damaged_count]
            report[name]["other image"] = score(right(few, answers(llm, few, others)))
    # Images go through the tower one by one, so that only tokens of the same image are mixed.
    with LLM(model, **{**options, "max_num_seqs": 1}) as llm:
        shuffle_visual_tokens(llm)
        _damaged(llm, items, damaged_count, report, "shuffled")
    with LLM(model, **{**options, "plora": False}) as llm:
        _damaged(llm, items, damaged_count, report, "no PLoRA")
    return report


def _damaged(llm: LLM, items: dict[str, list[Item]], count: int, report: dict[str, Any], column: str) -> None:
    for name, members in items.items():
        few = members[:count]
        report[name][column] = score(right(few, answers(llm, few, [item.picture.image for item in few])))


def print_report(report: dict[str, Any]) -> None:
    """One row per set: accuracy in per cent with its 95 % interval."""
    columns = list(next(iter(report.values())))
    table = Table("set", "goal", *columns)
    for name, scores in report.items():
        goal = f"{100 * GOALS[name]:.0f}" if name in GOALS else ""
        table.add_row(name, goal, *(str(scores[column]) for column in columns))
    Console(width=160).print(table)


def _main(
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint to test.")] = "nano",
    count: Annotated[int, typer.Option(help="Items per set.")] = 500,
    damaged_count: Annotated[int, typer.Option(help="Items per set for each damaged run.")] = 100,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure accuracy on the held-out set."""
    report = evaluate(model, count, damaged_count, {"dtype": dtype})
    print_report(report)
    if output is not None:
        data = {name: {c: s.as_json() for c, s in scores.items()} for name, scores in report.items()}
        output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(_main)
