"""What is asked about a picture, in English and Chinese, and the one right answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from training.images import COLOURS, DIGITS, LETTERS, SHAPES, Mark, Picture

LANGUAGES = ("en", "zh")
TEXT_TASKS = ("number", "word")
SCENE_TASKS = ("colour", "count", "exists", "relation")
TASKS = (*TEXT_TASKS, *SCENE_TASKS, "describe")

MAX_COUNT = 6
NUMBER_LENGTHS = (1, 6)
WORD_LENGTHS = (3, 7)

_ZH_COLOUR = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "black": "黑色", "white": "白色",
}  # fmt: skip
_ZH_SHAPE = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "heart": "心形",
}  # fmt: skip
CHINESE_WORDS = (*_ZH_COLOUR.values(), *_ZH_SHAPE.values())
"""Words that no tokenizer should glue to their neighbours."""

_PLURAL = {"cross": "crosses"}
_DIRECTIONS = ("left", "right", "above", "below")

_PHRASES = {
    ("number", "en"): (
        "What number is written here?", "Read the number.", "What is the number?",
        "Which number does the image show?", "What is written here?",
    ),
    ("number", "zh"): ("图中的数字是多少？", "请读出图中的数字。", "这是什么数字？", "图中写了什么？"),
    ("word", "en"): (
        "What word is written here?", "Read the word.", "What does the text say?",
        "Which letters does the image show?", "What is written here?",
    ),
    ("word", "zh"): ("图中的单词是什么？", "请读出图中的单词。", "图中的文字是什么？", "图中写了什么？"),
    ("colour", "en"): (
        "What colour is the {shape}?", "What color is the {shape}?", "Name the colour of the {shape}.",
        "Which colour does the {shape} have?",
    ),
    ("colour", "zh"): ("{shape}是什么颜色的？", "{shape}的颜色是什么？", "图中的{shape}是什么颜色？"),
    ("count", "en"): (
        "How many {shapes} are there?", "How many {shapes} are in the image?", "Count the {shapes}.",
        "How many {shapes} can you see?",
    ),
    ("count", "zh"): ("图中有几个{shape}？", "有多少个{shape}？", "请数一数{shape}有几个。"),
    ("exists", "en"): (
        "Is there {thing}?", "Is there {thing} in the image?", "Can you see {thing}?",
        "Does the image show {thing}?",
    ),
    ("exists", "zh"): ("图中有{thing}吗？", "有没有{thing}？", "图中有没有{thing}？"),
    ("relation", "en"): (
        "Which shape is {direction} the {shape}?", "What is {direction} the {shape}?",
        "Name the shape {direction} the {shape}.",
    ),
    ("relation", "zh"): (
        "{shape}的{direction}是什么？", "在{shape}{direction}的是什么形状？", "{shape}{direction}是哪个形状？",
    ),
    ("describe", "en"): ("Describe the image.", "What is in the image?", "What does the picture show?"),
    ("describe", "zh"): ("请描述这张图片。", "图中有什么？", "请详细描述这张图片。"),
}  # fmt: skip
# Degrees: one shape lies within the first, no other within the second, or nobody could be sure.
_CLEARLY_THERE, _CLEARLY_ELSEWHERE = 35, 55
_DIRECTION = {
    "en": {"left": "left of", "right": "right of", "above": "above", "below": "below"},
    "zh": {"left": "左边", "right": "右边", "above": "上面", "below": "下面"},
}


@dataclass(frozen=True)
class Question:
    """One question and its answer."""

    task: str
    language: str
    text: str
    answer: str


def ask_text(rng: np.random.Generator, task: str, text: str, language: str | None = None) -> Question:
    """About printed text: `task` is number, word or describe."""
    language = language or _language(rng)
    if task != "describe":
        return Question(task, language, _phrase(rng, task, language), text)
    is_number = text[0] in DIGITS
    if language == "en":
        answer = f"The {'number' if is_number else 'word'} {text}."
    else:
        answer = f"{'数字' if is_number else '单词'}{text}。"
    return Question(task, language, _phrase(rng, task, language), answer)


def ask_scene(rng: np.random.Generator, task: str, scene: Picture, language: str | None = None) -> Question | None:
    """About shapes; None where this scene has no unambiguous question of the task."""
    language = language or _language(rng)
    return _ASK[task](rng, [_Shape.of(mark, scene.image.size) for mark in scene.marks], language)


def casually(rng: np.random.Generator, question: Question) -> Question:
    """Now and then as people type: no capital at the start, no mark at the end."""
    text = question.text
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip(".?。？")
    return replace(question, text=text)


def sample_scene(rng: np.random.Generator, task: str, max_shapes: int) -> list[tuple[str, str]]:
    """(colour, shape) pairs of a scene to which questions of the task fit."""
    colours, kinds = list(COLOURS), list(SHAPES)
    if task == "count":
        # The number asked for is uniform in 0..6; the rest is filled with other shapes.
        counted = kinds.pop(int(rng.integers(len(kinds))))
        count = int(rng.integers(0, min(MAX_COUNT, max_shapes) + 1))
        others = int(rng.integers(0 if count else 1, min(3, max_shapes - count) + 1))
        same_colour = rng.random() < 0.5
        colour = str(rng.choice(colours))
        scene = [(colour if same_colour else str(rng.choice(colours)), counted) for _ in range(count)]
        scene += [(str(rng.choice(colours)), str(rng.choice(kinds))) for _ in range(others)]
    elif task in ("relation", "describe"):
        number = int(rng.integers(2 if task == "relation" else 1, min(4, max_shapes) + 1))
        chosen = rng.choice(kinds, number, replace=False)
        scene = [(str(rng.choice(colours)), str(kind)) for kind in chosen]
    else:
        number = int(rng.integers(1, min(6, max_shapes) + 1))
        scene = [(str(rng.choice(colours)), str(rng.choice(kinds))) for _ in range(number)]
    order = rng.permutation(len(scene))
    return [scene[i] for i in order]


def sample_text(rng: np.random.Generator, task: str) -> tuple[str, tuple[int, int]]:
    """Alphabet and range of lengths of a text task."""
    return (DIGITS, NUMBER_LENGTHS) if task == "number" else (LETTERS, WORD_LENGTHS)


@dataclass(frozen=True)
class _Shape:
    colour: str
    kind: str
    x: float
    y: float

    @classmethod
    def of(cls, mark: Mark, size: tuple[int, int]) -> _Shape:
        """With its centre in units of the longer edge."""
        colour, kind = mark.label.split()
        x, y = mark.center
        return cls(colour, kind, x * size[0] / max(size), y * size[1] / max(size))


def _ask_colour(rng: np.random.Generator, shapes: Sequence[_Shape], language: str) -> Question | None:
    kinds = [s.kind for s in shapes]
    unique = [s for s in shapes if kinds.count(s.kind) == 1]
    if not unique:
        return None
    shape = unique[int(rng.integers(len(unique)))]
    answer = shape.colour if language == "en" else _ZH_COLOUR[shape.colour]
    return Question("colour", language, _phrase(rng, "colour", language, shape=shape.kind), answer)


def _ask_count(rng: np.random.Generator, shapes: Sequence[_Shape], language: str) -> Question:
    kinds = [s.kind for s in shapes]
    most = max(kinds, key=kinds.count)
    # Scenes made for counting hold one frequent kind; now and then one that is rare or absent.
    kind = most if rng.random() < 0.7 else str(rng.choice(SHAPES))
    return Question("count", language, _phrase(rng, "count", language, shape=kind), str(kinds.count(kind)))


def _ask_exists(rng: np.random.Generator, shapes: Sequence[_Shape], language: str) -> Question:
    things = {(s.colour, s.kind) for s in shapes}
    colours, kinds = {s.colour for s in shapes}, {s.kind for s in shapes}
    wanted, with_colour = bool(rng.random() < 0.5), rng.random() < 0.7
    if not with_colour and (wanted or len(kinds) < len(SHAPES)):
        pool = [kind for kind in SHAPES if (kind in kinds) == wanted]
        colour, kind = None, pool[int(rng.integers(len(pool)))]
    elif wanted:
        colour, kind = sorted(things)[int(rng.integers(len(things)))]
    else:
        absent = [(c, k) for c in COLOURS for k in SHAPES if (c, k) not in things]
        # Half of the absent things share both words with what is there, if anything does.
        near = [(c, k) for c, k in absent if c in colours and k in kinds]
        half = [(c, k) for c, k in absent if c in colours or k in kinds]
        pool2 = near if near and rng.random() < 0.5 else half if half and rng.random() < 0.7 else absent
        colour, kind = pool2[int(rng.integers(len(pool2)))]
    text = _phrase(rng, "exists", language, shape=kind, colour=colour)
    answer = ("yes" if wanted else "no") if language == "en" else ("有" if wanted else "没有")
    return Question("exists", language, text, answer)


def _ask_relation(rng: np.random.Generator, shapes: Sequence[_Shape], language: str) -> Question | None:
    kinds = [s.kind for s in shapes]
    choices = []
    for shape in shapes:
        for direction in _DIRECTIONS:
            others = [other for other in shapes if other is not shape]
            there = [other for other in others if _angle(other, direction, shape) < _CLEARLY_THERE]
            perhaps = [other for other in others if _angle(other, direction, shape) < _CLEARLY_ELSEWHERE]
            clear = len(there) == len(perhaps) == 1
            if clear and kinds.count(shape.kind) == 1 and kinds.count(there[0].kind) == 1:
                choices.append((direction, shape.kind, there[0].kind))
    if not choices:
        return None
    direction, kind, other_kind = choices[int(rng.integers(len(choices)))]
    text = _phrase(rng, "relation", language, shape=kind, direction=direction)
    return Question("relation", language, text, other_kind if language == "en" else _ZH_SHAPE[other_kind])


def _angle(other: _Shape, direction: str, shape: _Shape) -> float:
    """Degrees between the direction and the way from `shape` to `other`."""
    dx, dy = other.x - shape.x, other.y - shape.y
    along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[direction]
    return math.degrees(math.atan2(abs(across), along))


def _ask_describe(rng: np.random.Generator, shapes: Sequence[_Shape], language: str) -> Question | None:
    """Shapes from left to right."""
    ordered = sorted(shapes, key=lambda s: s.x)
    gaps = [b.x - a.x for a, b in pairwise(ordered)]
    if len(ordered) > 4 or any(gap < 0.06 for gap in gaps):
        return None
    if language == "en":
        parts = [_thing(s.kind, s.colour, "en") for s in ordered]
        joined = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        answer = f"{joined[0].upper()}{joined[1:]}."
    else:
        answer = "、".join(f"一个{_ZH_COLOUR[s.colour]}的{_ZH_SHAPE[s.kind]}" for s in ordered) + "。"
    return Question("describe", language, _phrase(rng, "describe", language), answer)


_ASK: dict[str, Callable[[np.random.Generator, Sequence[_Shape], str], Question | None]] = {
    "colour": _ask_colour,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
    "describe": _ask_describe,
}


def _language(rng: np.random.Generator) -> str:
    return LANGUAGES[int(rng.integers(len(LANGUAGES)))]


def _thing(kind: str, colour: str | None, language: str) -> str:
    if language == "zh":
        return f"{_ZH_COLOUR[colour]}的{_ZH_SHAPE[kind]}" if colour else _ZH_SHAPE[kind]
    name = f"{colour} {kind}" if colour else kind
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _phrase(
    rng: np.random.Generator,
    task: str,
    language: str,
    shape: str = "",
    colour: str | None = None,
    direction: str = "",
) -> str:
    phrases = _PHRASES[task, language]
    return _fill(phrases[int(rng.integers(len(phrases)))], language, shape, colour, direction)


def _fill(phrase: str, language: str, shape: str, colour: str | None, direction: str) -> str:
    if not shape:
        return phrase
    return phrase.format(
        shape=shape if language == "en" else _ZH_SHAPE[shape],
        shapes=_PLURAL.get(shape, f"{shape}s"),
        thing=_thing(shape, colour, language),
        direction=_DIRECTION[language].get(direction, ""),
    )


def every_text() -> list[str]:
    """All words the tasks can use, in sentences: what the tokenizer is made from."""
    texts = []
    for (task, language), phrases in _PHRASES.items():
        for phrase in phrases:
            if task in TEXT_TASKS or task == "describe":
                texts.append(phrase)
                continue
            colours: Sequence[str | None] = list(COLOURS) if task == "exists" else [None]
            directions = _DIRECTIONS if task == "relation" else ("",)
            texts += [
                _fill(phrase, language, kind, colour, direction)
                for kind in SHAPES for colour in colours for direction in directions
            ]  # fmt: skip
    for colour in COLOURS:
        texts += [colour, _ZH_COLOUR[colour]]
        for kind in SHAPES:
            thing = _thing(kind, colour, "en")
            things = f"{thing}, {thing} and {thing}."
            texts += [things, things[0].upper() + things[1:], f"一个{_ZH_COLOUR[colour]}的{_ZH_SHAPE[kind]}、"]
    texts += [*SHAPES, *_ZH_SHAPE.values(), "yes", "no", "有", "没有", "The number 0.", "The word A."]
    texts += ["数字0。", "单词A。"]
    return texts
