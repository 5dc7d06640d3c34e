"""The original's image rules, held to the float32 reference and to torch and Pillow themselves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.checkpoint.config_file import parse_config
from wemm.config import PRESETS, ImageConfig
from wemm.ops.embed_patches import normalize
from wemm.processing.image_processor import (
    ImageProcessor,
    patch_extents,
    patchify,
    position_buckets,
    position_ids,
    resized_size,
)
from wemm.processing.media import open_image

GOLDEN_DIRECTORY = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((GOLDEN_DIRECTORY / "golden.json").read_text(encoding="utf-8"))
IMAGE_CASES = [case for case in GOLDEN["cases"] if case["image"]]

TINY = parse_config(json.loads((BUNDLED_DIRECTORY / "tiny" / "config.json").read_text(encoding="utf-8")))
REAL, _ = PRESETS["wemm-chat-2k-cn"]

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
SIZES = st.tuples(st.integers(1, 6000), st.integers(1, 6000))


def processor(image=None, base=TINY):
    """An image processor with the patch and kernel size of `base` and another resize rule."""
    return ImageProcessor(dataclasses.replace(base, image=image or base.image))


def random_image(width, height, seed=0):
    samples = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(samples)


def normalized(pixels, patch_size):
    """Patches of one image as the vision tower multiplies them: float32 [num_patches, 3 * patch_size**2]."""
    height, width = pixels.shape[:2]
    extents = torch.from_numpy(patch_extents((width, height), patch_size))
    return normalize(patchify(pixels, patch_size), extents, patch_size)


# --- the reference's numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", GOLDEN["image_token_arithmetic_756_1960"], ids=lambda case: "{}x{}".format(*case["size"])
)
def test_the_plan_of_the_real_model_matches_the_reference(case):
    plan = ImageProcessor(REAL).plan(*case["size"])
    assert plan.resized == tuple(case["resized"])
    assert plan.patch_grid == tuple(case["patch_grid"])
    assert plan.num_patches == math.prod(case["patch_grid"])
    assert plan.num_tokens == case["num_image_tokens"]


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: case["image"])
def test_the_pixels_of_every_golden_image_match_the_reference(case):
    processed = processor().process(open_image(GOLDEN_DIRECTORY / "images" / case["image"]))
    values = normalized(processed.pixels, TINY.vision.patch_size)
    assert processed.plan.patch_grid == tuple(case["patch_grid"])
    assert processed.plan.num_tokens == case["num_image_tokens"]
    assert values.dtype == torch.float32
    assert values[0].view(3, -1)[:, 0].tolist() == case["pixel_corner"]  # float32, to the last bit
    # The sum cancels: its error is measured against the sum of magnitudes.
    scale = case["pixel_abs_sum"]
    assert values.double().sum().item() == pytest.approx(case["pixel_sum"], rel=1e-6, abs=1e-9 * scale)
    assert values.double().abs().sum().item() == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: case["image"])
def test_the_position_ids_of_every_golden_image_match_the_reference(case):
    ids = position_ids(tuple(case["patch_grid"]), TINY.vision.position_grid)
    assert len(ids) == math.prod(case["patch_grid"])
    assert ids[: len(case["position_ids_head"])].tolist() == case["position_ids_head"]
    assert ids.sum() == case["position_ids_sum"]


@pytest.mark.parametrize("num_patches", GOLDEN["position_buckets_of_70"])
def test_position_buckets_of_70_match_the_reference(num_patches):
    """On every machine, also where torch's own arange rounds differently."""
    assert position_buckets(int(num_patches), 70).tolist() == GOLDEN["position_buckets_of_70"][num_patches]


# --- resize rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "height"), [((1176, 480), 799), ((588, 480), 1599), ((896, 800), 1749)])
def test_the_double_division_makes_some_sizes_one_pixel_short(size, height):
    """The exact height is one more; the original has them so, and so do we (reference 2.3)."""
    exact = Fraction(1960) * size[1] / size[0]
    assert exact == height + 1
    assert resized_size(*size, ImageConfig()) == (1960, height)


@PROPERTY
@given(SIZES)
@example((1176, 480))
@example((480, 1176))
@example((1, 6000))
def test_the_long_edge_becomes_longest_edge_and_the_short_one_follows(size):
    """In exact arithmetic: rounded down, at least `shortest_edge`, one pixel short only where exact."""
    config = ImageConfig()
    long, short = max(size), min(size)
    exact = Fraction(config.longest_edge * short, long)
    resized = resized_size(*size, config)
    allowed = {math.floor(exact), math.floor(exact) - (exact.denominator == 1)}
    assert max(resized) == config.longest_edge
    assert min(resized) in {max(edge, config.shortest_edge) for edge in allowed}
    assert (resized[0] >= resized[1]) == (size[0] >= size[1]) or resized[0] == resized[1]


