"""What the generator promises: sizes, fonts, and marks that say truly what stands where."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from training.images import (
    COLOURS,
    DIGITS,
    FONTS,
    HELD_OUT_FONTS,
    HELD_OUT_LONG_EDGES,
    LETTERS,
    LONG_EDGES,
    MAX_ASPECT_RATIO,
    SHAPES,
    TRAINING_FONTS,
    draw_glyph_page,
    draw_shapes,
    draw_text,
    random_text,
    sample_size,
)

ALL_FONTS = (*TRAINING_FONTS, *HELD_OUT_FONTS)
CHARACTERS = DIGITS + LETTERS

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
DIFFICULTIES = st.sampled_from([0.0, 0.5, 1.0])
RATIOS = st.floats(1 / MAX_ASPECT_RATIO, MAX_ASPECT_RATIO)
RATIO_RANGES = st.tuples(RATIOS, RATIOS).map(lambda pair: tuple(sorted(pair)))
ROUNDING = 1.03
"""An edge of 20 pixels, the shortest before small images are enlarged, is off by up to half a pixel."""

CODE = np.array([1 << 16, 1 << 8, 1])
"""Makes one number of the three of a pixel."""

TEXT_RATIOS = (1.0, 4.0)
SCENE_RATIOS = (0.6, 2.4)


def is_held_out(long_edge):
    return any(long_edge in edges for edges in HELD_OUT_LONG_EDGES)


def printed(seed, difficulty, fonts=ALL_FONTS):
    """Random text and the picture of it."""
    rng = np.random.default_rng(seed)
    text = random_text(rng, CHARACTERS, (1, 7))
    return text, draw_text(rng, text, sample_size(rng, TEXT_RATIOS), fonts, difficulty)


def drawn(seed, difficulty):
    """A scene of shapes with a colour each, and the picture of it."""
    rng = np.random.default_rng(seed)
    colours = rng.permutation(list(COLOURS))[: int(rng.integers(1, len(COLOURS) + 1))]
    scene = [(str(colour), str(rng.choice(SHAPES))) for colour in colours]
    return scene, draw_shapes(rng, scene, sample_size(rng, SCENE_RATIOS), difficulty)


def page(seed, difficulty):
    rng = np.random.default_rng(seed)
    return draw_glyph_page(rng, sample_size(rng, TEXT_RATIOS), ALL_FONTS, difficulty)


DRAWERS = {
    "text": lambda seed, difficulty: printed(seed, difficulty)[1],
    "shapes": lambda seed, difficulty: drawn(seed, difficulty)[1],
    "glyph page": page,
}


def box_of(mark, image, margin=0):
    """(left, top, right, bottom) in pixels, wherever they lie."""
    width, height = image.size
    return (
        mark.left * width - margin,
        mark.top * height - margin,
        mark.right * width + margin,
        mark.bottom * height + margin,
    )


def inside(mark, image, margin=0):
    """The index of a mark's pixels in an array [height, width, …]."""
    left, top, right, bottom = (max(0, round(edge)) for edge in box_of(mark, image, margin))
    return slice(top, bottom), slice(left, right)


def sticks_out(mark, image):
    """How many pixels of a mark's box lie beyond the image."""
    left, top, right, bottom = box_of(mark, image)
    return max(-left, -top, right - image.width, bottom - image.height)


def contrast(gray):
    """Between the dark and the light of some pixels, apart from the most extreme."""
    dark, light = np.percentile(gray, [4, 96])
    return light - dark


# --- sizes -------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, RATIO_RANGES, st.booleans())
def test_a_size_has_the_wanted_ratio_but_for_rounding(seed, ratios, held_out):
    width, height = sample_size(np.random.default_rng(seed), ratios, held_out)
    assert ratios[0] / ROUNDING <= width / height <= ratios[1] * ROUNDING
    assert max(width, height) / min(width, height) <= MAX_ASPECT_RATIO * ROUNDING


@PROPERTY
@given(SEEDS, RATIO_RANGES)
def test_no_training_size_has_a_held_out_long_edge_and_every_held_out_size_has_one(seed, ratios):
    width, height = sample_size(np.random.default_rng(seed), ratios)
    assert LONG_EDGES[0] <= max(width, height) <= LONG_EDGES[1]
    assert not is_held_out(max(width, height))
    assert is_held_out(max(sample_size(np.random.default_rng(seed), ratios, held_out=True)))


