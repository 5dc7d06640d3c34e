"""The held-out set: nothing in it was trained on, answers are balanced, a seed gives one set."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image

import training.held_out
from training.held_out import SETS, held_out_items, write_held_out
from training.images import HELD_OUT_FONTS, HELD_OUT_LONG_EDGES, TRAINING_FONTS, draw_text, random_text
from training.tasks import LANGUAGES, MAX_COUNT, TASKS, TEXT_TASKS, sample_text

COUNT = 4 * 2 * (MAX_COUNT + 1)
"""Two rounds of all answers of a count, in both languages and both kinds of size."""
TEXT_SETS = [name for name in SETS if name.split(",")[0] in TEXT_TASKS]


@cache
def items(set_name):
    return tuple(held_out_items(set_name, COUNT))


def is_held_out(image):
    return any(max(image.size) in edges for edges in HELD_OUT_LONG_EDGES)


def same(item, other):
    return (
        item.question == other.question
        and item.picture.marks == other.picture.marks
        and item.picture.image.tobytes() == other.picture.image.tobytes()
    )


def text_of(item):
    return "".join(mark.label for mark in item.picture.marks)


# --- items -------------------------------------------------------------------------------------------


def test_there_is_a_set_for_every_task_and_one_in_new_fonts_for_every_text_task():
    assert Counter(SETS) == Counter([*TASKS, *(f"{task}, new font" for task in TEXT_TASKS)])


@pytest.mark.parametrize("set_name", SETS)
def test_items_are_of_their_set_and_task(set_name):
    assert len(items(set_name)) == COUNT
    assert {item.set_name for item in items(set_name)} == {set_name}
    assert {item.question.task for item in items(set_name)} == {set_name.split(",")[0]}


@pytest.mark.parametrize("set_name", SETS)
def test_languages_alternate(set_name):
    languages = [item.question.language for item in items(set_name)]
    assert languages == list(LANGUAGES) * (COUNT // 2)


@pytest.mark.parametrize("set_name", SETS)
def test_half_of_the_images_have_a_size_never_trained_on_and_say_so(set_name):
    """In each language alike; the others have a size that training images have."""
    assert [item.new_size for item in items(set_name)] == [False, False, True, True] * (COUNT // 4)
    assert [is_held_out(item.picture.image) for item in items(set_name)] == [i.new_size for i in items(set_name)]


@pytest.mark.parametrize(
    ("set_name", "answers"),
    [
        ("exists", {"en": ["yes", "no"], "zh": ["有", "没有"]}),
        ("count", {key: [str(i) for i in range(MAX_COUNT + 1)] for key in LANGUAGES}),
    ],
)
def test_every_answer_of_a_few_is_asked_for_equally_often(set_name, answers):
    """In each language and kind of size: a model that always says the same is right one time in so many."""
    counts = Counter((i.question.language, i.new_size, i.question.answer) for i in items(set_name))
    groups = {(language, new, answer) for language in LANGUAGES for new in (False, True)
              for answer in answers[language]}  # fmt: skip
    assert set(counts) == groups
    assert set(counts.values()) == {COUNT // len(groups)}


@pytest.mark.parametrize("set_name", ["colour", "relation"])
def test_no_answer_dominates_where_answers_are_drawn(set_name):
    for language in LANGUAGES:
        counts = Counter(i.question.answer for i in items(set_name) if i.question.language == language)
        assert len(counts) >= 5
        assert max(counts.values()) < 0.4 * sum(counts.values())


@pytest.mark.parametrize("set_name", TEXT_SETS)
def test_text_is_answered_with_what_the_image_shows(set_name):
    alphabet, (shortest, longest) = sample_text(np.random.default_rng(0), set_name.split(",")[0])
    for item in items(set_name):
        assert item.question.answer == text_of(item)
        assert set(text_of(item)) <= set(alphabet)
        assert shortest <= len(text_of(item)) <= longest


@pytest.mark.parametrize("set_name", SETS)
def test_no_image_is_there_twice(set_name):
    assert len({item.picture.image.tobytes() for item in items(set_name)}) == COUNT


# --- fonts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_name", TEXT_SETS)
def test_a_new_font_set_is_drawn_in_held_out_fonts_only_and_the_others_in_training_fonts(set_name, monkeypatch):
    given = []

    def spy(rng, text, size, fonts, difficulty=1.0):
        given.append(set(fonts))
        return draw_text(rng, text, size, fonts, difficulty)

    monkeypatch.setattr(training.held_out, "draw_text", spy)
    again = list(held_out_items(set_name, 8))
    expected = set(HELD_OUT_FONTS if set_name.endswith("new font") else TRAINING_FONTS)
    assert given == [expected] * 8
    assert all(same(*pair) for pair in zip(again, items(set_name), strict=False))


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_sets_with_and_without_new_fonts_show_different_texts(task):
    """Words may meet by chance only among the shortest; a shared seed would make them all alike."""
    old, new = ([text_of(i) for i in items(name)] for name in (task, f"{task}, new font"))
    assert sum(a == b for a, b in zip(old, new, strict=True)) < 0.2 * COUNT


# --- seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_name", SETS)
def test_a_seed_gives_one_set_and_fewer_items_are_its_beginning(set_name):
    assert all(same(*pair) for pair in zip(held_out_items(set_name, 8), items(set_name), strict=False))


@pytest.mark.parametrize("set_name", SETS)
def test_another_seed_gives_another_set(set_name):
    others = held_out_items(set_name, 8, seed=1)
    assert not any(same(*pair) for pair in zip(others, items(set_name), strict=False))


def test_every_item_has_a_seed_of_its_own():
    """What comes before an item does not matter: its generator starts from seed, set and index."""
    rng = np.random.default_rng([5, SETS.index("word"), 3])
    assert random_text(rng, *sample_text(rng, "word")) == text_of(list(held_out_items("word", 4, seed=5))[3])


# --- files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("held_out")
    return write_held_out(directory, 4)


@pytest.fixture(scope="module")
def lines(written):
    return [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]


def test_the_jsonl_has_one_line_per_item_with_textvqa_s_fields(written, lines):
    assert written.name == "nano_val.jsonl"
    assert [line["set"] for line in lines] == [name for name in SETS for _ in range(4)]
    assert [line["question_id"] for line in lines] == list(range(4 * len(SETS)))
    for line in lines:
        assert set(line) == {"image", "question", "question_id", "answer", "set", "language"}


def test_the_lines_say_what_the_items_say(written, lines):
    """Images are written without loss, the Chinese as it is."""
    expected = [item for name in SETS for item in items(name)[:4]]
    for line, item in zip(lines, expected, strict=True):
        question = item.question
        assert (line["question"], line["answer"]) == (question.text, question.answer)
        assert line["language"] == question.language
        with Image.open(written.parent / line["image"]) as image:
            assert image.mode == "RGB"
            assert image.size == item.picture.image.size
            assert image.tobytes() == item.picture.image.tobytes()
    assert "\\u" not in written.read_text(encoding="utf-8")


def test_image_paths_are_relative_and_name_every_file_once(written, lines):
    paths = [line["image"] for line in lines]
    assert not any(path.startswith("/") or ".." in path or "\\" in path for path in paths)
    files = {path.relative_to(written.parent).as_posix() for path in written.parent.rglob("*.png")}
    assert sorted(paths) == sorted(files)


def test_the_annotations_have_ten_answers_to_each_question(written, lines):
    text = (written.parent / "nano_val_annotations.json").read_text(encoding="utf-8")
    annotations = json.loads(text)["annotations"]
    for line, annotation in zip(lines, annotations, strict=True):
        assert annotation["question_id"] == line["question_id"]
        assert annotation["question"] == line["question"]
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        assert {answer["answer"] for answer in annotation["answers"]} == {line["answer"]}
        assert {answer["answer_confidence"] for answer in annotation["answers"]} == {"yes"}


def test_writing_twice_gives_the_same_files(written, tmp_path):
    again = write_held_out(tmp_path, 4)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) == 4 * len(SETS) + 2
    assert again == tmp_path / "nano_val.jsonl"
    for name in names:
        assert (tmp_path / name).read_bytes() == (written.parent / name).read_bytes(), name