@PROPERTY
@given(SIZES)
def test_the_real_model_never_leaves_its_edges_and_token_bounds(size):
    plan = ImageProcessor(REAL).plan(*size)
    assert 756 <= min(plan.resized) <= max(plan.resized) == 1960
    assert 492 <= plan.num_tokens <= 1227
    assert 54 * 140 <= plan.num_patches <= 140 * 140


@PROPERTY
@given(SIZES)
def test_a_picture_on_its_side_costs_the_same(size):
    """Transposing swaps the plan, except where the double arithmetic of the two branches differs."""
    plan, turned = ImageProcessor(REAL).plan(*size), ImageProcessor(REAL).plan(*size[::-1])
    assert np.abs(np.subtract(plan.resized, turned.resized[::-1])).max() <= 1


@PROPERTY
@given(SIZES, st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_a_fixed_size_is_used_whatever_the_image(size, fixed_size):
    """The checkpoint says (height, width); a plan says (width, height)."""
    plan = processor(ImageConfig(fixed_size=fixed_size)).plan(*size)
    assert plan.resized == (fixed_size[1], fixed_size[0])


def test_a_fixed_size_is_what_an_image_is_resized_to():
    processed = processor(ImageConfig(fixed_size=(28, 42))).process(random_image(100, 10))
    assert processed.pixels.shape == (28, 42, 3)
    assert processed.plan.patch_grid == (2, 3)


def test_fixed_size_is_read_from_the_checkpoint():
    config = json.loads((BUNDLED_DIRECTORY / "tiny" / "config.json").read_text(encoding="utf-8"))
    config["image_processor"]["size"] = {"height": 56, "width": 84}
    assert ImageProcessor(parse_config(config)).plan(640, 480).resized == (84, 56)


# --- pixels ------------------------------------------------------------------------------------------


@settings(PROPERTY, max_examples=100)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    shortest_edge=st.integers(1, 60),
    longer_by=st.integers(0, 60),
    patch_size=st.integers(1, 16),
)
def test_the_plan_is_what_the_pixels_become(size, shortest_edge, longer_by, patch_size):
    """Real resize, real padding, real patches: all as planned from width and height alone."""
    vision = dataclasses.replace(TINY.vision, patch_size=patch_size)
    image_config = ImageConfig(shortest_edge, shortest_edge + longer_by)
    processor = ImageProcessor(dataclasses.replace(TINY, vision=vision, image=image_config))
    image = random_image(*size)
    processed = processor.process(image)
    width, height = processed.plan.resized
    rows, columns = processed.plan.patch_grid

    assert processed.plan == processor.plan(*size)
    assert np.array_equal(processed.pixels, image.resize((width, height), Image.Resampling.BILINEAR))

    values = normalized(processed.pixels, patch_size)
    assert values.shape == (rows * columns, 3 * patch_size**2) == (processed.plan.num_patches, values.shape[1])
    planes = values.view(rows, columns, 3, patch_size, patch_size).permute(2, 0, 3, 1, 4)
    planes = planes.reshape(3, rows * patch_size, columns * patch_size)
    assert planes[:, :height, :width].abs().max() <= 1
    assert not planes[:, height:].any()
    assert not planes[:, :, width:].any()

    kernel = TINY.downsampler.kernel_size
    padded = F.pad(torch.zeros(1, rows, columns), (0, -columns % kernel, 0, -rows % kernel))
    grid = F.max_pool2d(padded, kernel)
    assert processed.plan.token_grid == tuple(grid.shape[1:])
    assert processed.plan.num_tokens == grid.numel() + 2


@pytest.mark.parametrize("patch_size", [1, 2, 14])
def test_patchify_orders_patches_and_samples_as_a_convolution_does(patch_size):
    pixels = torch.from_numpy(np.array(random_image(2 * patch_size, 3 * patch_size)))
    planes = pixels.permute(2, 0, 1).float()
    patches = F.unfold(planes[None], patch_size, stride=patch_size)[0].T
    assert torch.equal(patchify(pixels, patch_size), patches.to(torch.uint8))