@pytest.mark.parametrize("ratios", [(0.25, 4.0), TEXT_RATIOS, (3.9, 4.0)], ids=str)
def test_long_edges_fill_their_ranges_and_avoid_the_held_out_ones(ratios):
    """Also where small images are enlarged, which moves long edges that were fine."""
    rng = np.random.default_rng(0)
    training = {max(sample_size(rng, ratios)) for _ in range(2000)}
    held_out = {max(sample_size(rng, ratios, held_out=True)) for _ in range(2000)}
    assert not any(is_held_out(edge) for edge in training)
    assert max(training) >= 0.95 * LONG_EDGES[1]
    assert held_out == {edge for edges in HELD_OUT_LONG_EDGES for edge in edges}
    assert {min(held_out) - 1, max(held_out) + 1} & training, "training sizes reach up to the gap"


# --- text --------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, st.sampled_from([DIGITS, LETTERS, "A"]), st.integers(1, 9), st.integers(0, 5))
def test_random_text_keeps_to_its_alphabet_and_lengths(seed, alphabet, shortest, longer):
    text = random_text(np.random.default_rng(seed), alphabet, (shortest, shortest + longer))
    assert set(text) <= set(alphabet)
    assert shortest <= len(text) <= shortest + longer


def test_random_text_has_every_length_and_every_character_about_equally_often():
    rng = np.random.default_rng(0)
    texts = [random_text(rng, DIGITS, (1, 6)) for _ in range(1200)]
    lengths, characters = Counter(map(len, texts)), Counter("".join(texts))
    assert set(lengths) == {1, 2, 3, 4, 5, 6}
    assert set(characters) == set(DIGITS)
    assert max(lengths.values()) < 1.4 * min(lengths.values())
    assert max(characters.values()) < 1.4 * min(characters.values())


@PROPERTY
@given(SEEDS, DIFFICULTIES)
def test_the_marks_of_text_spell_it_from_left_to_right_inside_the_image(seed, difficulty):
    """Small fonts have wider characters than large ones: three pixels may be missing."""
    text, picture = printed(seed, difficulty)
    assert "".join(mark.label for mark in picture.marks) == text
    assert (np.diff([mark.center[0] for mark in picture.marks]) > 0).all()
    assert max(sticks_out(mark, picture.image) for mark in picture.marks) <= 3
    for mark, following in pairwise(picture.marks):
        assert (mark.right - following.left) * picture.image.width < 1, "boxes stand side by side"


@PROPERTY
@given(SEEDS)
def test_easy_text_is_black_on_white_with_ink_in_every_box_and_none_elsewhere(seed):
    """No noise, no colour, no turn: what lies outside the boxes is exactly white."""
    _, picture = printed(seed, difficulty=0)
    pixels = np.asarray(picture.image).copy()
    assert (pixels == pixels[..., :1]).all(), "grey only"
    for mark in picture.marks:
        assert (pixels[inside(mark, picture.image)] < 60).mean() > 0.04, mark
        assert mark.top == picture.marks[0].top, "upright"
    for mark in picture.marks:
        pixels[inside(mark, picture.image, margin=4)] = 255
    assert (pixels == 255).all()


@PROPERTY
@given(SEEDS, st.sampled_from([0.5, 1.0]))
def test_hard_text_is_legible_in_every_box(seed, difficulty):
    """Whatever the colours, the noise and the angle, a box holds the dark and the light of its character."""
    _, picture = printed(seed, difficulty)
    gray = np.asarray(picture.image.convert("L"))
    assert min(contrast(gray[inside(mark, picture.image)]) for mark in picture.marks) > 60


def test_the_marks_of_a_turned_line_lie_on_it():
    """A row of H is as heavy above its middle as below: a line through its ink has the slope of its marks."""
    slopes = []
    for seed in range(20):
        picture = draw_text(np.random.default_rng(seed), "HHHHHH", (400, 160), ALL_FONTS)
        gray = np.asarray(picture.image.convert("L")).astype(float)
        paper = np.median(gray)
        y, x = np.nonzero(np.abs(gray - paper) > 0.6 * np.abs(gray - paper).max())
        centres = np.array([mark.center for mark in picture.marks]) * picture.image.size
        slope, _ = np.polyfit(*centres.T, 1)
        assert math.degrees(abs(np.polyfit(x, y, 1)[0] - slope)) < 1
        slopes.append(math.degrees(slope))
    assert min(slopes) < -2
    assert max(slopes) > 2
    assert max(map(abs, slopes)) <= 6.1


def test_difficulty_brings_colours_and_noise():
    pictures = [printed(seed, difficulty=1)[1] for seed in range(40)]
    edges = [np.asarray(picture.image)[0].astype(int) for picture in pictures]
    noisy = [np.abs(np.diff(edge, axis=0)).mean() > 1.5 for edge in edges]
    assert sum(noisy) in range(14, 35), "some are, some are not"
    assert len({tuple(edge[0]) for edge in edges}) > 30


