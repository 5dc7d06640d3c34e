"""The widths of the real model, two layers of each part: what quantisation costs in logits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.checkpoint.loader import load_dummy_weights
from wemm.checkpoint.weight_map import expected_tensors
from wemm.config import PRESETS, EngineConfig
from wemm.doctor.doctor import Examination, examine
from wemm.model.wemm import WemmModel
from wemm.progress import silent

TINY = BUNDLED_DIRECTORY / "tiny"


@pytest.fixture(scope="module")
def real_shapes(tmp_path_factory):
    """A checkpoint of random weights: 1.3 GB."""
    from wemm.checkpoint.config_file import parse_config

    directory = tmp_path_factory.mktemp("real") / "shapes"
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    real, plora = PRESETS["wemm-chat-2k-cn"]
    config = json.loads((TINY / "config.json").read_text())
    for section, source in (("vision_config", real.vision), ("text_config", real.text)):
        for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
            config[section][key] = getattr(source, key)
        config[section]["num_hidden_layers"] = 2
    config["vision_config"] |= {"image_size": real.vision.image_size, "patch_size": real.vision.patch_size}
    config["text_config"] |= {"num_key_value_heads": real.text.num_key_value_heads}
    config["downsampler_config"] |= {"visual_hidden_size": 1152, "llm_hidden_size": 4096}
    config["spliter_emb_config"]["embedding_dim"] = 4096
    (directory / "config.json").write_text(json.dumps(config))
    adapter = json.loads((TINY / "adapter_config.json").read_text()) | {"r": plora.r, "lora_alpha": plora.alpha}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    parsed = parse_config(config, "config.json")
    with torch.device("meta"):
        model = WemmModel(parsed, plora)
    load_dummy_weights(model, torch.bfloat16, torch.device("cpu"))
    weights = dict(model.named_parameters())
    specs = expected_tensors(parsed, plora).values()
    save_file({spec.name: weights[spec.parameter].data for spec in specs}, directory / "model.safetensors")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"quantization": "int8"}, 0.999),
        ({"quantization": "int8", "vision_quantization": "int8", "kv_cache_dtype": "int8"}, 0.998),
        ({"quantization": "int4"}, 0.95),
    ],
    ids=["int8", "int8 throughout", "int4"],
)
def test_logits_point_where_those_of_float32_do(real_shapes, options, least):
    """The worst row's cosine, over a prompt with a picture and the tokens answered to it.

    Random weights have no structure that rounding could spare: trained ones fare better.
    """
    config = EngineConfig(str(real_shapes), dtype="float32", device="cpu", max_model_len=2048, **options)
    report = examine(config, Examination(canaries=False, quick=True), silent)
    [stages] = [check for check in report.checks if check.name == "stages"]
    logits = stages.figures["stages"][-1]
    assert stages.status == "ok"
    assert logits["name"] == "logits"
    assert logits["cosine"] >= least