def test_normalisation_multiplies_by_float32_of_one_255th():
    """All 256 samples to the last bit; dividing by 255 would give other bits for some of them."""
    samples = np.arange(256, dtype=np.uint8)
    pixels = torch.from_numpy(samples).reshape(1, 256, 1).expand(1, 256, 3)
    expected = (samples.astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)
    divided = (samples.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    for channel in normalized(pixels, 1).T:
        assert np.array_equal(channel.numpy(), expected)
    assert not np.array_equal(expected, divided)
    assert (expected[0], expected[255]) == (-1.0, 1.0)


def test_padding_is_zero_after_normalisation_at_the_bottom_and_right():
    values = normalized(torch.full((5, 3, 3), 255, dtype=torch.uint8), 4)
    assert values.shape == (2, 3 * 4 * 4)
    planes = values.view(2, 3, 4, 4).transpose(0, 1).reshape(3, 8, 4)
    assert (planes[:, :5, :3] == 1).all()
    assert values.sum() == 3 * 5 * 3


@PROPERTY
@given(size=st.tuples(st.integers(1, 70), st.integers(1, 70)), patch_size=st.sampled_from([1, 2, 7, 14]))
def test_patches_are_those_of_the_image_normalised_first_and_padded_with_zeros_then(size, patch_size):
    """To the last bit, the sign of zero included."""
    pixels = torch.from_numpy(np.array(random_image(*size)))
    planes = (pixels.permute(2, 0, 1).to(torch.float32) * (1 / 255) - 0.5) / 0.5
    planes = F.pad(planes, (0, -size[0] % patch_size, 0, -size[1] % patch_size))
    expected = F.unfold(planes[None], patch_size, stride=patch_size)[0].T.contiguous()
    assert torch.equal(normalized(pixels, patch_size).view(torch.int32), expected.view(torch.int32))


def test_whole_patches_are_not_padded():
    assert patchify(torch.zeros(28, 14, 3, dtype=torch.uint8), 14).shape == (2, 3 * 14 * 14)
    assert (patch_extents((14, 28), 14) == 14).all()


# --- hash --------------------------------------------------------------------------------------------


def test_equal_pixels_give_equal_hashes_whatever_they_came_from(tmp_path):
    image = random_image(30, 20)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    hashes = {
        processor().process(source).sha256
        for source in (image, image.copy(), open_image(tmp_path / "a.png"), open_image(tmp_path / "b.bmp"))
    }
    assert len(hashes) == 1


def test_one_changed_pixel_gives_another_hash():
    """In the resized picture: where the size is kept, each sample counts."""
    small = processor(ImageConfig(fixed_size=(5, 4)))
    hashes = {small.process(random_image(4, 5)).sha256}
    for position in range(4 * 5 * 3):
        samples = np.array(random_image(4, 5))
        samples.reshape(-1)[position] ^= 1
        hashes.add(small.process(Image.fromarray(samples)).sha256)
    assert len(hashes) == 1 + 4 * 5 * 3


def test_the_same_bytes_in_another_shape_give_another_hash():
    """A black 28x14 and a black 14x28 picture hold the same bytes, but are not the same picture."""
    wide = processor(ImageConfig(fixed_size=(14, 28))).process(Image.new("RGB", (9, 9)))
    tall = processor(ImageConfig(fixed_size=(28, 14))).process(Image.new("RGB", (9, 9)))
    assert wide.pixels.numel() == tall.pixels.numel()
    assert wide.sha256 != tall.sha256


def test_the_hash_is_a_whole_sha256():
    digest = processor().process(random_image(3, 3)).sha256
    assert len(bytes.fromhex(digest)) == hashlib.sha256().digest_size


# --- position buckets --------------------------------------------------------------------------------


def torch_buckets(num_patches, position_grid):
    """The original's lines, run by torch (reference 2.5)."""
    boundaries = torch.arange(1 / position_grid, 1.0, 1 / position_grid)
    fractions = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(num_patches))
    return torch.bucketize(fractions, boundaries, right=True)


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="the reference ran on x86; torch.arange rounds differently with other vector widths",
)
@pytest.mark.parametrize("position_grid", [70, 140, 25, 27])
def test_position_buckets_are_what_torch_computes(position_grid):
    """70 and 140 are tables WeMM may have; 25 and 27 tell apart roundings that these do not."""
    differing = [
        num_patches
        for num_patches in range(1, 181)
        if position_buckets(num_patches, position_grid).tolist()
        != torch_buckets(num_patches, position_grid).tolist()
    ]
    assert differing == []


def test_position_buckets_differ_from_exact_arithmetic_where_the_reference_does():
    """A cleaner formula would be a wrong one: the float32 one is off by one in 14 of the first 140 counts."""
    differing = [
        num_patches
        for num_patches in range(1, 141)
        if position_buckets(num_patches, 70).tolist() != [i * 70 // num_patches for i in range(num_patches)]
    ]
    assert differing == [25, 49, 50, 55, 58, 77, 82, 86, 94, 98, 100, 110, 115, 135]
    assert {str(num_patches) for num_patches in differing} <= GOLDEN["position_buckets_of_70"].keys()


@PROPERTY
@given(st.integers(1, 500), st.integers(1, 200))
def test_position_buckets_are_one_per_patch_rising_and_inside_the_table(num_patches, position_grid):
    buckets = position_buckets(num_patches, position_grid)
    exact = np.arange(num_patches) * position_grid // num_patches
    assert len(buckets) == num_patches
    assert buckets[0] == 0
    assert (np.diff(buckets) >= 0).all()
    assert buckets.max() < position_grid
    assert np.abs(buckets - exact).max() <= 1


def test_position_ids_are_row_major():
    """[rows, columns] of a table with `position_grid` columns."""
    assert position_ids((2, 3), 6).tolist() == [0, 2, 4, 18, 20, 22]
