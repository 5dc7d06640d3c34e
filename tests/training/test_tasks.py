"""Every answer follows from the marks alone: derived here a second time, from the words of the question."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.images import COLOURS, DIGITS, LETTERS, SHAPES, draw_shapes, random_text, sample_size
from training.tasks import (
    CHINESE_WORDS,
    LANGUAGES,
    MAX_COUNT,
    NUMBER_LENGTHS,
    SCENE_TASKS,
    TASKS,
    TEXT_TASKS,
    WORD_LENGTHS,
    Question,
    ask_scene,
    ask_text,
    casually,
    every_text,
    sample_scene,
    sample_text,
)
from training.tokenizer import VOCAB_SIZE, make_tokenizer
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.processing.tokenizer import Tokenizer

NANO = BUNDLED_DIRECTORY / "nano"
DRAWN_TASKS = (*SCENE_TASKS, "describe")

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)

# Written down once more, so that a slip in the module's own tables shows.
NAMES = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "black": "黑色", "white": "白色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "heart": "心形",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面",
    "yes": "有", "no": "没有",
}  # fmt: skip
ENGLISH = {chinese: english for english, chinese in NAMES.items()}
DIRECTIONS = {"left": 180, "right": 0, "above": 90, "below": -90}
"""As angles, in degrees, upwards from the right."""


def scene(seed, task, max_shapes=8):
    """A scene sampled for the task, as drawn."""
    rng = np.random.default_rng(seed)
    return draw_shapes(rng, sample_scene(rng, task, max_shapes), sample_size(rng, (0.6, 2.4)), difficulty=0)


@cache
def asked(task):
    """(picture, question or None): scenes made for the task and for any other, in both languages."""
    pairs = []
    for seed in range(200):
        picture = scene(seed, task if seed % 2 else DRAWN_TASKS[seed // 2 % len(DRAWN_TASKS)])
        rng = np.random.default_rng([seed, 1])
        pairs += [(picture, ask_scene(rng, task, picture, language)) for language in LANGUAGES]
    return pairs


def answered(task):
    pairs = [(picture, question) for picture, question in asked(task) if question is not None]
    assert len(pairs) > 100
    return pairs


def things_in(picture):
    """(colour, kind) of each mark."""
    return [tuple(mark.label.split()) for mark in picture.marks]


def kinds_in(picture):
    return [kind for _, kind in things_in(picture)]


def named(text, words, language):
    """Which of the words a text names, once each, in the order of `words`; in English also as plurals."""
    if language == "zh":
        return [word for word in words if NAMES[word] in text]
    return [word for word in words if re.search(rf"\b{word}(s|es)?\b", text)]


def in_english(answer, language):
    return ENGLISH[answer] if language == "zh" else answer


def only(values):
    [value] = values
    return value


# --- answers -----------------------------------------------------------------------------------------


def test_the_chinese_words_are_the_names_of_colours_and_shapes():
    assert set(CHINESE_WORDS) == {NAMES[word] for word in (*COLOURS, *SHAPES)}


def test_colour_asks_for_a_shape_that_is_there_once():
    for picture, question in answered("colour"):
        kind = only(named(question.text, SHAPES, question.language))
        assert only(c for c, k in things_in(picture) if k == kind) == in_english(
            question.answer, question.language
        )


def test_colour_is_not_asked_where_every_shape_is_there_twice():
    refused = [picture for picture, question in asked("colour") if question is None]
    assert refused
    assert all(1 not in Counter(kinds_in(picture)).values() for picture in refused)


def test_count_counts_the_named_shape():
    answers = set()
    for picture, question in answered("count"):
        kind = only(named(question.text, SHAPES, question.language))
        assert question.answer == str(kinds_in(picture).count(kind))
        answers.add(int(question.answer))
    assert answers == set(range(MAX_COUNT + 1))


def test_exists_is_yes_exactly_if_the_named_thing_is_there():
    seen = Counter()
    for picture, question in answered("exists"):
        kind = only(named(question.text, SHAPES, question.language))
        colours = named(question.text, COLOURS, question.language)
        assert len(colours) <= 1
        there = any(k == kind and (not colours or c == colours[0]) for c, k in things_in(picture))
        assert in_english(question.answer, question.language) == ("yes" if there else "no")
        seen[question.language, bool(colours), there] += 1
    assert len(seen) == 8, "in both languages, with and without a colour, there and not"


def test_exists_says_yes_half_of_the_time():
    """In each language, with a colour or without: no word of the question gives the answer away."""
    pictures = [scene(seed, "exists") for seed in range(100)]
    answers = {}
    for seed, picture in enumerate(pictures * 30):
        question = ask_scene(np.random.default_rng([seed, 2]), "exists", picture)
        has_colour = bool(named(question.text, COLOURS, question.language))
        answer = in_english(question.answer, question.language) == "yes"
        answers.setdefault((question.language, has_colour), []).append(answer)
    assert len(answers) == 4
    for key, said_yes in answers.items():
        assert len(said_yes) > 300
        assert np.mean(said_yes) == pytest.approx(0.5, abs=0.08), key


def test_many_absent_things_are_made_of_words_that_are_there():
    """A green square and a red star, asked for a green star: neither word alone gives the answer."""
    hard, total = 0, 0
    for picture, question in answered("exists"):
        colours = named(question.text, COLOURS, question.language)
        things = things_in(picture)
        if in_english(question.answer, question.language) == "no" and colours and len(set(things)) > 2:
            kind = only(named(question.text, SHAPES, question.language))
            hard += colours[0] in {c for c, _ in things} and kind in {k for _, k in things}
            total += 1
    assert total > 40
    assert hard > 0.4 * total


def test_relation_answers_with_the_only_shape_on_that_side():
    """Within 35 degrees of the direction, centre to centre in pixels, and nothing else within 55."""
    directions = set()
    for picture, question in answered("relation"):
        kind = only(named(question.text, SHAPES, question.language))
        direction = only(named(question.text, DIRECTIONS, question.language))
        answer = in_english(question.answer, question.language)
        centres = [(m.center[0] * picture.image.width, m.center[1] * picture.image.height) for m in picture.marks]
        kinds = kinds_in(picture)
        assert kinds.count(kind) == kinds.count(answer) == 1
        x, y = centres[kinds.index(kind)]
        there, perhaps = [], []
        for other, (other_x, other_y) in zip(kinds, centres, strict=True):
            angle = math.degrees(math.atan2(y - other_y, other_x - x))
            off = abs((angle - DIRECTIONS[direction] + 180) % 360 - 180)
            if other != kind and off < 35:
                there.append(other)
            if other != kind and off < 55:
                perhaps.append(other)
        assert there == perhaps == [answer]
        directions.add((question.language, direction))
    assert len(directions) == 8


def test_relation_can_be_asked_of_most_scenes_made_for_it_and_not_of_a_single_shape():
    asked_of = [
        ask_scene(np.random.default_rng(seed), "relation", scene(seed, "relation")) is not None
        for seed in range(60)
    ]
    assert np.mean(asked_of) > 0.8
    alone = draw_shapes(np.random.default_rng(0), [("red", "star")], (100, 100))
    assert ask_scene(np.random.default_rng(0), "relation", alone) is None


def test_describe_lists_every_shape_from_left_to_right():
    for picture, question in answered("describe"):
        ordered = [mark.label.split() for mark in sorted(picture.marks, key=lambda mark: mark.center[0])]
        if question.language == "en":
            assert question.answer[0] == "A"
            assert question.answer[-1] == "."
            parts = re.split(", | and ", "a" + question.answer[1:-1])
            assert parts == [f"{'an' if c == 'orange' else 'a'} {c} {k}" for c, k in ordered]
            assert question.answer.count(" and ") == (len(ordered) > 1)
        else:
            assert question.answer[-1] == "。"
            assert question.answer[:-1].split("、") == [f"一个{NAMES[c]}的{NAMES[k]}" for c, k in ordered]


def test_describe_is_asked_only_where_left_to_right_is_clear():
    """Up to four shapes, no two of them above each other."""
    refused = 0
    for picture, question in asked("describe"):
        size = picture.image.size
        across = sorted(mark.center[0] * size[0] / max(size) for mark in picture.marks)
        closest = min((b - a for a, b in pairwise(across)), default=1)
        assert (question is None) == (len(across) > 4 or closest < 0.06)
        refused += question is None
    assert 0 < refused < len(asked("describe"))


@PROPERTY
@given(SEEDS, st.sampled_from(TEXT_TASKS), st.sampled_from(LANGUAGES))
def test_text_is_answered_with_itself_and_described_in_a_sentence(seed, task, language):
    rng = np.random.default_rng(seed)
    text = random_text(rng, *sample_text(rng, task))
    question = ask_text(rng, task, text, language)
    described = ask_text(rng, "describe", text, language)
    sentences = {
        ("number", "en"): f"The number {text}.",
        ("word", "en"): f"The word {text}.",
        ("number", "zh"): f"数字{text}。",
        ("word", "zh"): f"单词{text}。",
    }
    assert (question.task, question.language, question.answer) == (task, language, text)
    assert (described.task, described.language) == ("describe", language)
    assert described.answer == sentences[task, language]
    assert text not in question.text + described.text


@PROPERTY
@given(SEEDS)
def test_numbers_are_digits_and_words_are_capitals_of_their_lengths(seed):
    rng = np.random.default_rng(seed)
    assert sample_text(rng, "number") == (DIGITS, NUMBER_LENGTHS)
    assert sample_text(rng, "word") == (LETTERS, WORD_LENGTHS)


# --- questions ---------------------------------------------------------------------------------------


def every_question():
    """One and more of every task, in every language."""
    questions = [question for task in DRAWN_TASKS for _, question in asked(task) if question is not None]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        for task in (*TEXT_TASKS, "describe"):
            questions.append(ask_text(rng, task, "407112" if seed % 2 else "QXZBTHE"))
    return questions


def test_a_question_is_in_one_language():
    """No Latin letter in a Chinese question, no Chinese character or mark in an English one."""
    questions = every_question()
    assert {(question.task, question.language) for question in questions} == {
        (task, language) for task in TASKS for language in LANGUAGES
    }
    for question in questions:
        if question.language == "zh":
            assert not re.search("[A-Za-z]", question.text), question.text
            assert question.text[-1] in "？。"
        else:
            assert question.text.isascii(), question.text
            assert re.fullmatch(r"[A-Z][a-z ]+[.?]", question.text), question.text


def test_english_is_spelt_well():
    """Plurals, articles, no hole left open."""
    for question in every_question():
        for text in (question.text, question.answer):
            assert not re.search(r"crosss\b|\ban (?!orange\b)|\ba orange\b|[{}]|  ", text), text


def test_the_language_is_drawn_where_none_is_asked_for():
    picture = scene(0, "count")
    languages = Counter(ask_scene(np.random.default_rng(s), "count", picture).language for s in range(200))
    assert min(languages[language] for language in LANGUAGES) > 60
    languages = Counter(ask_text(np.random.default_rng(s), "word", "ABC").language for s in range(200))
    assert min(languages[language] for language in LANGUAGES) > 60


@pytest.mark.parametrize("task", DRAWN_TASKS)
def test_a_seed_gives_one_question(task):
    picture, _ = answered(task)[0]
    first, again = (ask_scene(np.random.default_rng(9), task, picture) for _ in range(2))
    assert first == again
    assert len({ask_scene(np.random.default_rng(seed), task, picture) for seed in range(30)}) > 3


@pytest.mark.parametrize(
    "text", ["Count the stars.", "Is there an X or O?", "图中有星形吗？", "请读出图中的数字。"]
)
def test_casually_changes_only_the_first_letter_and_the_last_mark(text):
    question = Question("count", "en", text, "3")
    lower, bare = text[0].lower() + text[1:], text[:-1]
    allowed = {text, lower, bare, lower[:-1]}
    seen = set()
    for seed in range(400):
        changed = casually(np.random.default_rng(seed), question)
        assert (changed.task, changed.language, changed.answer) == ("count", "en", "3")
        seen.add(changed.text)
    assert seen == allowed


def test_most_questions_stay_as_they_are():
    question = Question("count", "en", "Count the stars.", "3")
    same = [casually(np.random.default_rng(seed), question) == question for seed in range(1000)]
    assert np.mean(same) == pytest.approx(0.85**2, abs=0.06)


# --- scenes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", DRAWN_TASKS)
@pytest.mark.parametrize("max_shapes", [2, 4, 6, 8])
def test_a_scene_has_one_to_max_shapes(task, max_shapes):
    scenes = [sample_scene(np.random.default_rng(seed), task, max_shapes) for seed in range(300)]
    assert all(c in COLOURS and k in SHAPES for one in scenes for c, k in one)
    lengths = {len(one) for one in scenes}
    assert 0 not in lengths
    assert max(lengths) <= max_shapes


@pytest.mark.parametrize("task", ["relation", "describe"])
def test_a_scene_of_relations_or_to_describe_has_a_few_shapes_of_different_kinds(task):
    scenes = [sample_scene(np.random.default_rng(seed), task, 8) for seed in range(300)]
    assert all(len({kind for _, kind in one}) == len(one) for one in scenes)
    assert {len(one) for one in scenes} == ({2, 3, 4} if task == "relation" else {1, 2, 3, 4})


def test_scenes_to_count_hold_up_to_six_of_a_kind_each_number_often():
    scenes = [sample_scene(np.random.default_rng(seed), "count", 8) for seed in range(1400)]
    most = Counter(max(Counter(kind for _, kind in one).values()) for one in scenes)
    assert set(most) == {1, 2, 3, 4, 5, 6}
    assert min(most.values()) > 100
    alike = [one for one in scenes if len(one) >= 6 and len({kind for _, kind in one}) <= 4]
    assert any(len({colour for colour, _ in one}) > 3 for one in alike), "also of different colours"


@pytest.mark.parametrize("task", DRAWN_TASKS)
def test_the_order_of_a_scene_says_nothing(task):
    """What is drawn first is of the same kind as what is drawn last, about equally often the frequent one."""
    scenes = [sample_scene(np.random.default_rng(seed), task, 8) for seed in range(600)]
    for place in (0, -1):
        kinds = Counter(one[place][1] for one in scenes)
        colours = Counter(one[place][0] for one in scenes)
        assert set(kinds) == set(SHAPES)
        assert set(colours) == set(COLOURS)
        assert max(kinds.values()) < 2 * min(kinds.values())
    share = {
        place: np.mean([[k for _, k in one].count(one[place][1]) / len(one) for one in scenes])
        for place in (0, -1)
    }
    assert share[0] == pytest.approx(share[-1], abs=0.03)


# --- tokenizer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(NANO)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_the_bundled_tokenizer_is_what_the_script_makes(name, tmp_path):
    make_tokenizer(tmp_path)
    assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes()


def is_plain(tokenizer, token_ids):
    """No byte token, no unknown, no control."""
    return all(tokenizer.byte_of(i) is None and i not in tokenizer.special_ids for i in token_ids)


def test_every_text_of_the_tasks_needs_no_bytes_and_comes_back(tokenizer):
    """After a newline, as in every prompt; also as people type it. SentencePiece puts a space before it all."""
    assert tokenizer.vocab_size <= VOCAB_SIZE
    texts = {*every_text(), *(text[0].lower() + text[1:] for text in every_text())}
    texts |= {text.rstrip(".?。？") for text in texts}
    for text in texts:
        token_ids = tokenizer.encode(f"\n{text}")
        assert is_plain(tokenizer, token_ids), text
        assert tokenizer.decode(token_ids) == f" \n{text}"


def test_every_question_and_answer_needs_no_bytes_and_comes_back(tokenizer):
    for question in every_question():
        for text in (question.text, question.answer):
            token_ids = tokenizer.encode(f"\n{text}")
            assert is_plain(tokenizer, token_ids), text
            assert tokenizer.decode(token_ids) == f" \n{text}"


@pytest.mark.parametrize("text", ["QXZBTHE", "407112", "AAAAAAA", "000000", "THE", "A1B2", LETTERS, DIGITS])
def test_every_capital_and_digit_is_a_token_of_its_own_also_side_by_side(tokenizer, text):
    """In a sentence, too; there the first capital of an English one has the space before it in its token."""
    newline = tokenizer.encode("\n")
    token_ids = tokenizer.encode(f"\n{text}")
    assert token_ids[: len(newline)] == newline
    assert [tokenizer.token_text(i) for i in token_ids[len(newline) :]] == list(text)
    for sentence in (f"\nThe word {text}.", f"\n单词{text}。"):
        pieces = [tokenizer.token_text(i).strip() for i in tokenizer.encode(sentence)]
        assert [piece for piece in pieces if piece][-len(text) - 1 : -1] == list(text)


def test_chinese_names_are_one_token_each(tokenizer):
    for word in CHINESE_WORDS:
        texts = [tokenizer.token_text(i) for i in tokenizer.encode(f"\n图中有没有{word}？")]
        assert texts.count(word) == 1
