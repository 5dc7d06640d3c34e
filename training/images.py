"""Draws the images: printed text, coloured shapes, pages full of glyphs.

Seeded by the caller's generator and independent of the machine: Pillow, numpy and the fonts beside this
file. Every picture comes with its marks: what stands where, for patch labels and questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = Path(__file__).parent / "fonts"
TRAINING_FONTS = tuple(sorted((FONTS / "train").glob("*.ttf")))
HELD_OUT_FONTS = tuple(sorted((FONTS / "held_out").glob("*.ttf")))

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 135, 20),
    "yellow": (245, 220, 40),
    "green": (35, 150, 60),
    "blue": (35, 80, 215),
    "purple": (135, 50, 175),
    "black": (20, 20, 22),
    "white": (248, 248, 248),
}

LONG_EDGES = (80, 480)
"""Pixels, shortest and longest."""
HELD_OUT_LONG_EDGES = (range(148, 173), range(300, 331))
"""Long edges that no training image has."""
MAX_ASPECT_RATIO = 4.0
_MIN_SHORT_EDGE = 56

# The model sees every image with this long edge; what is drawn must still be legible there.
_MODEL_LONG_EDGE = 196
_MIN_CAP_HEIGHT = 17.0  # in model pixels
_MIN_CAP_HEIGHT_DRAWN = 10.0  # in drawn pixels
_MIN_RADIUS = 10.0
_MIN_RADIUS_DRAWN = 6.0
_CAP_HEIGHT = 0.72  # of the font size, about, in every face here
_MIN_LUMA_DIFFERENCE = 70
_MIN_COLOUR_DISTANCE = 90

_NOISE = np.random.default_rng(0).normal(0, 1, (520, 520, 3)).astype(np.float32)


@dataclass(frozen=True)
class Mark:
    """Something drawn. `label` is a character or "red circle"; the box is in fractions of the image."""

    label: str
    left: float
    top: float
    right: float
    bottom: float

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in fractions of the image."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


@dataclass(frozen=True)
class Picture:
    """An RGB image and what it shows."""

    image: Image.Image
    marks: tuple[Mark, ...]


Size = tuple[int, int]
"""(width, height) in pixels."""


def sample_size(rng: np.random.Generator, aspect_ratios: tuple[float, float], held_out: bool = False) -> Size:
    """A size whose width / height lies in the given range (within [1/4, 4])."""
    while True:
        ratio = math.exp(rng.uniform(*np.log(aspect_ratios)))
        if held_out:
            edges = HELD_OUT_LONG_EDGES[int(rng.integers(len(HELD_OUT_LONG_EDGES)))]
            long_edge = int(rng.choice(edges))
        else:
            long_edge = round(math.exp(rng.uniform(*np.log(LONG_EDGES))))
            if any(long_edge in edges for edges in HELD_OUT_LONG_EDGES):
                continue
        short_edge = round(long_edge / max(ratio, 1 / ratio))
        # Short images are drawn larger rather than illegibly small.
        if short_edge < _MIN_SHORT_EDGE and not held_out:
            long_edge = round(long_edge * _MIN_SHORT_EDGE / short_edge)
            short_edge = _MIN_SHORT_EDGE
            if any(long_edge in edges for edges in HELD_OUT_LONG_EDGES):
                continue
        return (long_edge, short_edge) if ratio >= 1 else (short_edge, long_edge)


def random_text(rng: np.random.Generator, characters: str, lengths: tuple[int, int]) -> str:
    """Random characters, of a length within the inclusive range."""
    return "".join(rng.choice(list(characters), int(rng.integers(lengths[0], lengths[1] + 1))))


def draw_text(
    rng: np.random.Generator, text: str, size: Size, fonts: Sequence[Path], difficulty: float = 1.0
) -> Picture:
    """One line of text. `difficulty` in [0, 1]: from upright black on white to noisy, turned and small."""
    width, height = size
    ink, paper = _text_colours(rng, difficulty)
    canvas = _background(rng, size, paper, difficulty)
    font_path = fonts[int(rng.integers(len(fonts)))]
    tracking = rng.uniform(0, 0.12) * difficulty
    relative_width = _font(font_path, 100).getlength(text) / 100 + tracking * (len(text) - 1)
    angle = rng.uniform(-6, 6) * difficulty
    largest = min(
        0.94 * width / (relative_width * math.cos(math.radians(angle)) + 0.2),
        0.94 * height / (1.0 + relative_width * abs(math.sin(math.radians(angle)))),
    )
    smallest = min(_smallest_font(size), largest)
    # Large text first: sizes reach down to the legible as difficulty grows.
    font_size = math.exp(rng.uniform(math.log(smallest + (1 - difficulty) * 0.7 * (largest - smallest)),
                                     math.log(largest)))  # fmt: skip
    pixels = max(8, round(font_size))
    line = _Line(text, _font(font_path, pixels), tracking, angle)
    while pixels > 8 and (line.size[0] > width or line.size[1] > height):  # small sizes are set wider
        pixels -= 1
        line = _Line(text, _font(font_path, pixels), tracking, angle)
    room_x, room_y = max(0, width - line.size[0]), max(0, height - line.size[1])
    corner = int(rng.integers(room_x + 1)), int(rng.integers(room_y + 1))
    marks = line.draw(canvas, corner, ink)
    return Picture(_noisy(rng, canvas, difficulty), marks)


def draw_glyph_page(
    rng: np.random.Generator, size: Size, fonts: Sequence[Path], difficulty: float = 1.0
) -> Picture:
    """Lines full of random characters: many labels in one image."""
    width, height = size
    ink, paper = _text_colours(rng, difficulty)
    canvas = _background(rng, size, paper, difficulty)
    marks: list[Mark] = []
    angle = rng.uniform(-5, 5) * difficulty
    top = rng.uniform(0, 0.08) * height
    while top < height:
        smallest = _smallest_font(size)
        largest = max(smallest, min(0.9 * height, 3.2 * smallest))
        font_size = max(8, round(rng.uniform(smallest, largest)))
        if top + 0.9 * font_size > height and marks:
            break
        font = _font(fonts[int(rng.integers(len(fonts)))], font_size)
        tracking = rng.uniform(0, 0.15) * difficulty
        capacity = max(1, int(width / (font_size * (0.68 + tracking))))
        line = _Line(random_text(rng, DIGITS + LETTERS, (capacity, capacity)), font, tracking, angle)
        room = max(0, width - line.size[0])
        marks += line.draw(canvas, (int(rng.integers(room + 1)), round(top)), ink)
        top += line.size[1] * rng.uniform(0.95, 1.3)
    return Picture(_noisy(rng, canvas, difficulty), tuple(marks))


def draw_shapes(
    rng: np.random.Generator, shapes: Sequence[tuple[str, str]], size: Size, difficulty: float = 1.0
) -> Picture:
    """(colour, shape) pairs at random places that do not touch. The marks keep the order given."""
    width, height = size
    colours = {colour: COLOURS[colour] for colour, _ in shapes}
    canvas = _background(rng, size, _paper_for(rng, list(colours.values())), difficulty)
    draw = ImageDraw.Draw(canvas)
    marks = []
    for (colour, kind), (x, y, radius) in zip(shapes, _places(rng, len(shapes), size), strict=True):
        jitter = rng.uniform(-14, 14, 3) * difficulty
        fill = tuple(int(v) for v in np.clip(np.array(colours[colour]) + jitter, 0, 255))
        turned = _turn(_OUTLINES[kind], rng.uniform(-10, 10) * difficulty)
        draw.polygon([(x + radius * px, y + radius * py) for px, py in turned], fill=fill)
        box = (x - radius) / width, (y - radius) / height, (x + radius) / width, (y + radius) / height
        marks.append(Mark(f"{colour} {kind}", *box))
    return Picture(_noisy(rng, canvas, difficulty), tuple(marks))


class _Line:
    """Text set with a font, as a turned mask; knows where its characters came to lie."""

    def __init__(self, text: str, font: ImageFont.FreeTypeFont, tracking: float, angle: float) -> None:
        step = tracking * font.size
        pen, spans = 0.0, []
        for character in text:
            advance = font.getlength(character)
            spans.append((pen, pen + advance))
            pen += advance + step
        _, top, _, bottom = font.getbbox(text)
        margin = 2
        width, height = math.ceil(pen - step) + 2 * margin, math.ceil(bottom - top) + 2 * margin
        mask = Image.new("L", (width, height), 0)
        draw = ImageDraw.Draw(mask)
        for character, (start, _) in zip(text, spans, strict=True):
            draw.text((margin + start, margin - top), character, fill=255, font=font)
        self._mask = mask.rotate(angle, Image.Resampling.BILINEAR, expand=True) if angle else mask
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        self._boxes = []
        for character, (start, stop) in zip(text, spans, strict=True):
            dx = margin + (start + stop) / 2 - width / 2  # from the centre of the mask, on its middle line
            x, y = self._mask.width / 2 + dx * cos, self._mask.height / 2 - dx * sin
            half_width, half_height = (stop - start + step) / 2, (bottom - top) / 2
            self._boxes.append((character, x - half_width, y - half_height, x + half_width, y + half_height))

    @property
    def size(self) -> Size:
        """Of the turned mask."""
        return self._mask.size

    def draw(self, canvas: Image.Image, corner: tuple[int, int], ink: tuple[int, int, int]) -> tuple[Mark, ...]:
        canvas.paste(ink, corner, self._mask)
        x, y = corner
        return tuple(
            Mark(
                character,
                (x + left) / canvas.width,
                (y + top) / canvas.height,
                (x + right) / canvas.width,
                (y + bottom) / canvas.height,
            )
            for character, left, top, right, bottom in self._boxes
        )


@lru_cache(maxsize=4096)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _smallest_font(size: Size) -> float:
    scale = max(size) / _MODEL_LONG_EDGE
    return max(_MIN_CAP_HEIGHT * scale, _MIN_CAP_HEIGHT_DRAWN) / _CAP_HEIGHT


def _text_colours(
    rng: np.random.Generator, difficulty: float
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Ink and paper, far enough apart in brightness."""
    if rng.random() > difficulty:
        return (0, 0, 0), (255, 255, 255)
    while True:
        ink, paper = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
        if abs(_luma(ink) - _luma(paper)) > _MIN_LUMA_DIFFERENCE:
            return _rgb(ink), _rgb(paper)


