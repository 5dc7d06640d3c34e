"""What a model is calibrated on: pictures with questions, rendered as the engine would."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from wemm.batch.inputs import read_items
from wemm.batch.question import user_turn
from wemm.checkpoint.checkpoint import Checkpoint
from wemm.errors import MediaError, ParameterError
from wemm.processing.chat_template import Message
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.processor import ProcessedPrompt, Processor, image_reader
from wemm.processing.tokenizer import Tokenizer
from wemm.request import SamplingParams

QUESTIONS = (
    "请描述这张图片。",
    "What is in the picture?",
    "图中写了什么？",
    "What is written here?",
    "图中有几个物体？",
    "How many objects are there, and what colour are they?",
)
"""For pictures that come without."""


def sample_prompts(
    checkpoint: Checkpoint, sources: Sequence[Path], questions: Sequence[str], num_samples: int
) -> list[ProcessedPrompt]:
    """At most `num_samples` prompts about images, folders of images and JSONL files (batch/inputs.py).

    Every picture comes once, with one question after the other, before any comes again. Raises MediaError,
    ParameterError, PromptError.
    """
    if num_samples < 1:
        raise ParameterError(f"a calibration needs 1 sample or more. Given: {num_samples}")
    text = checkpoint.config.text
    read_image = image_reader(ImageProcessor(checkpoint.config))
    processor = Processor(
        Tokenizer(checkpoint.directory), read_image, text.max_position_embeddings, text.vocab_size
    )
    try:
        return [processor.chat(messages) for messages in _conversations(sources, questions, num_samples)]
    except MediaError as error:
        raise MediaError(f"{error}; calibrate without it", error.param) from None


def _conversations(
    sources: Sequence[Path], questions: Sequence[str], num_samples: int
) -> Sequence[Sequence[Message]]:
    by_question = [list(_asked(sources, question)) for question in questions]
    num_pictures = len(by_question[0])
    if num_pictures > num_samples:  # evenly spaced: names tend to be sorted by what is shown
        chosen = [i * num_pictures // num_samples for i in range(num_samples)]
        return [by_question[j % len(questions)][i] for j, i in enumerate(chosen)]
    rounds = [by_question[(i + j) % len(questions)][i] for j in range(len(questions)) for i in range(num_pictures)]
    distinct = {json.dumps(messages): messages for messages in rounds}  # some bring a question of their own
    return list(distinct.values())[:num_samples]


def _asked(sources: Sequence[Path], question: str) -> Iterator[Sequence[Message]]:
    for source in sources:
        if source.is_dir() or source.suffix.lower() == ".jsonl":
            items = read_items(source, [question], SamplingParams(), recursive=True)
            yield from (item.question.messages for item in items)
        else:
            yield user_turn(question, [source])
