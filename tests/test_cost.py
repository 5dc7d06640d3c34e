"""Costs in closed form against the model itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wemm.checkpoint.weight_map import expected_tensors
from wemm.config import PRESETS
from wemm.cost import (
    activation_bytes,
    count_parameters,
    image_cost,
    kv_bytes_per_token,
    largest_image,
    plan_memory,
    prefill_flops,
)
from wemm.engine.scheduler import VisionSlice
from wemm.errors import ParameterError

CONFIG, PLORA = PRESETS["wemm-chat-2k-cn"]


def test_parameters_of_the_real_model():
    counts = count_parameters(expected_tensors(CONFIG, PLORA).values())
    assert sum(counts.values()) == 9_455_743_216
    assert counts["plora"] == 1_207_959_552
    assert list(counts) == ["vision_tower", "downsampler", "separators", "language_model", "plora"]


def test_parameters_match_the_sibling_checkpoint_to_the_byte():
    """WeMM-Chat-CN (r = 256, k = 2) publishes its total size: the same arithmetic must give it exactly."""
    import dataclasses

    config = dataclasses.replace(CONFIG, downsampler=dataclasses.replace(CONFIG.downsampler, kernel_size=2))
    counts = count_parameters(expected_tensors(config, dataclasses.replace(PLORA, r=256)).values())
    assert 2 * sum(counts.values()) == 17_590_280_672


def test_kv_bytes():
    assert kv_bytes_per_token(CONFIG, "float16") == 2 * 32 * 8 * 128 * 2


def test_a_2k_image():
    """The figures the design starts from: 39 TFLOP in the tower, 27 of them attention."""
    cost = image_cost(CONFIG, PLORA, 1960, 1470, "float16")
    assert cost.plan.num_tokens == 947
    assert cost.tower_flops == pytest.approx(39e12, rel=0.02)
    assert cost.tower_attention_flops == pytest.approx(27e12, rel=0.02)


def test_image_tokens_cost_plora_and_kv():
    n, text = 947, CONFIG.text
    per_token = 2 * 512 * (6144 + 4096 + 4096 + 4096 + 3 * (14336 + 4096)) * text.num_hidden_layers
    assert prefill_flops(CONFIG, PLORA, n, n) - prefill_flops(CONFIG, PLORA, n, 0) == n * per_token
    assert image_cost(CONFIG, PLORA, 1960, 1470, "float16").kv_bytes == n * kv_bytes_per_token(CONFIG, "float16")


def test_activations_are_the_larger_of_tower_and_prefill():
    sizes = [activation_bytes(CONFIG, tokens, 512, "float16") for tokens in (1, 100, 20_000, 40_000)]
    assert sizes[0] == sizes[1]
    assert sizes[3] == 2 * sizes[2] > sizes[1]


def test_the_largest_image_of_a_fixed_size():
    import dataclasses

    from wemm.config import ImageConfig

    config = dataclasses.replace(CONFIG, image=ImageConfig(fixed_size=(14, 280)))
    assert largest_image(config).num_patches >= 20


def test_max_model_len_shrinks_to_the_cache():
    memory = 4096 * kv_bytes_per_token(CONFIG, "float16")
    plan = plan_memory(CONFIG, 10**9, "float16", 2**36, None, 4, 256, 512, 16, memory)
    assert (plan.kv_tokens, plan.max_model_len) == (4096, 4096)


def test_tower_flops_are_what_torch_counts(llm, ask):
    """On the tiny model, without attention (torch does not count every attention kernel)."""
    from PIL import Image

    source = llm._open.source
    runner = llm._open.engine._runner
    [span] = llm._open.processor.chat(ask("?", Image.new("RGB", (640, 480)))).image_spans
    with FlopCounterMode(display=False) as counter:
        num_layers = source.config.vision.num_hidden_layers
        runner.encode(VisionSlice((span.image,), 0, num_layers, is_complete=True))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    cost = image_cost(source.config, source.plora, 640, 480, "float32")
    assert counted == cost.tower_flops - cost.tower_attention_flops + cost.downsampler_flops


def test_prefill_flops_are_what_torch_counts(llm):
    source = llm._open.source
    from wemm import SamplingParams

    with FlopCounterMode(display=False) as counter:
        llm.generate([[5] * 64], SamplingParams(max_tokens=1))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    text = source.config.text
    attention = 2 * 64 * 65 * text.hidden_size * text.num_hidden_layers
    assert counted == prefill_flops(source.config, source.plora, 64, 0) - attention


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * 2**30), ("512M", 2**29), ("1.5k", 1536), ("1073741824", 2**30), (" 2 GB ", 2**31)],
)
def test_sizes_as_people_write_them(text, size):
    from wemm.config import parse_bytes

    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "9" * 400, "foo", "-1G", "4 GiB!", "1e9", "nan", "G"])
def test_sizes_nobody_writes(text):
    from wemm.config import parse_bytes

    with pytest.raises(ParameterError, match="a size is written like 4GiB"):
        parse_bytes(text)


def test_meta_device_can_hold_the_real_model():
    from wemm.model.wemm import WemmModel

    with torch.device("meta"):
        model = WemmModel(CONFIG, PLORA)
    assert sum(p.numel() for p in model.parameters()) == 9_455_743_216