# --- glyph pages -------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS)
def test_a_glyph_page_has_ink_in_every_box_and_none_elsewhere(seed):
    """The last line and the last column may run off the page."""
    picture = page(seed, difficulty=0)
    pixels = np.asarray(picture.image).copy()
    assert {mark.label for mark in picture.marks} <= set(CHARACTERS)
    on_page = [mark for mark in picture.marks if sticks_out(mark, picture.image) <= 0]
    assert len(on_page) >= 0.4 * len(picture.marks) > 0
    for mark in on_page:
        assert (pixels[inside(mark, picture.image)] < 60).mean() > 0.04, mark
    for mark in picture.marks:
        pixels[inside(mark, picture.image, margin=4)] = 255
    assert (pixels == 255).all()


def test_glyph_pages_show_every_character():
    counts = Counter(mark.label for seed in range(60) for mark in page(seed, difficulty=1).marks)
    assert set(counts) == set(CHARACTERS)
    assert sum(counts.values()) > 60 * 8


# --- shapes ------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, DIFFICULTIES)
@example(0, 1.0)
def test_the_marks_of_shapes_keep_the_given_order_and_do_not_touch(seed, difficulty):
    scene, picture = drawn(seed, difficulty)
    assert [tuple(mark.label.split()) for mark in picture.marks] == scene
    circles = []
    for mark in picture.marks:
        left, top, right, bottom = box_of(mark, picture.image)
        assert right - left == pytest.approx(bottom - top), "as wide as high, in pixels"
        assert sticks_out(mark, picture.image) < 1e-6
        circles.append(((left + right) / 2, (top + bottom) / 2, (right - left) / 2))
    for i, (x, y, radius) in enumerate(circles):
        for other_x, other_y, other_radius in circles[:i]:
            assert math.hypot(x - other_x, y - other_y) > 1.1 * (radius + other_radius)


@PROPERTY
@given(SEEDS, DIFFICULTIES)
def test_the_centre_of_a_shape_is_nearest_to_its_own_colour(seed, difficulty):
    """Of all kinds: a centre lies within the outline of a cross, a star and a heart, too."""
    scene, picture = drawn(seed, difficulty)
    pixels = np.asarray(picture.image).astype(int)
    for (colour, _), mark in zip(scene, picture.marks, strict=True):
        x, y = int(mark.center[0] * picture.image.width), int(mark.center[1] * picture.image.height)
        seen = np.median(pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3), axis=0)
        assert min(COLOURS, key=lambda name: np.linalg.norm(seen - np.array(COLOURS[name]))) == colour


@PROPERTY
@given(SEEDS)
def test_easy_shapes_have_their_exact_colours_inside_their_boxes_and_nowhere_else(seed):
    """By pixels: as none overlaps another, each fills its share of its box, and the rest is one paper."""
    scene, picture = drawn(seed, difficulty=0)
    codes = np.asarray(picture.image).astype(int) @ CODE
    for (colour, kind), mark in zip(scene, picture.marks, strict=True):
        is_it = codes == COLOURS[colour] @ CODE
        box = inside(mark, picture.image, margin=1)
        share = is_it[inside(mark, picture.image)].mean()
        assert is_it.sum() == is_it[box].sum(), f"{colour} {kind} outside its box"
        assert 0.28 < share < 0.9, f"{colour} {kind} fills {share:.2f} of its box"
    [paper] = set(np.unique(codes)) - {COLOURS[colour] @ CODE for colour, _ in scene}
    paper = np.array([paper >> 16, paper >> 8 & 255, paper & 255])
    assert min(np.linalg.norm(paper - np.array(COLOURS[colour])) for colour, _ in scene) > 80


def test_the_shapes_differ_from_each_other_and_are_themselves_at_any_angle():
    """Drawn alone in black: no two kinds fill alike; the area does not depend on the angle."""
    areas = {}
    for kind in SHAPES:
        shares = []
        for seed in range(12):
            picture = draw_shapes(np.random.default_rng(seed), [("black", kind)], (400, 400), seed % 2)
            [mark] = picture.marks
            dark = np.asarray(picture.image.convert("L"))[inside(mark, picture.image)] < 65
            shares.append(dark.mean())
        areas[kind] = np.mean(shares)
        assert np.ptp(shares) < 0.04, kind
    ordered = sorted(areas.values())
    assert min(np.diff(ordered)) > 0.01, areas


# --- seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawer", DRAWERS)
@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_one_seed_gives_one_picture_and_another_seed_another(drawer, difficulty):
    pictures = [DRAWERS[drawer](seed, difficulty) for seed in (7, 7, 8)]
    first, again, other = pictures
    assert first.marks == again.marks
    assert first.image.size == again.image.size
    assert first.image.tobytes() == again.image.tobytes()
    assert first.marks != other.marks
    assert first.image.tobytes() != other.image.tobytes()