def _paper_for(rng: np.random.Generator, colours: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """A background on which every colour shows; greyish, so that it is no colour itself."""
    while True:
        paper = np.clip(rng.integers(0, 256) + rng.uniform(-30, 30, 3), 0, 255)
        if all(np.linalg.norm(paper - np.array(colour)) > _MIN_COLOUR_DISTANCE for colour in colours):
            return _rgb(paper)


def _luma(rgb: np.ndarray) -> float:
    return float(rgb @ np.array([0.299, 0.587, 0.114]))


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    return int(values[0]), int(values[1]), int(values[2])


def _background(
    rng: np.random.Generator, size: Size, paper: tuple[int, int, int], difficulty: float
) -> Image.Image:
    if rng.random() > 0.4 * difficulty:
        return Image.new("RGB", size, paper)
    corners = np.clip(np.array(paper) + rng.uniform(-22, 22, (2, 2, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)


def _noisy(rng: np.random.Generator, image: Image.Image, difficulty: float) -> Image.Image:
    if rng.random() > 0.6 * difficulty:
        return image
    strength = rng.uniform(2, 14)
    y, x = rng.integers(0, 520 - 480 + 1, 2)
    noise = _NOISE[y : y + image.height, x : x + image.width] * strength
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _places(rng: np.random.Generator, count: int, size: Size) -> list[tuple[float, float, float]]:
    """(x, y, radius) of circles that do not touch, in pixels."""
    width, height = size
    scale = max(size) / _MODEL_LONG_EDGE
    smallest = max(_MIN_RADIUS * scale, _MIN_RADIUS_DRAWN)
    largest = max(smallest, 0.36 * min(size) / max(1.0, count / 2.5) ** 0.5)
    while True:
        places: list[tuple[float, float, float]] = []
        for _ in range(40 * count):
            radius = rng.uniform(smallest, largest)
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            if all(math.hypot(x - px, y - py) > 1.12 * (radius + pr) for px, py, pr in places):
                places.append((x, y, radius))
                if len(places) == count:
                    return places
        if count == 0:
            return []
        largest = max(smallest, 0.85 * largest)


def _turn(outline: np.ndarray, degrees: float) -> np.ndarray:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return outline @ np.array([[cos, sin], [-sin, cos]])


def _outlines() -> dict[str, np.ndarray]:
    """Polygons of about one unit around the centre, y downwards."""
    round_ = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    tips = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    arm = 0.3
    heart_x = np.sin(round_) ** 3
    heart_y = -(13 * np.cos(round_) - 5 * np.cos(2 * round_) - 2 * np.cos(3 * round_) - np.cos(4 * round_)) / 16
    return {
        "circle": np.stack([np.cos(round_), np.sin(round_)], 1) * 0.95,
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.78,
        "triangle": np.array([(0, -0.98), (0.9, 0.72), (-0.9, 0.72)]),
        "star": np.stack([radii * np.sin(tips), -radii * np.cos(tips)], 1),
        "cross": np.array(
            [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
             (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
        ) * 0.95,
        "heart": np.stack([heart_x, heart_y - 0.07], 1) * 0.95,
    }  # fmt: skip


_OUTLINES = _outlines()
