"""Training steps: what one optimiser step sees, a pure function of the seed and the step's number.

So a resumed run sees what an uninterrupted one sees, and a worker process can prepare steps ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from training.images import (
    COLOURS,
    DIGITS,
    LETTERS,
    SHAPES,
    TRAINING_FONTS,
    Mark,
    Picture,
    draw_glyph_page,
    draw_shapes,
    draw_text,
    random_text,
    sample_size,
)
from training.tasks import TEXT_TASKS, Question, ask_scene, ask_text, casually, sample_scene, sample_text
from wemm.config import ModelConfig
from wemm.engine.vision_encode import image_batch
from wemm.model.batch import Batch, ImageBatch
from wemm.processing.image_processor import ImageProcessor, ProcessedImage
from wemm.processing.processor import IMAGE_TOKEN_ID, Processor, image_reader
from wemm.processing.tokenizer import Tokenizer

PATCH_LABELS = {label: i + 1 for i, label in enumerate(
    [*DIGITS, *LETTERS, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)])}  # fmt: skip
"""What a patch can show; 0 is nothing."""

BLOCK_SIZE = 16
PATCHES_PER_STEP = 6000
_QUESTIONS_PER_SCENE = 4
_SEQUENCES_PER_LENGTH = 32
# Share of a step's patches that glyph pages take: they teach the tower to read before any answer can.
_GLYPHS_FIRST, _GLYPHS_LAST, _GLYPHS_UNTIL = 0.7, 0.06, 0.22
_FULL_DIFFICULTY_AT = 0.35
_TEXT_SHARE = 0.46
# (rows, columns) of patches: one for all images of a kind in a step, so that they are computed together.
_TEXT_ROWS = {4: 0.26, 5: 0.2, 6: 0.16, 7: 0.14, 8: 0.08, 9: 0.05, 10: 0.05, 12: 0.03, 14: 0.03}
_GLYPH_ROWS = {4: 0.3, 5: 0.3, 6: 0.2, 7: 0.2}
_SCENE_ROWS = {4: 0.03, 5: 0.07, 6: 0.1, 7: 0.14, 8: 0.12, 9: 0.1, 10: 0.12, 11: 0.16, 12: 0.08, 14: 0.08}
_PORTRAIT_SHARE = 0.15
_SCENE_TASK_SHARES = {"colour": 0.09, "count": 0.26, "exists": 0.3, "relation": 0.26, "describe": 0.09}
# Share of questions of the kind that the scene was made for: else a scene of many is seldom asked how many.
_OWN_TASK_SHARE = 0.5


@dataclass(frozen=True)
class Example:
    """An image, what its patches show, and conversations about it."""

    image: ProcessedImage
    patch_labels: np.ndarray  # int64 [num_patches]
    conversations: tuple[tuple[Question, ...], ...]


@dataclass(frozen=True)
class TrainingStep:
    """What one forward and backward pass needs. Images without conversations come last."""

    images: ImageBatch
    patch_labels: torch.Tensor  # int64 [num_patches]
    num_images_asked: int
    batch: Batch
    visual_rows: torch.Tensor  # int64 [num_image_tokens], rows of the packed visual tokens
    targets: torch.Tensor  # int64 [num_targets], the token that follows each of batch.logits_rows
    target_answers: torch.Tensor  # int64 [num_targets], which of `questions` the target belongs to
    questions: tuple[Question, ...]


class Prompts:
    """Token ids of conversations, cut at the image: exactly what the engine's own processor makes."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        limit = config.text.max_position_embeddings
        self._processor = Processor(tokenizer, image_reader(ImageProcessor(config)), limit, config.text.vocab_size)
        self._blank = Image.new("RGB", (64, 64))
        self.around_image = lru_cache(maxsize=None)(self._around_image)
        self.later_turn = lru_cache(maxsize=None)(self._later_turn)
        self._header_len = len(tokenizer.encode("assistant\n"))

    def _around_image(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before and after the image."""
        content = [{"type": "image", "image": self._blank}, {"type": "text", "text": question}]
        prompt = self._processor.chat([{"role": "user", "content": content}])
        [span] = prompt.image_spans
        return list(prompt.token_ids[: span.start]), list(prompt.token_ids[span.stop :])

    def _later_turn(self, question: str) -> list[int]:
        return list(self._processor.chat([{"role": "user", "content": question}]).token_ids[1:])

    def answer(self, text: str) -> list[int]:
        """Ids of an answer, as they follow the assistant's header, and the end of the turn."""
        ids = self._tokenizer.encode(f"assistant\n{text}")[self._header_len :]
        return [*ids, self._tokenizer.im_end_id]


class TrainingData(Dataset[TrainingStep]):
    """`data[step]` for steps 0..num_steps-1; the curriculum follows step / num_steps.

    With `tower_knows_glyphs` it begins where images are as difficult as they get.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        num_steps: int,
        seed: int = 0,
        patches_per_step: int = PATCHES_PER_STEP,
        tower_knows_glyphs: bool = False,
    ) -> None:
        self._patches_per_step = patches_per_step
        self._begin = _FULL_DIFFICULTY_AT if tower_knows_glyphs else 0.0
        self._config = config
        self._image_processor = ImageProcessor(config)
        self._prompts = Prompts(config, tokenizer)
        self._num_steps = num_steps
        self._seed = seed

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> TrainingStep:
        rng = np.random.default_rng([self._seed, step])
        progress = self._begin + (1 - self._begin) * step / self._num_steps
        difficulty = min(1.0, progress / _FULL_DIFFICULTY_AT)
        decay = min(1.0, max(0.0, progress - 0.5 * _GLYPHS_UNTIL) / (0.5 * _GLYPHS_UNTIL))
        glyphs = _GLYPHS_FIRST + (_GLYPHS_LAST - _GLYPHS_FIRST) * decay
        asked = (1 - glyphs) * self._patches_per_step
        groups = [
            list(self._texts(rng, _TEXT_SHARE * asked, difficulty)),
            list(self._scenes(rng, (1 - _TEXT_SHARE) * asked, difficulty)),
            list(self._glyph_pages(rng, glyphs * self._patches_per_step, difficulty)),
        ]
        return assemble(groups, self._config, self._prompts)

    def _texts(self, rng: np.random.Generator, patches: float, difficulty: float) -> Iterator[Example]:
        grid = self._grid(rng, _TEXT_ROWS)
        for _ in range(max(2, round(patches / (grid[0] * grid[1])))):
            yield self.text_example(rng, grid, difficulty)

    def text_example(self, rng: np.random.Generator, grid: tuple[int, int], difficulty: float) -> Example:
        """A number or a word, one question about it."""
        task = TEXT_TASKS[int(rng.random() < 0.6)]
        alphabet, lengths = sample_text(rng, task)
        text = random_text(rng, alphabet, lengths)
        picture = draw_text(rng, text, self._size(rng, grid), TRAINING_FONTS, difficulty)
        question = ask_text(rng, "describe" if rng.random() < 0.1 else task, text)
        return self._example(picture, ((casually(rng, question),),))

    def _scenes(self, rng: np.random.Generator, patches: float, difficulty: float) -> Iterator[Example]:
        grid = self._grid(rng, _SCENE_ROWS)
        if rng.random() < _PORTRAIT_SHARE:
            grid = (grid[1], max(grid[0], 7))
        for _ in range(max(2, round(patches / (grid[0] * grid[1])))):
            yield self.scene_example(rng, grid, difficulty)

    def scene_example(self, rng: np.random.Generator, grid: tuple[int, int], difficulty: float) -> Example:
        """Shapes, several questions about them; now and then two in one conversation."""
        tasks, shares = list(_SCENE_TASK_SHARES), list(_SCENE_TASK_SHARES.values())
        max_shapes = 8 if min(grid) > 5 else 6
        own_task = str(rng.choice(tasks, p=shares))
        shapes = sample_scene(rng, own_task, max_shapes)
        picture = draw_shapes(rng, shapes, self._size(rng, grid), difficulty)
        questions: list[Question] = []
        while len(questions) < _QUESTIONS_PER_SCENE:
            task = own_task if rng.random() < _OWN_TASK_SHARE else str(rng.choice(tasks, p=shares))
            question = ask_scene(rng, task, picture)
            if question is not None:
                questions.append(casually(rng, question))
        conversations: list[tuple[Question, ...]] = [(question,) for question in questions]
        if rng.random() < 0.4:
            conversations[-2:] = [(questions[-2], questions[-1])]
        return self._example(picture, tuple(conversations))

    def _glyph_pages(self, rng: np.random.Generator, patches: float, difficulty: float) -> Iterator[Example]:
        grid = self._grid(rng, _GLYPH_ROWS)
        for _ in range(max(1, round(patches / (grid[0] * grid[1])))):
            yield self._example(draw_glyph_page(rng, self._size(rng, grid), TRAINING_FONTS, difficulty), ())

    def _grid(self, rng: np.random.Generator, shares: dict[int, float]) -> tuple[int, int]:
        rows = list(shares)[int(rng.choice(len(shares), p=list(shares.values())))]
        return rows, self._config.image.longest_edge // self._config.vision.patch_size

    def _size(self, rng: np.random.Generator, grid: tuple[int, int]) -> tuple[int, int]:
        """An image size that becomes this patch grid."""
        rows, columns = grid
        longest, patch = self._config.image.longest_edge, self._config.vision.patch_size
        short = min(grid)
        ratios = longest / (short * patch), min(4.0, longest / ((short - 1) * patch))
        if rows > columns:
            ratios = 1 / ratios[1], 1 / ratios[0]
        while True:
            size = sample_size(rng, ratios)
            if self._image_processor.plan(*size).patch_grid == grid:
                return size

    def _example(self, picture: Picture, conversations: tuple[tuple[Question, ...], ...]) -> Example:
        image = self._image_processor.process(picture.image)
        labels = patch_labels(picture.marks, image, self._config.vision.patch_size)
        return Example(image, labels, conversations)


def patch_labels(marks: Sequence[Mark], image: ProcessedImage, patch_size: int) -> np.ndarray:
    """What lies under the centre of each patch. int64 [num_patches]."""
    rows, columns = image.plan.patch_grid
    width, height = image.plan.resized
    x = (np.arange(columns) + 0.5) * patch_size / width
    y = (np.arange(rows) + 0.5) * patch_size / height
    labels = np.zeros((rows, columns), np.int64)
    for mark in marks:
        inside = ((y > mark.top) & (y < mark.bottom))[:, None] & ((x > mark.left) & (x < mark.right))[None, :]
        labels[inside] = PATCH_LABELS[mark.label]
    return labels.reshape(-1)


def assemble(groups: Sequence[Sequence[Example]], config: ModelConfig, prompts: Prompts) -> TrainingStep:
    """Groups of examples of one patch grid each, packed."""
    examples = [example for group in groups for example in group]
    offsets = [0, *accumulate(example.image.plan.num_tokens for example in examples)]
    image_offset = {id(example): offset for example, offset in zip(examples, offsets, strict=False)}

    input_ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    image_rows: list[int] = []
    visual_rows: list[int] = []
    logits_rows: list[int] = []
    targets: list[int] = []
    target_answers: list[int] = []
    questions: list[Question] = []
    for example, ids, answers, longest in _padded(groups, prompts):
        first_row = len(input_ids)
        image_start = ids.index(IMAGE_TOKEN_ID)
        num_image_tokens = example.image.plan.num_tokens
        image_rows += range(first_row + image_start, first_row + image_start + num_image_tokens)
        visual_rows += range(image_offset[id(example)], image_offset[id(example)] + num_image_tokens)
        for question, start, stop in answers:
            logits_rows += range(first_row + start - 1, first_row + stop - 1)
            targets += ids[start:stop]
            target_answers += [len(questions)] * (stop - start)
            questions.append(question)
        input_ids += ids + [ids[-1]] * (longest - len(ids))
        positions += range(longest)
        lengths.append(longest)
    blocks = -(-max(lengths) // BLOCK_SIZE)
    tables = torch.arange(len(lengths) * blocks, dtype=torch.int32).view(len(lengths), blocks)
    bounds = [0, *accumulate(lengths)]
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return TrainingStep(
        images=image_batch([e.image for e in examples], config.vision, torch.device("cpu")),
        patch_labels=torch.from_numpy(np.concatenate([e.patch_labels for e in examples])),
        num_images_asked=sum(bool(e.conversations) for e in examples),
        batch=Batch(
            input_ids=torch.tensor(input_ids),
            positions=torch.tensor(positions),
            slot_mapping=owners * blocks * BLOCK_SIZE + torch.tensor(positions),
            block_tables=tables,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            logits_rows=torch.tensor(logits_rows),
            cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32),
            image_rows=torch.tensor(image_rows),
        ),
        visual_rows=torch.tensor(visual_rows),
        targets=torch.tensor(targets),
        target_answers=torch.tensor(target_answers),
        questions=tuple(questions),
    )


def _padded(
    groups: Sequence[Sequence[Example]], prompts: Prompts
) -> Iterator[tuple[Example, list[int], list[tuple[Question, int, int]], int]]:
    """Every sequence with the length it is padded to: a few lengths in a step, each one call of attention."""
    sequences = [
        (example, *_sequence(example, talk, prompts))
        for group in groups for example in group for talk in example.conversations
    ]  # fmt: skip
    sequences.sort(key=lambda sequence: len(sequence[1]))
    for start in range(0, len(sequences), _SEQUENCES_PER_LENGTH):
        run = sequences[start : start + _SEQUENCES_PER_LENGTH]
        for sequence in run:
            yield *sequence, len(run[-1][1])


def _sequence(
    example: Example, conversation: Sequence[Question], prompts: Prompts
) -> tuple[list[int], list[tuple[Question, int, int]]]:
    """Ids of a conversation, and where each answer stands."""
    before, after = prompts.around_image(conversation[0].text)
    ids = [*before, *[IMAGE_TOKEN_ID] * example.image.plan.num_tokens, *after]
    answers = []
    for i, question in enumerate(conversation):
        if i:
            ids += prompts.later_turn(question.text)
        answer = prompts.answer(question.answer)
        answers.append((question, len(ids), len(ids) + len(answer)))
        ids += answer
    return ids, answers