def digest():
    pictures = [draw(seed, 1.0) for draw in DRAWERS.values() for seed in range(4)]
    return hashlib.sha256(b"".join(picture.image.tobytes() for picture in pictures)).hexdigest()


def test_another_process_draws_the_same():
    """Nothing is seeded by the clock or the order of a set."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_images; print(test_images.digest())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=FONTS.parents[1], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == digest()


@pytest.mark.parametrize("drawer", DRAWERS)
def test_pictures_are_rgb_of_the_asked_size(drawer):
    for seed in range(5):
        assert DRAWERS[drawer](seed, 1.0).image.mode == "RGB"
    rng = np.random.default_rng(0)
    assert draw_text(rng, "A1", (200, 90), TRAINING_FONTS).image.size == (200, 90)
    assert draw_glyph_page(rng, (90, 200), TRAINING_FONTS).image.size == (90, 200)
    assert draw_shapes(rng, [("red", "star")], (120, 120)).image.size == (120, 120)


# --- fonts -------------------------------------------------------------------------------------------


def bitmap(path, character):
    """A character, its place within the image included."""
    image = Image.new("L", (80, 80))
    font = ImageFont.truetype(str(path), 48, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(image).text((10, 10), character, fill=255, font=font)
    return image.tobytes()


def licence_rows():
    """(file prefixes, families, licence) of each row of the fonts' README."""
    rows = []
    for line in (FONTS / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        prefixes = re.findall(r"`([\w-]+-)`", cells[0])
        if line.startswith("|") and prefixes:
            rows.append((prefixes, cells[1], cells[2]))
    return rows


def test_training_and_held_out_fonts_are_disjoint():
    """By name, by family and by what they draw."""
    assert len(TRAINING_FONTS) >= 10
    assert len(HELD_OUT_FONTS) >= 2
    names = {ImageFont.truetype(str(path)).getname()[0] for path in TRAINING_FONTS}
    drawings = {bitmap(path, character) for path in TRAINING_FONTS for character in "AGQRS258"}
    for path in HELD_OUT_FONTS:
        assert path.name not in {other.name for other in TRAINING_FONTS}
        assert ImageFont.truetype(str(path)).getname()[0] not in names
        assert not drawings & {bitmap(path, character) for character in "AGQRS258"}


def test_no_two_fonts_are_the_same():
    assert len({"".join(bitmap(path, c).hex() for c in "AGR25") for path in ALL_FONTS}) == len(ALL_FONTS)


@pytest.mark.parametrize("path", ALL_FONTS, ids=lambda path: path.stem)
def test_a_font_draws_every_digit_and_capital_each_in_its_own_way(path):
    """O is not 0, I is not 1, and none is the box that stands for a missing character."""
    bitmaps = {bitmap(path, character) for character in [*CHARACTERS, "\N{SNOWMAN}"]}
    assert len(bitmaps) == len(CHARACTERS) + 1
    assert all(any(one) for one in bitmaps - {bitmap(path, "\N{SNOWMAN}")})


@pytest.mark.parametrize("path", ALL_FONTS, ids=lambda path: path.stem)
def test_a_font_is_named_after_its_family_and_has_a_licence_row(path):
    """The family that the file itself declares: no name that others reserve hides in it."""
    family = ImageFont.truetype(str(path)).getname()[0]
    assert path.stem.startswith(family.lower().replace(" ", "-"))
    rows = [licence for prefixes, _, licence in licence_rows() if path.name.startswith(tuple(prefixes))]
    assert rows, f"no row of the fonts' README covers {path.name}"
    assert all(rows)


def test_every_licence_row_covers_a_font():
    named = [prefix for prefixes, _, _ in licence_rows() for prefix in prefixes]
    unused = [prefix for prefix in named if not any(path.name.startswith(prefix) for path in ALL_FONTS)]
    assert named
    assert unused == []


def test_the_texts_of_all_licences_are_there():
    readme = (FONTS / "README.md").read_text(encoding="utf-8")
    linked = [FONTS / link for link in re.findall(r"\]\(([^)#:]+)\)", readme)]
    texts = {"OFL": "LICENSE-OFL.txt", "Apache": "LICENSE", "Bitstream Vera": "LICENSE-DEJAVU.txt"}
    assert {path.name for path in linked} == set(texts.values())
    for path in linked:
        assert path.stat().st_size > 1000, path.name
    for _, families, licence in licence_rows():
        assert any(licence.startswith(name) for name in texts), families
    assert {path.suffix for path in Path(FONTS).rglob("*") if path.is_file()} == {".ttf", ".txt", ".md"}
