"""A training step is a pure function of seed and number, and asks exactly what the engine would be asked."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from training.dataset import PATCH_LABELS, Prompts, TrainingData, assemble, patch_labels
from training.images import Mark
from training.tasks import Question
from training.train import NANO, Trainee
from wemm.checkpoint.checkpoint import read_config
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.processor import IMAGE_TOKEN_ID, Processor, image_reader
from wemm.processing.tokenizer import Tokenizer

CONFIG = read_config(NANO)
TOKENIZER = Tokenizer(NANO)
GRID = (5, 14)


def _data(num_steps: int = 100, seed: int = 0) -> TrainingData:
    return TrainingData(CONFIG, TOKENIZER, num_steps, seed, patches_per_step=800)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for field in fields(value) for t in _tensors(getattr(value, field.name))] if _is_data(value) else []


def _is_data(value) -> bool:
    return hasattr(value, "__dataclass_fields__")


def _same(a, b) -> bool:
    pairs = zip(_tensors(a), _tensors(b), strict=True)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs) and a.questions == b.questions


@pytest.mark.parametrize("number", [0, 30, 99])
def test_a_step_is_a_pure_function_of_seed_and_number(number):
    data = _data()
    data[5]  # whatever was drawn before
    assert _same(data[number], _data()[number])
    assert not _same(data[number], _data(seed=1)[number])
    assert not _same(data[number], data[number - 1] if number else data[1])


def test_glyph_pages_come_first_then_questions():
    data = _data()
    early, late = data[0], data[99]
    assert len(early.images.patch_grids) - early.num_images_asked > early.num_images_asked
    assert len(late.images.patch_grids) - late.num_images_asked <= 2


def test_token_ids_are_those_of_the_engine():
    """A two-turn conversation by the trainer and by the engine's processor."""
    data, prompts = _data(), Prompts(CONFIG, TOKENIZER)
    example = data.scene_example(np.random.default_rng(4), GRID, 1.0)
    first = Question("colour", "en", "What colour is the star?", "red")
    second = Question("exists", "zh", "图中有圆形吗？", "没有")
    example = type(example)(example.image, example.patch_labels, ((first, second),))
    step = assemble([[example]], CONFIG, prompts)

    from PIL import Image

    image = Image.fromarray(example.image.pixels.numpy())
    processor = Processor(TOKENIZER, image_reader(ImageProcessor(CONFIG)), 2000, CONFIG.text.vocab_size)
    expected = processor.chat([
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": first.text}]},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.text},
    ])  # fmt: skip
    ids = step.batch.input_ids.tolist()
    assert tuple(ids[: len(expected.token_ids)]) == expected.token_ids
    assert [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_ID] == step.batch.image_rows.tolist()
    answer = TOKENIZER.encode("assistant\n没有")[len(TOKENIZER.encode("assistant\n")) :]
    assert ids[len(expected.token_ids) :] == [*answer, TOKENIZER.im_end_id]


def test_targets_are_the_answers_and_the_end_of_the_turn():
    step = _data()[50]
    for number, question in enumerate(step.questions):
        ids = step.targets[step.target_answers == number].tolist()
        assert ids[-1] == TOKENIZER.im_end_id
        assert TOKENIZER.decode(ids[:-1]) == question.answer
    # Each target follows its row, except where the row is the last of a padded sequence.
    following = step.batch.input_ids[step.batch.logits_rows + 1]
    assert torch.equal(following, step.targets)


def test_patch_labels_name_what_lies_under_the_centre_of_a_patch():
    """A 28x28 mark on a 196x70 image covers the four patches whose centres it holds."""
    example = _data().text_example(np.random.default_rng(0), GRID, 0.0)
    width, height = example.image.plan.resized
    mark = Mark("7", 14 / width, 28 / height, 42 / width, 56 / height)
    labels = patch_labels([mark], example.image, 14).reshape(GRID)
    assert np.argwhere(labels).tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]
    assert set(labels[labels > 0]) == {PATCH_LABELS["7"]}


def test_packed_equals_alone():
    """Images and sequences of a step do not see each other."""
    data, prompts, rng = _data(), Prompts(CONFIG, TOKENIZER), np.random.default_rng(2)
    groups = [
        [data.text_example(rng, GRID, 1.0) for _ in range(3)],
        [data.scene_example(rng, (9, 14), 1.0) for _ in range(2)],
    ]
    trainee = Trainee(CONFIG, seed=0)
    with torch.no_grad():
        answers, patches = trainee(packed := assemble(groups, CONFIG, prompts))
        alone = [assemble([[example]], CONFIG, prompts) for group in groups for example in group]
        results = [trainee(step) for step in alone]
    torch.testing.assert_close(patches, torch.cat([p for _, p in results]), rtol=1e-4, atol=1e-4)
    by_question = {
        (index, question): result[step.target_answers == number]
        for index, (step, (result, _)) in enumerate(zip(alone, results, strict=True))
        for number, question in enumerate(step.questions)
    }
    assert len(packed.questions) == sum(len(step.questions) for step in alone)
    matched = 0
    for number, question in enumerate(packed.questions):
        mine = answers[packed.target_answers == number]
        candidates = [v for (_, q), v in by_question.items() if q == question]
        matched += any(c.shape == mine.shape and torch.allclose(c, mine, rtol=1e-3, atol=1e-3) for c in candidates)
    assert matched == len(packed.questions)
