"""Every planted fault is found and named; the sound checkpoint is green.

The hashes are not recorded here: they would find whatever differs, and name nothing.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY, open_checkpoint
from wemm.doctor.stages import FLOAT32_FLOOR
from wemm.ops.registry import Implementation
from wemm.ops.rms_norm import rms_norm

LAYERS = range(4)
GROUPS, HEADS, HEAD_DIM = 4, 2, 16  # of nano: KV heads, query heads of each, width


def _name(layer, linear, factor=""):
    return f"language_model.model.layers.{layer}.{linear}{factor or '.original_linear'}.weight"


def _exchange_gates(tensors, factors=("", ".Plora_A", ".Plora_B")):
    for layer in LAYERS:
        for factor in factors:
            w1, w3 = (_name(layer, f"feed_forward.{linear}", factor) for linear in ("w1", "w3"))
            tensors[w1], tensors[w3] = tensors[w3], tensors[w1]


def _repack(tensors, order, factors=("", ".Plora_B")):
    """Rows of wqkv as `order` makes them of [groups, queries + key + value, head_dim, …]."""
    for layer in LAYERS:
        for factor in factors:
            name = _name(layer, "attention.wqkv", factor)
            groups = tensors[name].view(GROUPS, HEADS + 2, HEAD_DIM, -1)
            tensors[name] = order(groups).reshape(tensors[name].shape)


def _blocks(groups):
    return torch.cat([groups[:, :HEADS].flatten(0, 1), groups[:, HEADS], groups[:, HEADS + 1]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sound_checkpoint_is_green(patient, diagnose, dtype):
    report = diagnose(patient, dtype)
    assert [check for check in report.checks if check.status != "ok"] == []
    assert report.ok
    assert report.causes == []
    names = [check.name for check in report.checks]
    files = ["files", "tensors", "weights", "PLoRA", "tokenizer"]
    assert names == [*files, "canaries", "range", "stages", "first tokens", "answers"]
    stages = report.checks[7].figures["stages"]
    assert [stage["name"] for stage in stages][:2] == ["pixels", "patch embeddings"]
    assert len(stages) == 6 + 6 + 4
    errors = [stage["relative_error"] for stage in stages]
    assert max(errors) < FLOAT32_FLOOR if dtype == "float32" else errors[-1] > FLOAT32_FLOOR


def test_zeroed_plora(patient, rewrite, diagnose):
    rewrite(lambda t: t.update({name: t[name] * 0 for name in t if "Plora_B" in name}))
    report = diagnose(patient, numerics=False)
    assert "PLoRA is present but has no effect" in report.causes[0]
    assert len(report.causes) == 1


def test_plora_that_is_small_instead_of_zero(patient, rewrite, diagnose):
    """The tensors look like weights, but image tokens do not feel them."""
    rewrite(lambda t: t.update({name: t[name] * 0 + 1e-7 for name in t if "Plora_A" in name}))
    [cause] = diagnose(patient, numerics=False).causes
    assert "PLoRA has no effect on image tokens" in cause


@pytest.mark.parametrize("factors", [("", ".Plora_A", ".Plora_B"), ("",)], ids=["with PLoRA", "weights only"])
def test_exchanged_w1_and_w3(patient, rewrite, diagnose, factors):
    rewrite(lambda t: _exchange_gates(t, factors))
    [cause] = diagnose(patient, numerics=False).causes
    assert cause.startswith("w1 and w3 (gate and up projection) are exchanged in every decoder layer")


@pytest.mark.parametrize("alpha", [32, 512])
def test_wrong_scaling(patient, edit_json, diagnose, alpha):
    """Half and eight times of what the model was trained with, and no other file to contradict."""
    edit_json(patient / "adapter_config.json", lora_alpha=alpha)
    edit_json(patient / "config.json", text_config__lora_cfg=None)
    [cause] = diagnose(patient, numerics=False).causes
    assert f"PLoRA scaling {alpha / 32:g} is wrong, 2 fits the weights: set lora_alpha to 64" in cause


def test_two_files_that_disagree_about_the_scaling(patient, edit_json, diagnose):
    """Whichever the canaries side with."""
    edit_json(patient / "config.json", text_config__lora_cfg__lora_alpha=8)
    report = diagnose(patient, numerics=False)
    assert report.ok
    [plora] = [check for check in report.checks if check.name == "PLoRA"]
    assert plora.status == "warn"
    assert "scaling 2 by adapter_config.json, 0.25 by lora_cfg" in plora.detail
    edit_json(patient / "adapter_config.json", lora_alpha=8)
    edit_json(patient / "config.json", text_config__lora_cfg__lora_alpha=64)
    report = diagnose(patient, numerics=False)
    assert not report.ok
    assert any("0.25 is wrong, 2 fits" in cause for cause in report.causes)


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        ("all queries, then all keys, then all values", _blocks),
        ("value before key", lambda g: g[:, [*range(HEADS), HEADS + 1, HEADS]]),
        ("key and value before the queries", lambda g: g.roll(2, 1)),
        ("rotary halves interleaved", lambda g: torch.cat([
            g[:, : HEADS + 1].unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3), g[:, HEADS + 1 :]], 1)),
        ("KV groups 1 and 3", lambda g: g[[0, 3, 2, 1]]),
    ],
)  # fmt: skip
def test_permuted_wqkv(patient, rewrite, diagnose, layout, order):
    rewrite(lambda t: _repack(t, order))
    [cause] = diagnose(patient, numerics=False).causes
    assert layout in cause


def test_permuted_wqkv_beside_untouched_plora(patient, rewrite, diagnose):
    rewrite(lambda t: _repack(t, _blocks, factors=("",)))
    [cause] = diagnose(patient, numerics=False).causes
    assert "all queries, then all keys, then all values" in cause


def test_the_tokenizer_of_another_model(patient, diagnose):
    shutil.copy(BUNDLED_DIRECTORY / "tiny" / "tokenizer.model", patient)
    report = diagnose(patient, numerics=False)
    assert "tokenizer.model is not this model's" in report.causes[0]
    assert len(report.causes) == 1


def _rotate_pieces(data):
    """A vocabulary of the same pieces under other ids: the entries of the model file in another order."""
    records, i = [], 0
    while data[i] == 0x0A:  # field 1, one per piece
        assert data[i + 1] < 0x80
        records.append(data[i : i + 2 + data[i + 1]])
        i += 2 + data[i + 1]
    head = 300  # control and byte pieces stay
    words = records[head:]
    return b"".join([*records[:head], *words[100:], *words[:100]]) + data[i:]


def test_a_tokenizer_of_the_same_size(patient, diagnose):
    """It keeps text and fits the embedding: only the answers tell."""
    path = patient / "tokenizer.model"
    path.write_bytes(_rotate_pieces(path.read_bytes()))
    report = diagnose(patient, numerics=False)
    [cause] = report.causes
    assert "tokenizer.model is not this model's: that of 'nano' fits" in cause
    assert [c.status for c in report.checks if c.name == "tokenizer"] == ["ok"]


def test_random_weights(diagnose):
    report = diagnose("tiny", quick=True, numerics=False)
    [cause] = report.causes
    assert cause.startswith("random weights, or weights or a tokenizer of another model")
    assert diagnose("tiny", quick=True, canaries=False).ok


@pytest.mark.slow
def test_nothing_is_blamed_for_random_weights(diagnose):
    """All changes are tried, none explains answers that were never there."""
    report = diagnose("tiny", numerics=False)
    [tried] = [check.figures["counterfactuals"] for check in report.checks if check.name == "canaries"]
    assert len(tried) > 50
    assert report.causes == diagnose("tiny", numerics=False, quick=True).causes


def test_a_flipped_exponent_bit(patient, rewrite, diagnose):
    name = "vision_tower.encoder.layers.2.mlp.fc1.weight"

    def flip(tensors):
        bits = tensors[name].view(torch.int16)
        bits[5, 7] ^= 1 << 14

    rewrite(flip)
    report = diagnose(patient)
    assert name in report.causes[0]
    assert "flipped bit" in report.causes[0]


def test_a_weight_that_is_not_a_number(patient, rewrite, diagnose):
    name = _name(1, "attention.wo")

    def damage(tensors):
        tensors[name][3, 3] = float("nan")

    rewrite(damage)
    report = diagnose(patient)
    assert report.causes[0].startswith("NaN or Inf in language_model.model.layers.1.attention.wo.weight")
    assert any("even float32 gives NaN" in cause for cause in report.causes)


def _enlarge_residual(tensors, factor=32.0):
    """The residual stream that many times larger: the norms undo it, float16 does not hold it."""
    ends = (".tok_embeddings.weight", "spliter_emb.weight", "linear_model.1.weight")
    for name in tensors:
        writes = any(f".{linear}." in name for linear in ("attention.wo", "feed_forward.w2"))
        if name.endswith(ends) or (writes and "Plora_A" not in name):
            tensors[name] = tensors[name] * factor


def test_float16_overflow(patient, rewrite, diagnose):
    rewrite(_enlarge_residual)
    report = diagnose(patient, "float16")
    assert report.causes == [
        "float16 overflows in language_model.layers.0.feed_forward.w2: it ends at 65504; use --dtype bfloat16"
    ]
    assert diagnose(patient, "bfloat16").ok


def test_float16_with_little_room_is_a_warning(patient, rewrite, diagnose, by_name):
    rewrite(lambda tensors: _enlarge_residual(tensors, 16.0))
    report = diagnose(patient, "float16", canaries=False)
    assert report.ok
    assert by_name(report)["range"] == "warn"


def test_a_checkpoint_that_does_not_open(patient, rewrite, diagnose, by_name):
    """The error of opening is the finding; the tokenizer is examined all the same."""
    rewrite(lambda t: t.pop("downsampler.group_op.weight"))
    report = diagnose(patient)
    assert "1 tensors missing: downsampler.group_op.weight" in report.causes[0]
    assert by_name(report)["tokenizer"] == "ok"
    assert by_name(report)["canaries"] == "skipped"


@pytest.fixture
def attach():
    """attach(function): a kernel of rms_norm for the CPU, until the end of the test."""
    before = list(rms_norm.implementations)

    def put(function):
        rms_norm.implementations.insert(0, Implementation("planted", "cpu", function, lambda *_: True))

    yield put
    rms_norm.implementations[:] = before


def test_a_kernel_that_computes_wrongly(patient, diagnose, attach):
    """The files are sound, so only the comparison with the definitions can tell, and it names the stage."""
    attach(lambda x, weight, eps: rms_norm.definition(x, weight, eps) * 1.1)
    report = diagnose(patient, "bfloat16")
    assert report.causes[0].startswith("decoder layer 0 is computed wrongly in bfloat16")


def test_a_kernel_that_gives_nan(patient, diagnose, attach):
    attach(lambda x, weight, eps: x * float("nan"))
    report = diagnose(patient, "bfloat16")
    [cause] = report.causes
    assert cause.startswith("NaN or Inf in language_model.layers.0.attention_norm in bfloat16 only")


def test_an_engine_that_does_not_come_up(patient, diagnose, monkeypatch):
    """A broken installation is a finding, not a traceback."""

    def broken(*_):
        raise AttributeError("module '_kernels' has no attribute 'x'")

    monkeypatch.setattr("wemm.engine.build.load_kernels", broken)
    report = diagnose(patient)
    [cause] = report.causes
    assert cause.startswith("the engine does not run here (AttributeError: module '_kernels'")
    assert report.checks[5].status == "ok"


def test_the_shape_of_the_model_is_what_these_tests_think(patient):
    text = open_checkpoint(patient).config.text
    assert (text.num_hidden_layers, text.num_key_value_heads, text.head_dim) == (len(LAYERS), GROUPS, HEAD_DIM)
    assert text.num_attention_heads == GROUPS * HEADS
