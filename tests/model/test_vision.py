"""Vision tower and downsampler against torch's own convolutions, and packed = alone."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY, open_checkpoint
from wemm.checkpoint.loader import load_weights
from wemm.config import ImageConfig
from wemm.engine.vision_encode import image_batch
from wemm.model.downsampler import group_patches
from wemm.model.wemm import WemmModel
from wemm.ops.embed_patches import embed_patches, normalize
from wemm.processing.image_processor import ImageProcessor, patchify

CPU = torch.device("cpu")


@functools.cache
def _checkpoint():
    return open_checkpoint(BUNDLED_DIRECTORY / "tiny")


@functools.cache
def _model():
    checkpoint = _checkpoint()
    with torch.device("meta"):
        model = WemmModel(checkpoint.config, checkpoint.plora)
    load_weights(model, checkpoint, torch.float32, CPU)
    return model


CONFIG = _checkpoint().config


def _image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _encode(config, images):
    model = _model()
    packed = image_batch(images, config.vision, CPU)
    with torch.inference_mode():
        return model.visual_embeds(model.vision_tower(packed), packed.patch_grids)


def test_patch_embedding_is_the_convolution():
    image = ImageProcessor(CONFIG).process(_image(50, 30))
    width, height = image.plan.resized
    assert height % 14  # what is padded is 0 after normalisation
    planes = (image.pixels.permute(2, 0, 1).float() * (1 / 255) - 0.5) / 0.5
    planes = F.pad(planes, (0, -width % 14, 0, -height % 14))
    packed = image_batch([image], CONFIG.vision, CPU)
    embedding = _model().vision_tower.embeddings.patch_embedding
    with torch.inference_mode():
        expected = F.conv2d(planes[None], embedding.weight, embedding.bias, stride=14)[0].flatten(1).T
        got = embedding(packed.patches, packed.extents)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_images_is_bytes():
    """A quarter of what normalised samples of float32 would be."""
    images = [ImageProcessor(CONFIG).process(_image(*size)) for size in [(50, 30), (20, 90)]]
    packed = image_batch(images, CONFIG.vision, CPU)
    num_patches = sum(image.plan.num_patches for image in images)
    assert packed.patches.dtype is torch.uint8
    assert packed.patches.shape == (num_patches, 3 * 14 * 14)
    assert packed.extents.shape == (num_patches, 2)
    inside = 3 * packed.extents.prod(dim=1).sum()
    assert inside == sum(image.pixels.numel() for image in images)


def test_the_patch_embedding_learns_from_bytes():
    image = ImageProcessor(CONFIG).process(_image(50, 30))
    packed = image_batch([image], CONFIG.vision, CPU)
    parameters = [
        p.detach().clone().requires_grad_() for p in _model().vision_tower.embeddings.patch_embedding.parameters()
    ]
    embed_patches(packed.patches, packed.extents, *parameters).sum().backward()
    weight, bias = (p.grad for p in parameters)
    samples = normalize(packed.patches, packed.extents, 14).sum(dim=0).view(3, 14, 14)
    torch.testing.assert_close(weight, samples.expand_as(weight), rtol=1e-4, atol=1e-4)
    assert (bias == image.plan.num_patches).all()


@pytest.mark.parametrize("grid", [(4, 8), (5, 7), (1, 1), (31, 12)], ids=str)
def test_downsampler_is_the_convolution_after_replicate_padding(grid):
    features = torch.randn(grid[0] * grid[1], 48)
    conv = _model().downsampler.conv
    planes = features.view(*grid, 48).permute(2, 0, 1)[None]
    padded = F.pad(planes, (0, -grid[1] % 4, 0, -grid[0] % 4), mode="replicate")
    with torch.inference_mode():
        expected = F.conv2d(padded, conv.weight, stride=4)[0].flatten(1).T
        torch.testing.assert_close(conv(group_patches(features, grid, 4)), expected, rtol=1e-4, atol=1e-5)


def test_packed_images_equal_the_same_images_alone():
    processor = ImageProcessor(CONFIG)
    images = [processor.process(_image(*size, seed)) for seed, size in enumerate([(60, 30), (20, 90), (64, 64)])]
    together = _encode(CONFIG, images)
    for image, embeds in zip(images, together, strict=True):
        torch.testing.assert_close(_encode(CONFIG, [image])[0], embeds, rtol=1e-4, atol=1e-5)


def test_separator_rows_enclose_the_grid():
    [embeds] = _encode(CONFIG, [ImageProcessor(CONFIG).process(_image(9, 9))])
    assert torch.equal(embeds[0], _model().separator_embedding.weight[0])
    assert torch.equal(embeds[-1], _model().separator_embedding.weight[1])


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 6000), height=st.integers(1, 6000), longest=st.sampled_from([56, 70, 98]))
def test_token_count_equals_the_embeddings_the_model_makes(width, height, longest):
    """For any size, the count from width and height alone is what tower and downsampler produce.

    The real path (resize, pad, patchify, normalise, tower, downsampler), with a smaller long edge so that
    many sizes can be tried.
    """
    config = dataclasses.replace(CONFIG, image=ImageConfig(longest_edge=longest, shortest_edge=30))
    processor = ImageProcessor(config)
    plan = processor.plan(width, height)
    image = processor.process(Image.new("RGB", (width, height), (200, 30, 90)))
    assert image.pixels.shape == (plan.resized[1], plan.resized[0], 3)
    assert patchify(image.pixels, 14).shape[0] == plan.num_patches
    [embeds] = _encode(config, [image])
    assert embeds.shape == (plan.num_tokens, config.text.hidden_size)


@pytest.mark.parametrize("seed", range(4))
def test_token_count_at_the_true_edges(seed):
    """The same with 756/1960, up to 19600 patches through the tiny tower."""
    width, height = np.random.default_rng(seed).integers(1, 6001, 2).tolist()
    config = dataclasses.replace(CONFIG, image=ImageConfig())
    processor = ImageProcessor(config)
    [embeds] = _encode(config, [processor.process(Image.new("RGB", (width, height), (9, 90, 200)))])
    assert embeds.shape[0] == processor.plan(width, height).num_tokens


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 5000), (5000, 1), (33, 21), (640, 480), (3000, 1000), (13, 13)], ids=str
)
def test_token_count_of_awkward_sizes_through_the_whole_path(llm, ask, size):
    """Also from the real decoder on: the prompt holds exactly the planned positions."""
    image = _image(*size)
    [output] = llm.chat(ask("?", image))
    plan = ImageProcessor(llm._open.source.config).plan(*size)
    assert output.num_image_tokens == plan.num_tokens
