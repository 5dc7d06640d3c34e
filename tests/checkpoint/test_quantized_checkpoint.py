"""Quantised while loading or ahead of time: the same integers, the rest untouched, nothing else accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wemm import LLM, SamplingParams
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY, open_checkpoint
from wemm.checkpoint.convert import DIGEST_KEY, convert
from wemm.checkpoint.loader import weight_bytes
from wemm.cli import main
from wemm.config import QuantizationConfig
from wemm.doctor.files import check_files
from wemm.errors import CheckpointError, ParameterError
from wemm.progress import silent
from wemm.quantization import SCHEMES

ROOT = Path(__file__).parents[2]
NANO = BUNDLED_DIRECTORY / "nano"
WO = "language_model.model.layers.0.attention.wo.weight"
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, logprobs=2, ignore_eos=True)
BOTH = [QuantizationConfig("int8"), QuantizationConfig("int4", "int8")]


@pytest.fixture(scope="module", params=BOTH, ids=str)
def quantized(request, tmp_path_factory):
    """nano, quantised ahead of time: (directory, how)."""
    directory = tmp_path_factory.mktemp("quantized") / "nano"
    convert(NANO, directory, quantization=request.param)
    return directory, request.param


@pytest.fixture
def question(ask, golden_images):
    return ask("What is this?", golden_images / "300x200.png")


def _tensors(directory):
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def _edit(directory, change):
    [file] = directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    (directory / "model.safetensors.index.json").unlink()


def _answer(question, model, **options):
    with LLM(model, device="cpu", dtype="float32", max_model_len=400, **options) as llm:
        [output] = llm.chat(question, PARAMS)
    return output.outputs[0]


def test_ahead_of_time_is_what_loading_would_have_made(quantized, question):
    directory, how = quantized
    ahead = _answer(question, directory)
    loading = _answer(question, "nano", quantization=how.language, vision_quantization=how.vision)
    assert ahead.token_ids == loading.token_ids
    assert ahead.cumulative_logprob == loading.cumulative_logprob


def test_only_the_linears_change(quantized):
    """PLoRA, embeddings, norms, the output head and the downsampler are there bit by bit."""
    directory, how = quantized
    before = {name.replace(".original_linear.", "."): value for name, value in _tensors(NANO).items()}
    after = _tensors(directory)
    linears = {name.removesuffix("_scale") for name in after if name.endswith("_scale")}
    vision = {name for name in linears if name.startswith("vision_tower")}
    assert len(linears - vision) == 4 * 5
    assert len(vision) == (6 * 6 if how.vision else 0)
    assert not any("Plora" in name or "norm" in name or "embedding" in name for name in linears)
    assert set(before) == {name for name in after if not name.endswith("_scale")}
    for name in set(before) - linears:
        assert torch.equal(before[name], after[name]), name


def test_every_weight_is_near_what_it_was(quantized):
    directory, _ = quantized
    source, checkpoint = open_checkpoint(NANO), open_checkpoint(directory)
    for name, spec in checkpoint.specs.items():
        if spec.scheme is None or spec.is_scale:
            continue
        before, after = source.read(name), checkpoint.read(name)
        error = (after - before).norm() / before.norm()
        assert 0 < error < {"int8": 0.01, "int4": 0.12}[spec.scheme.name], name


def test_the_file_says_what_it_holds_and_the_doctor_checks_it(quantized, tmp_path):
    directory, how = quantized
    [file] = directory.glob("*.safetensors")
    with safe_open(file, "pt") as shard:
        assert shard.metadata()["quantization"] == str(how)
        assert len(shard.metadata()[DIGEST_KEY]) == 64
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["quant_method"] == "wemm"
    assert check_files(directory, silent).status == "ok"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    (tmp_path / file.name).write_bytes(data)
    check = check_files(tmp_path, silent)
    assert check.status == "fail"
    assert check.figures["differing"] == [file.name]


def test_memory_is_planned_as_it_is_used(quantized):
    directory, _ = quantized
    with LLM(directory, device="cpu", dtype="bfloat16", max_model_len=400) as llm:
        used = sum(p.numel() * p.element_size() for p in llm.model.parameters())
        assert llm._open.memory_plan.weights == used == weight_bytes(llm.model, torch.bfloat16)
    with LLM("nano", device="cpu", dtype="bfloat16", max_model_len=400) as llm:
        assert used < llm._open.memory_plan.weights


@pytest.mark.parametrize("how", BOTH, ids=str)
def test_random_weights_are_made_in_their_precision(how, question):
    options = dict(quantization=how.language, vision_quantization=how.vision, load_format="dummy")
    with LLM("tiny", device="cpu", dtype="bfloat16", max_model_len=400, **options) as llm:
        wo, q_proj = llm.model.language_model.layers[0].attention.wo, llm.model.vision_tower.encoder.layers[0]
        assert wo.weight.dtype == SCHEMES[how.language].weight_dtype
        assert (q_proj.self_attn.q_proj.weight.dtype == torch.int8) == (how.vision is not None)
        made = wo.scheme.dequantize(wo.weight, wo.weight_scale, wo.in_size)
        assert float(made.std() * wo.in_size**0.5) == pytest.approx(1, abs=0.1)
        [output] = llm.chat(question, PARAMS)
        assert len(output.outputs[0].token_ids) == 12


def test_two_ranks_answer_as_one(ask):
    """Not to the last digit: where ranks share the inputs, each rounds its own by its own largest."""
    question = ask("What word is written here?", ROOT / "docs/images/word.png")
    for how in BOTH:
        options = dict(quantization=how.language, vision_quantization=how.vision)
        alone, together = (_answer(question, "nano", tensor_parallel_size=n, **options) for n in (1, 2))
        assert together.text.startswith("WEMM")
        assert together.token_ids[:5] == alone.token_ids[:5]
        assert together.cumulative_logprob == pytest.approx(alone.cumulative_logprob, abs=0.5)


def test_two_ranks_share_a_quantised_checkpoint_where_groups_divide(tmp_path, ask):
    question = ask("What word is written here?", ROOT / "docs/images/word.png")
    convert(NANO, tmp_path / "int8", quantization=QuantizationConfig("int8", "int8"))
    assert _answer(question, tmp_path / "int8", tensor_parallel_size=2).text.startswith("WEMM")
    convert(NANO, tmp_path / "int4", quantization=QuantizationConfig("int4"))
    with pytest.raises(ParameterError, match="groups of 128 .* hidden_size is .*; use fewer ranks"):
        LLM(tmp_path / "int4", device="cpu", tensor_parallel_size=2)


def test_what_is_quantised_stays_so(quantized, tmp_path, question):
    """Converted again it keeps its integers, in another dtype beside them; another scheme is refused."""
    directory, how = quantized
    convert(directory, tmp_path / "again", "float32")
    before, after = _tensors(directory), _tensors(tmp_path / "again")
    assert torch.equal(before[WO], after[WO])
    assert torch.equal(before[f"{WO}_scale"], after[f"{WO}_scale"])
    assert after["language_model.output.weight"].dtype == torch.float32
    other = "int4" if how.language == "int8" else "int8"
    with pytest.raises(ParameterError, match=f"'{other}': the checkpoint is already quantised to {how.language}"):
        convert(directory, tmp_path / "other", quantization=QuantizationConfig(other))
    with pytest.raises(ParameterError, match="leave the option out, or give the float checkpoint"):
        LLM(directory, device="cpu", quantization=other)
    assert _answer(question, directory, quantization=how.language).token_ids


def test_the_tower_can_follow_later(tmp_path):
    convert(NANO, tmp_path / "language", quantization=QuantizationConfig("int8"))
    convert(tmp_path / "language", tmp_path / "both", quantization=QuantizationConfig(vision="int8"))
    convert(NANO, tmp_path / "at once", quantization=QuantizationConfig("int8", "int8"))
    later, at_once = _tensors(tmp_path / "both"), _tensors(tmp_path / "at once")
    assert all(torch.equal(later[name], at_once[name]) for name in at_once)
    assert open_checkpoint(tmp_path / "both").config.quantization == QuantizationConfig("int8", "int8")


def test_damaged_or_foreign_quantisation_is_refused(tmp_path, edit_json):
    convert(NANO, tmp_path / "int4", quantization=QuantizationConfig("int4"))
    directory, config = tmp_path / "int4", tmp_path / "int4" / "config.json"
    section = json.loads(config.read_text())["quantization_config"]
    for change, message in (
        ({"quant_method": "awq"}, "quant_method must be wemm: weights quantised by others are not read"),
        ({"language_model": "int3"}, "quantization_config.language_model must be int8 or int4. Given: 'int3'"),
        ({"vision_tower": "int4"}, "quantization_config.vision_tower must be int8. Given: 'int4'"),
        ({"language_model": "int8"}, "tensors of wrong shape: .*wqkv.weight is .* but must be"),
        ({"vision_tower": "int8"}, "36 tensors missing: .*q_proj.weight_scale"),
    ):
        edit_json(config, quantization_config={**section, **change})
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(directory)
    edit_json(config, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"unexpected tensors: .*_scale"):
        open_checkpoint(directory)
    edit_json(config, quantization_config=section)
    _edit(directory, lambda tensors: tensors.update({WO: tensors[WO].to(torch.int8)}))
    with pytest.raises(CheckpointError, match="1 tensors of wrong dtype: .*wo.weight is I8 and must be U8"):
        open_checkpoint(directory)


def test_wemm_quantize(tmp_path, capsys):
    assert main(["quantize", "nano", str(tmp_path / "out"), "--scheme", "int4", "--vision-scheme", "int8"]) == 0
    assert "language model int4, vision tower int8; 231 tensors in 1 shards" in capsys.readouterr().out
    for arguments, message in (
        ([], "give --scheme int8 or int4, or --vision-scheme int8"),
        (["--scheme", "int2"], "quantization must be int8 or int4. Given: 'int2'"),
        (["--scheme", "int8"], "exists; give another directory, or --force to replace it"),
    ):
        assert main(["quantize", "nano", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert main(["quantize", "nano", str(tmp_path / "out"), "--scheme", "int8", "--force"]) == 0


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_command_line_quantises_while_loading(scheme, capsys, golden_images):
    image, prompt = str(golden_images / "300x200.png"), "What is this?"
    arguments = ["generate", "-m", "nano", "--image", image, "-p", prompt, "--quantization", scheme]
    assert main([*arguments, "--vision-quantization", "int8"]) == 0
    assert main([*arguments, "--vision-quantization", "int4"]) == 2
    assert "vision_quantization must be int8. Given: 'int4'" in capsys.readouterr().err
