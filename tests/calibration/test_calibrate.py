"""From pictures to a checkpoint: the same tensors as ever, an answer, and one clear error for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wemm.calibration.calibrate
from training.calibration import write_samples
from training.evaluate import answers, right
from training.held_out import held_out_items
from wemm import LLM, SamplingParams
from wemm.calibration.calibrate import calibrate
from wemm.calibration.samples import QUESTIONS, sample_prompts
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY, open_checkpoint
from wemm.checkpoint.convert import convert
from wemm.checkpoint.weight_map import plora_linears
from wemm.cli import main
from wemm.config import QuantizationConfig
from wemm.doctor.files import check_files
from wemm.errors import NumericalError
from wemm.platforms import resolve_platform
from wemm.progress import silent

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs/images"
NANO = BUNDLED_DIRECTORY / "nano"
WO = "language_model.model.layers.0.attention.wo.weight"


def _quantize(*arguments, source="nano", scheme="int4"):
    return main(["quantize", source, *map(str, arguments), "--scheme", scheme])


def _tensors(directory):
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """nano, calibrated on three pictures."""
    directory = tmp_path_factory.mktemp("calibrated") / "nano"
    pictures = [argument for name in ("word", "number", "shapes")
                for argument in ("--calibrate", PICTURES / f"{name}.png")]  # fmt: skip
    assert _quantize(directory, *pictures, "--calibration-samples", 6) == 0
    return directory


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_the_tensors_are_those_of_plain_int4(name, tmp_path, golden_images):
    assert _quantize(tmp_path / "a", "--calibrate", golden_images / "300x200.png", source=name) == 0
    convert(BUNDLED_DIRECTORY / name, tmp_path / "b", quantization=QuantizationConfig("int4"))
    ours, plain = _tensors(tmp_path / "a"), _tensors(tmp_path / "b")
    described = [{n: (v.dtype, tuple(v.shape)) for n, v in tensors.items()} for tensors in (ours, plain)]
    assert described[0] == described[1]
    changed = {n.removesuffix("_scale") for n in ours if not torch.equal(ours[n], plain[n])}
    linears = {f"{linear}.weight" for linear in plora_linears(open_checkpoint(tmp_path / "b").config)}
    assert changed <= linears
    assert WO in changed


def test_it_answers(calibrated, ask):
    with LLM(calibrated, device="cpu", max_model_len=400) as llm:
        [output] = llm.chat(ask("What word is written here?", PICTURES / "word.png"), SamplingParams(max_tokens=8))
    assert output.outputs[0].text == "WEMM"


def test_the_file_says_so_and_the_doctor_checks_it(calibrated, tmp_path, capsys):
    [file] = calibrated.glob("*.safetensors")
    with safe_open(file, "pt") as shard:
        assert shard.metadata()["quantization"] == "language model int4"
        assert shard.metadata()["calibration"] == "gptq, 6 samples"
    assert check_files(calibrated, silent).status == "ok"
    assert main(["info", str(calibrated)]) == 0
    assert "language model int4, gptq, 6 samples" in capsys.readouterr().out
    convert(calibrated, tmp_path / "again", "float32")
    assert open_checkpoint(tmp_path / "again").calibration == "gptq, 6 samples"
    assert torch.equal(_tensors(tmp_path / "again")[WO], _tensors(calibrated)[WO])
    assert open_checkpoint(NANO).calibration is None


def test_the_same_pictures_give_the_same_file(calibrated, tmp_path):
    checkpoint, names = open_checkpoint(NANO), ("word", "number", "shapes")
    prompts = sample_prompts(checkpoint, [PICTURES / f"{name}.png" for name in names], QUESTIONS, 6)
    weights = calibrate(checkpoint, prompts, resolve_platform("auto")).weights
    ours = _tensors(calibrated)
    for name, (weight, scale) in weights.items():
        assert torch.equal(weight, ours[name]), name
        assert torch.equal(scale, ours[f"{name}_scale"]), name


def test_a_layer_is_given_what_the_quantised_layers_before_it_make(monkeypatch):
    checkpoint = open_checkpoint(NANO)
    prompts = sample_prompts(checkpoint, [PICTURES / "word.png"], QUESTIONS, 1)
    given, made = [], []
    run = wemm.calibration.calibrate._run

    def watched(model, layer, sample, kv_cache):
        given.append(sample.hidden)
        made.append(run(model, layer, sample, kv_cache))
        return made[-1]

    monkeypatch.setattr("wemm.calibration.calibrate._run", watched)
    calibrate(checkpoint, prompts, resolve_platform("cpu"), "float32")
    assert len(made) == 2 * 4
    for layer in range(4):
        before, after = made[2 * layer : 2 * layer + 2]
        assert 1e-4 < float((before - after).norm() / before.norm()) < 0.3
        assert given[2 * layer] is given[2 * layer + 1]
        assert layer == 0 or given[2 * layer] is made[2 * layer - 1]


def test_every_picture_comes_before_any_comes_again(tmp_path):
    for i in range(5):
        shutil.copy(PICTURES / "word.png", tmp_path / f"{i}.png")
    (tmp_path / "deeper").mkdir()
    shutil.copy(PICTURES / "number.png", tmp_path / "deeper" / "6.png")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"image": "0.png", "prompt": "Why?"}) + "\n")
    checkpoint = open_checkpoint(NANO)

    def count(num_samples, *sources):
        return len(sample_prompts(checkpoint, sources, ("a", "b"), num_samples))

    assert count(100, tmp_path) == 12
    assert count(100, tmp_path / "asked.jsonl") == 1
    assert count(100, tmp_path, tmp_path / "asked.jsonl") == 13
    assert count(4, tmp_path) == 4
    six = sample_prompts(checkpoint, [tmp_path], ("a", "b"), 6)
    assert len({prompt.image_spans[0].image.sha256 for prompt in six}) == 2
    assert len({prompt.token_ids[prompt.image_spans[0].stop :] for prompt in six}) == 2


def test_what_is_wrong_is_said(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("\n")
    convert(NANO, tmp_path / "int4", quantization=QuantizationConfig("int4"))
    out, picture = tmp_path / "out", PICTURES / "word.png"
    for source, scheme, arguments, message in (
        ("nano", "int4", ["--calibrate", tmp_path / "bad.png"], "bad.png' is not an image in one of the formats"),
        ("nano", "int4", ["--calibrate", tmp_path / "gone.png"], "gone.png' cannot be read: No such file"),
        ("nano", "int4", ["--calibrate", tmp_path / "empty"], "empty has no images (.jpg"),
        ("nano", "int8", ["--calibrate", picture], "only int4 is calibrated: give --scheme int4. Given: 'int8'"),
        (tmp_path / "int4", "int4", ["--calibrate", picture], "is already quantised to int4: calibrate the float"),
        ("nano", "int4", ["--calibrate", picture, "--calibration-samples", 0], "1 sample or more. Given: 0"),
        ("nano", "int4", ["--calibrate", picture, "--questions", tmp_path / "none.txt"], "has no question"),
        ("nano", "int4", ["--questions", tmp_path / "none.txt"], "give --calibrate. Given: "),
    ):
        assert _quantize(out, *arguments, source=str(source), scheme=scheme) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert not out.exists()


def test_weights_that_are_not_finite_stop_it(tmp_path):
    convert(NANO, tmp_path / "nano")
    [file] = (tmp_path / "nano").glob("*.safetensors")
    tensors = load_file(file)
    tensors[WO][5, 5] = torch.nan
    save_file(tensors, file)
    checkpoint = open_checkpoint(tmp_path / "nano")
    prompts = sample_prompts(checkpoint, [PICTURES / "word.png"], QUESTIONS, 1)
    with pytest.raises(NumericalError, match=r"calibration, .*layers.0.feed_forward.w1.weight"):
        calibrate(checkpoint, prompts, resolve_platform("cpu"), "float32")


@pytest.mark.slow
def test_counting_loses_little(tmp_path):
    """Plain int4 loses 1.5 points; calibrated on pictures that are not asked about, less than one."""
    samples = write_samples(tmp_path / "samples", 128)
    assert _quantize(tmp_path / "int4", "--calibrate", samples) == 0
    items = list(held_out_items("count", 1500))
    correct = {}
    for model in ("nano", tmp_path / "int4"):
        with LLM(model, device="cpu", dtype="bfloat16") as llm:
            correct[model] = sum(right(items, answers(llm, items, [item.picture.image for item in items])))
    assert correct[tmp_path / "int4"] >= correct["nano"] - 0.01 * len(items)
