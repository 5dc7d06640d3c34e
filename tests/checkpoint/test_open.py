"""A checkpoint is opened complete or refused with one line that lists names and the remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wemm.checkpoint.checkpoint import default_sampling_params, is_preset, locate, open_checkpoint
from wemm.checkpoint.shards import INDEX_NAME
from wemm.errors import CheckpointError, ClientError, ConfigError, ModelNotFoundError

FIRST = "model-00001-of-00003.safetensors"


def _edit_shard(directory, edit, name=FIRST):
    """Rewrite one shard with its tensors changed by `edit`, index included."""
    tensors = load_file(directory / name)
    edit(tensors)
    save_file(tensors, directory / name)
    index = json.loads((directory / INDEX_NAME).read_text())
    kept = {key: file for key, file in index["weight_map"].items() if file != name}
    index["weight_map"] = {**kept, **dict.fromkeys(tensors, name)}
    (directory / INDEX_NAME).write_text(json.dumps(index))


def test_the_bundled_checkpoint_opens(tiny):
    checkpoint = open_checkpoint(tiny)
    assert len(checkpoint.tensors) == len(checkpoint.specs) == 94
    assert checkpoint.dtype == "float16"
    assert checkpoint.plora.rank("language_model.model.layers.0.attention.wo") == 8
    assert checkpoint.plora.scaling("language_model.model.layers.0.attention.wo") == 2


def test_any_shard_naming_and_no_index(tiny):
    (tiny / INDEX_NAME).unlink()
    (tiny / FIRST).rename(tiny / "part-a.safetensors")
    assert len(open_checkpoint(tiny).tensors) == 94


def test_renamed_spelling(tiny):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(".original_linear.", ".")] = tensors.pop(name)

    for shard in sorted(path.name for path in tiny.glob("*.safetensors")):
        _edit_shard(tiny, rename, shard)
    assert len(open_checkpoint(tiny).tensors) == 94


def test_missing_tensor(tiny):
    _edit_shard(tiny, lambda t: t.pop("downsampler.group_op.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors missing: downsampler\.group_op\.weight"):
        open_checkpoint(tiny)


def test_missing_plora_is_an_error_unless_asked_for(tiny):
    _edit_shard(tiny, lambda t: t.pop("language_model.model.layers.0.attention.wo.Plora_A.weight"))
    with pytest.raises(CheckpointError, match="1 PLoRA tensors missing: .*wo.Plora_A.weight.*--no-plora"):
        open_checkpoint(tiny)
    assert open_checkpoint(tiny, use_plora=False).plora is None


def test_extra_tensor(tiny):
    _edit_shard(tiny, lambda t: t.update({"language_model.model.layers.9.ffn_norm.weight": torch.ones(128)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected tensors: language_model\.model\.layers\.9"):
        open_checkpoint(tiny)


def test_wrong_shape(tiny):
    _edit_shard(tiny, lambda t: t.update({"downsampler.group_op.weight": torch.ones(128, 48, 2, 2).half()}))
    with pytest.raises(
        CheckpointError, match=r"group_op.weight is \[128, 48, 2, 2\] but must be \[128, 48, 4, 4\]"
    ):
        open_checkpoint(tiny)


def test_wrong_rank_names_where_the_rank_came_from(tiny, edit_json):
    edit_json(tiny / "adapter_config.json", r=16)
    with pytest.raises(CheckpointError, match=r"Plora_A.weight is \[8, 128\].*\[16, 128\].*adapter_config.json"):
        open_checkpoint(tiny)


def test_a_tensor_stored_twice(tiny):
    (tiny / INDEX_NAME).unlink()
    (tiny / "copy.safetensors").write_bytes((tiny / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match="stored twice: in copy.safetensors and model-00001"):
        open_checkpoint(tiny)


def test_integer_weights_are_refused(tiny):
    _edit_shard(
        tiny, lambda t: t.update({"downsampler.group_op.weight": torch.ones(128, 48, 4, 4, dtype=torch.int8)})
    )
    with pytest.raises(CheckpointError, match="group_op.weight is I8 and must be F16 or BF16 or F32"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_that_points_outside(tiny, name):
    index = json.loads((tiny / INDEX_NAME).read_text())
    index["weight_map"]["downsampler.group_op.weight"] = name
    (tiny / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must be a plain file name"):
        open_checkpoint(tiny)


def test_a_shard_that_links_outside(tiny, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (tiny / FIRST).rename(outside)
    (tiny / FIRST).symlink_to(outside)
    with pytest.raises(CheckpointError, match="links outside the checkpoint directory"):
        open_checkpoint(tiny)


def test_the_links_of_the_hub_cache_are_followed(tiny, tmp_path):
    """snapshots/<revision>/<file> → ../../blobs/<hash>, as huggingface_hub lays its cache out."""
    snapshot, blobs = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(tiny.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert len(open_checkpoint(snapshot).tensors) == 94


def test_an_index_with_a_missing_shard(tiny):
    (tiny / FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"{FIRST}: shard is missing"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("size", [0, 7, 100, 100_000])
def test_a_truncated_shard(tiny, size):
    os.truncate(tiny / FIRST, size)
    with pytest.raises(CheckpointError, match=f"{FIRST}: not a complete safetensors file"):
        open_checkpoint(tiny)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_headers_are_refused_or_harmless(tiny, data):
    """Whatever happens to the first bytes of a shard, the result is a checkpoint or a CheckpointError."""
    original = (tiny / FIRST).read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    (tiny / FIRST).write_bytes(damaged)
    try:
        open_checkpoint(tiny)
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        (tiny / FIRST).write_bytes(original)


def test_no_weights(tiny):
    for path in tiny.glob("*.safetensors*"):
        path.unlink()
    (tiny / "pytorch_model.bin").write_bytes(b"\x80pickle")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors files \(other weight formats are not read\)"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 3}', "\udcff", '{"text_config": null}'])
def test_a_damaged_config(tiny, text):
    (tiny / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match="config.json"):
        open_checkpoint(tiny)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_config_values(tiny, data):
    """Any JSON value anywhere in config.json gives a checkpoint or one line, never a traceback."""
    original = (tiny / "config.json").read_text()
    config = json.loads(original)
    sections = [config, *(v for v in config.values() if isinstance(v, dict))]
    section = data.draw(st.sampled_from(sections))
    key = data.draw(st.sampled_from(sorted(section)))
    section[key] = data.draw(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
    )  # fmt: skip
    (tiny / "config.json").write_text(json.dumps(config))
    try:
        open_checkpoint(tiny)
    except ClientError as error:
        assert "\n" not in str(error)
    finally:
        (tiny / "config.json").write_text(original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not a WeMM checkpoint"),
        ({"do_image_splitting": True}, "do_image_splitting true is not supported"),
        ({"text_config__vocab_size": None}, "text_config.vocab_size is missing"),
        (
            {"text_config__hidden_size": "128"},
            "text_config.hidden_size must be an integer in [1, 1048576]. Given: '128'",
        ),
        ({"text_config__num_hidden_layers": 10**12}, "num_hidden_layers must be an integer in [1, 1024]"),
        ({"vision_config__num_hidden_layers": 2**70}, "num_hidden_layers must be an integer in [1, 1024]"),
        ({"downsampler_config__depth": 10**9}, "depth must be an integer in [1, 1024]"),
        ({"image_processor__size": {"longest_edge": 10**6}}, "longest_edge must be an integer in [1, 16384]"),
        ({"text_config__rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number > 0"),
        ({"text_config__rms_norm_eps": float("inf")}, "rms_norm_eps must be a finite number > 0"),
        ({"vision_config__num_channels": 4}, "num_channels must be 3"),
        ({"vision_config__image_size": 7}, "image_size must be at least one patch"),
        ({"text_config__num_attention_heads": 128}, "must make 128 heads of even width"),
        ({"text_config__num_key_value_heads": 3}, "must be a multiple of 3 KV heads"),
        ({"text_config__bias": True}, "text_config.bias must be false"),
        ({"text_config__tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"vision_config__hidden_act": "gelu"}, "vision_config.hidden_act must be gelu_pytorch_tanh"),
        ({"downsampler_config__hidden_act": "silu"}, "downsampler_config.hidden_act must be gelu"),
        ({"spliter_emb_config__embedding_dim": 64}, "embedding_dim is 64"),
        ({"downsampler_config__visual_hidden_size": 64}, "visual_hidden_size is 64"),
        ({"text_config__rope_scaling": {"type": "yarn"}}, "rope_scaling.type must be linear or dynamic"),
        ({"text_config__hidden_act": "gelu"}, "text_config.hidden_act must be silu"),
        ({"vision_config__num_attention_heads": 5}, "vision_config.hidden_size must be a multiple of 5 heads"),
        ({"downsampler_config__stride": 2}, "downsampler_config.stride must equal kernel_size 4"),
        ({"downsampler_config__llm_hidden_size": 64}, "llm_hidden_size is 64, but the part it meets is 128 wide"),
        ({"spliter_emb_config__num_embeddings": 1}, "num_embeddings must be >= 2"),
        ({"image_processor__size": {"shortest_edge": 9, "longest_edge": 3}}, "must not exceed longest_edge 3"),
    ],
)
def test_config_errors_name_the_key(tiny, edit_json, change, message):
    edit_json(tiny / "config.json", **change)
    with pytest.raises(ConfigError) as error:
        open_checkpoint(tiny)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "wemm"}, {"tokenizer_path": "/data/wemm"}, {"torch_dtype": "float16"}],
    ids=lambda change: next(iter(change)),
)
def test_the_edits_the_original_asks_for_are_accepted(tiny, edit_json, change):
    edit_json(tiny / "config.json", **change)
    assert len(open_checkpoint(tiny).tensors) == 94


def test_the_inner_dtype_is_the_effective_one(tiny, edit_json):
    edit_json(tiny / "config.json", torch_dtype="float16", text_config__torch_dtype="bfloat16")
    assert open_checkpoint(tiny).dtype == "bfloat16"


@pytest.mark.parametrize("name", ["nosuch", "/nonexistent", "./no/such", "a/b/c", ""])
def test_no_such_model(name):
    with pytest.raises(ModelNotFoundError, match="no model .* bundled names .*tiny"):
        locate(name)


def test_a_file_is_not_a_model(tiny):
    with pytest.raises(ModelNotFoundError, match="is a file; give the directory"):
        locate(str(tiny / "config.json"))


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match="has no config.json"):
        open_checkpoint(tmp_path)


def test_a_hub_id_is_fetched_without_code(monkeypatch, tiny):
    """Only safetensors, JSON and the tokenizer are asked for; a failure is one line."""
    asked = {}

    def download(model, allow_patterns):
        asked.update(model=model, patterns=allow_patterns)
        if model == "owner/absent":
            raise OSError("404\nsecond line")
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("feipengma/WeMM-Chat-2k-CN") == tiny
    assert asked == {
        "model": "feipengma/WeMM-Chat-2k-CN",
        "patterns": ["*.safetensors", "*.json", "tokenizer.model"],
    }
    with pytest.raises(
        ModelNotFoundError, match="'owner/absent' is not a directory here and could not be fetched"
    ):
        locate("owner/absent")


def test_generation_config_decides_the_default(tiny):
    path = tiny / "generation_config.json"
    assert default_sampling_params(tiny).greedy
    path.write_text('{"temperature": 0.7, "top_k": 40}')
    assert default_sampling_params(tiny).greedy  # no do_sample: greedy, whatever else is said
    path.write_text('{"do_sample": true, "top_p": 0.8, "max_new_tokens": 99, "repetition_penalty": 1.1}')
    params = default_sampling_params(tiny)
    assert (params.temperature, params.top_p, params.max_tokens, params.repetition_penalty) == (1.0, 0.8, 99, 1.1)
    path.write_text('{"do_sample": true, "top_p": 7}')
    with pytest.raises(ConfigError, match=r"generation_config.json: top_p must be .* Given: 7"):
        default_sampling_params(tiny)


def test_other_spellings_of_dtype_and_rope(tiny, edit_json):
    edit_json(tiny / "config.json", torch_dtype=None, dtype="torch.bfloat16")
    assert open_checkpoint(tiny).dtype == "bfloat16"
    edit_json(tiny / "config.json", text_config__rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert open_checkpoint(tiny).config.text.rope_scaling.type == "linear"


def test_without_a_declared_dtype_the_tensors_say_it(tiny, edit_json):
    edit_json(tiny / "config.json", torch_dtype=None)
    assert open_checkpoint(tiny).dtype == "float16"


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', "{}", "[" * 100_000])
def test_a_damaged_index(tiny, content):
    (tiny / INDEX_NAME).write_text(content)
    with pytest.raises(ConfigError, match="index.json"):
        open_checkpoint(tiny)


def test_a_config_of_gigabytes_is_not_read(tiny, monkeypatch):
    monkeypatch.setattr("wemm.checkpoint.json_file.MAX_JSON_BYTES", 10)
    with pytest.raises(ConfigError, match="larger than 10 bytes"):
        open_checkpoint(tiny)


def test_names_no_file_can_have(tiny):
    with pytest.raises(ModelNotFoundError, match="no model"):
        locate("x" * 5000)
    with pytest.raises(ModelNotFoundError, match="no model"):
        locate("~no-such-user/a/b")
    (tiny / "lora_adapter.json").write_text(json.dumps({"wemm": "x" * 5000}))
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tiny)
    (tiny / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    with pytest.raises(CheckpointError, match="shard is missing"):
        open_checkpoint(tiny)


def test_a_directory_wins_over_a_bundled_name_and_a_preset(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    assert locate("tiny") == Path("tiny")
    assert is_preset("wemm-chat-2k-cn")
    tiny.rename(tiny.parent / "wemm-chat-2k-cn")
    assert not is_preset("wemm-chat-2k-cn")
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert locate("~/wemm-chat-2k-cn") == tiny.parent / "wemm-chat-2k-cn"
