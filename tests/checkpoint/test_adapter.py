"""Where PLoRA comes from, and with which rank and scaling."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from wemm import LLM, SamplingParams
from wemm.checkpoint.checkpoint import open_checkpoint
from wemm.checkpoint.weight_map import is_plora
from wemm.config import PloraConfig
from wemm.errors import CheckpointError, ConfigError

WQKV = "language_model.model.layers.1.attention.wqkv"


def test_adapter_config_wins_over_lora_cfg(tiny, edit_json):
    edit_json(tiny / "adapter_config.json", r=8, lora_alpha=4)
    assert open_checkpoint(tiny).plora.scaling(WQKV) == 0.5


def test_lora_cfg_where_there_is_no_adapter_config(tiny):
    (tiny / "adapter_config.json").unlink()
    plora = open_checkpoint(tiny).plora
    assert plora.scaling(WQKV) == 2
    assert plora.source == "config.json: lora_cfg"


def test_tensors_and_scaling_1_where_no_file_says_anything(tiny, edit_json):
    (tiny / "adapter_config.json").unlink()
    edit_json(tiny / "config.json", text_config__lora_cfg=None)
    plora = open_checkpoint(tiny).plora
    assert plora.rank(WQKV) == 8
    assert plora.scaling(WQKV) == 1
    assert "tensor shapes" in plora.source


def test_rank_stabilised_lora_divides_by_the_root(tiny, edit_json):
    edit_json(tiny / "adapter_config.json", use_rslora=True)
    assert open_checkpoint(tiny).plora.scaling(WQKV) == pytest.approx(16 / math.sqrt(8))


def test_patterns_match_the_end_of_the_name_as_in_peft():
    plora = PloraConfig(
        8, 16, rank_pattern={"wqkv": 4, r"layers\.0\.attention\.wo": 2}, alpha_pattern={"wqkv": 1.0}
    )
    assert plora.rank(WQKV) == 4
    assert plora.scaling(WQKV) == 0.25
    assert plora.rank("language_model.model.layers.0.attention.wo") == 2
    assert plora.rank("language_model.model.layers.1.attention.wo") == 8
    assert plora.rank("language_model.model.layers.0.feed_forward.xwqkv") == 8


def test_a_linear_of_another_rank(tiny, edit_json):
    """rank_pattern: a tensor of that rank loads and is applied with its own scaling."""
    shard = tiny / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    name = "language_model.model.layers.0.attention.wo"
    tensors[f"{name}.Plora_A.weight"] = tensors[f"{name}.Plora_A.weight"][:4].contiguous()
    tensors[f"{name}.Plora_B.weight"] = tensors[f"{name}.Plora_B.weight"][:, :4].contiguous()
    save_file(tensors, shard)
    edit_json(tiny / "adapter_config.json", rank_pattern={r"layers\.0\.attention\.wo": 4})
    plora = open_checkpoint(tiny).plora
    assert (plora.rank(name), plora.scaling(name)) == (4, 4)
    LLM(str(tiny), device="cpu").close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, r"r must be an integer in \[1, 1024\]. Given: 0"),
        ({"r": 2048}, "r must be an integer"),
        ({"lora_alpha": -1}, r"lora_alpha must be a number in \(0, 1024\]"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern key '\(' is not a regular expression"),
        ({"lora_alpha": True}, "lora_alpha must be a number"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"wo": "x"}}, "alpha_pattern.wo must be a number"),
    ],
)
def test_impossible_values(tiny, edit_json, change, message):
    edit_json(tiny / "adapter_config.json", **change)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tiny)


def _adapter_directory(tiny, path, scale=1.0):
    """PLoRA tensors of the tiny checkpoint, scaled, in a directory of their own."""
    tensors = {}
    for shard in tiny.glob("*.safetensors"):
        tensors |= {name: tensor for name, tensor in load_file(shard).items() if is_plora(name)}
    path.mkdir()
    save_file(
        {name: t * scale if "Plora_B" in name else t for name, t in tensors.items()}, path / "plora.safetensors"
    )
    (path / "adapter_config.json").write_text((tiny / "adapter_config.json").read_text())
    return path


def _answer(directory, golden_images, ask):
    with LLM(str(directory), dtype="float32", device="cpu") as llm:
        [output] = llm.chat(
            ask("What is written here?", golden_images / "33x21.png"), SamplingParams(max_tokens=4, logprobs=1)
        )
        return output.outputs[0].cumulative_logprob


def test_the_model_directory_itself(tiny, golden_images, ask):
    before = _answer(tiny, golden_images, ask)
    for directory in (str(tiny), "."):
        (tiny / "lora_adapter.json").write_text(json.dumps({"wemm": directory}))
        assert _answer(tiny, golden_images, ask) == before


def test_another_directory_wins(tiny, tmp_path, golden_images, ask):
    """Its factors replace the model's own: the same ones change nothing, doubled ones equal doubled alpha."""
    before = _answer(tiny, golden_images, ask)
    for name, scale in (("same", 1.0), ("double", 2.0)):
        _adapter_directory(tiny, tmp_path / name, scale)
    (tiny / "lora_adapter.json").write_text(json.dumps({"wemm": str(tmp_path / "same")}))
    assert _answer(tiny, golden_images, ask) == before
    (tiny / "lora_adapter.json").write_text(json.dumps({"wemm": str(tmp_path / "double")}))
    doubled = _answer(tiny, golden_images, ask)
    (tiny / "lora_adapter.json").unlink()
    (tiny / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 32}')
    assert doubled == pytest.approx(_answer(tiny, golden_images, ask), rel=1e-4)
    assert doubled != pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"wemm": "/moved/away"}',
            "adapter directory '/moved/away' does not exist; correct it, or delete the file",
        ),
        ('{"other": "."}', 'must be {"wemm": DIRECTORY}'),
        ('{"wemm": 3}', 'must be {"wemm": DIRECTORY}'),
        ("[", "not readable as JSON"),
    ],
)
def test_a_wrong_adapter_map(tiny, content, message):
    (tiny / "lora_adapter.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tiny)
    assert message in str(error.value)


def test_an_adapter_directory_with_some_factors(tiny, tmp_path):
    """Those win; the others stay the model's own."""
    other = _adapter_directory(tiny, tmp_path / "some")
    tensors = load_file(other / "plora.safetensors")
    save_file({name: t for name, t in tensors.items() if ".layers.0." in name}, other / "plora.safetensors")
    (tiny / "lora_adapter.json").write_text(json.dumps({"wemm": str(other)}))
    files = {name: tensor.file.parent for name, tensor in open_checkpoint(tiny).tensors.items() if is_plora(name)}
    assert {directory for name, directory in files.items() if ".layers.0." in name} == {other}
    assert {directory for name, directory in files.items() if ".layers.1." in name} == {tiny}


def test_an_empty_adapter_config_means_pefts_defaults(tiny):
    (tiny / "adapter_config.json").write_text("{}")
    plora = open_checkpoint(tiny).plora
    assert (plora.rank(WQKV), plora.scaling(WQKV)) == (8, 1)


def test_no_plora_anywhere(tiny, edit_json):
    (tiny / "adapter_config.json").unlink()
    (tiny / "model.safetensors.index.json").unlink()
    edit_json(tiny / "config.json", text_config__lora_cfg=None)
    for shard in tiny.glob("*.safetensors"):
        save_file({name: t for name, t in load_file(shard).items() if not is_plora(name)}, shard)
    with pytest.raises(CheckpointError, match="no PLoRA tensors .* run without PLoRA by --no-plora"):
        open_checkpoint(tiny)
    with pytest.raises(CheckpointError, match="no PLoRA rank in its files"):
        LLM(str(tiny), load_format="dummy", device="cpu")
    LLM(str(tiny), load_format="dummy", device="cpu", plora=False).close()


def test_an_adapter_directory_without_factors(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "empty" / "x.safetensors")
    (tiny / "lora_adapter.json").write_text(json.dumps({"wemm": str(tmp_path / "empty")}))
    with pytest.raises(CheckpointError, match="holds no Plora_A/Plora_B tensors"):
        open_checkpoint(tiny)


def test_without_plora_the_answer_differs_and_text_does_not(golden_images, ask):
    """--no-plora: image prompts change, text-only prompts are plain InternLM2 either way."""
    results = {}
    for plora in (True, False):
        with LLM("tiny", dtype="float32", device="cpu", plora=plora) as llm:
            params = SamplingParams(max_tokens=4, logprobs=1)
            for name, images in (("image", [golden_images / "33x21.png"]), ("text", [])):
                [output] = llm.chat(ask("What is written here?", *images), params)
                results[name, plora] = output.outputs[0].cumulative_logprob
    assert results["text", True] == results["text", False]
    assert results["image", True] != results["image", False]
