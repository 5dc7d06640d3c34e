"""run_pa.sh: what it asks of the runner, and once for each mode what comes of it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/models/wemm/run_pa.sh"
FOLDER = "图 片 (1)"


@pytest.fixture
def called(shell, tmp_path):
    """called(*arguments, **variables): the calls of the runner, each {option: values}."""
    stub = tmp_path / "python stub"
    stub.write_text('#!/bin/sh\necho "=$ASCEND_RT_VISIBLE_DEVICES"\nfor a; do printf "%s\\n" "$a"; done\n')
    stub.chmod(0o755)

    def call(*arguments, **variables):
        result = shell(tmp_path, "bash", SCRIPT, *arguments, PYTHON=str(stub), **variables)
        assert result.returncode == 0, result.stderr
        return [_options(block) for block in result.stdout.split("=")[1:]]

    return call


def _options(block):
    device, program, *words = block.splitlines()
    assert program == str(SCRIPT.with_name("wemm.py"))
    options = {"device": device}
    for word in words:
        if word.startswith("--"):
            values = options[word[2:]] = []
        else:
            values.append(word)
    return options


@pytest.mark.parametrize("mode", ["--precision", "--performance"])
def test_paths_are_named_or_stand_alone(called, mode):
    """Spaces and Chinese in them stay."""
    named = called(mode, "--model_path", "/m o/模型", "--image_or_video_path", FOLDER)
    assert named == called(mode, "/m o/模型", FOLDER) == called("/m o/模型", mode, "--image_or_video_path", FOLDER)
    [options] = named
    assert (options["model_path"], options["image_or_video_path"]) == (["/m o/模型"], [FOLDER])
    assert options["input_texts_for_image"] == ["请详细描述这张图片。"]
    assert "trust_remote_code" not in options


def test_precision_writes_answers_without_control_tokens(called):
    [options] = called("--precision", "m", "i", "--trust_remote_code")
    assert {"prediction_result", "skip_special_tokens", "trust_remote_code"} <= set(options)
    assert not {"performance", "ignore_eos", "max_output_length"} & set(options)
    assert (options["max_batch_size"], options["lora_adapter_id"], options["tp"]) == (["1"], ["wemm"], ["1"])


def test_performance_goes_on_after_the_end_token_for_256_tokens(called):
    [options] = called("--performance", "m", "i")
    assert {"performance", "ignore_eos", "skip_special_tokens"} <= set(options)
    assert "prediction_result" not in options
    assert (options["max_batch_size"], options["max_output_length"]) == (["1"], ["256"])


def test_both_modes_may_be_asked(called):
    first, second = called("--performance", "--precision", "m", "i")
    assert "prediction_result" in first
    assert "performance" in second


def test_every_variable_can_be_set_from_outside(called):
    variables = {"PERFORMANCE_MAX_BATCH_SIZE": "3", "PERFORMANCE_MAX_OUTPUT_LENGTH": "8", "TP_WORLD_SIZE": "2",
                 "LORA_ADAPTER_ID": "other", "PRECISION_MAX_BATCH_SIZE": "5", "TEXTS": "多少 个？"}  # fmt: skip
    precision, *performance = called("--precision", "--performance", "m", "i", **variables)
    assert precision["max_batch_size"] == ["5"]
    assert [options["max_batch_size"] for options in performance] == [["1"], ["2"], ["3"]]
    for options in performance:
        assert options["max_output_length"] == ["8"]
    for options in (precision, *performance):
        assert (options["tp"], options["lora_adapter_id"]) == (["2"], ["other"])
        assert options["input_texts_for_image"] == ["多少 个？"]


def test_texts_come_from_the_variable_of_the_readme_or_an_argument(called):
    [options] = called("--precision", "m", "i", input_texts_for_image="what is it?")
    assert options["input_texts_for_image"] == ["what is it?"]
    [options] = called("--precision", "--input_texts_for_image", "a b", "c", "--model_path", "m",
                       "--image_or_video_path", "i", TEXTS="not this")  # fmt: skip
    assert options["input_texts_for_image"] == ["a b", "c"]


def test_the_choice_of_devices_stays_the_callers(called):
    [options] = called("--precision", "m", "i", ASCEND_RT_VISIBLE_DEVICES="3,4")
    assert options["device"] == "3,4"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "usage: run_pa.sh"),
        (["--precison", "m", "i"], "Unknown parameter: --precison"),
        (["--precision", "m", "i", "more"], "Unknown parameter: more"),
        (["-x"], "Unknown parameter: -x"),
        (["m", "i"], "give --precision or --performance"),
        (["--precision"], "give the model"),
        (["--precision", "m"], "give the directory of images"),
        (["--precision", "--model_path"], "--model_path needs a value"),
        (["--precision", "m", "i", "--input_texts_for_image"], "--input_texts_for_image needs a text"),
    ],
)
def test_a_call_that_cannot_be_meant_ends_with_status_1(shell, tmp_path, arguments, complaint):
    result = shell(tmp_path, "bash", SCRIPT, *arguments, PYTHON="false")
    assert (result.returncode, result.stdout) == (1, "")
    assert complaint in result.stderr


def test_precision_answers_every_image(shell, tmp_path):
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name in ("number", "shapes", "word"):
        shutil.copy(ROOT / f"docs/images/{name}.png", folder)
    (folder / "notes.txt").write_text("no image")
    result = shell(
        tmp_path, "bash", SCRIPT, "--precision", "--trust_remote_code", "--model_path", "nano",
        "--image_or_video_path", FOLDER, "--input_texts_for_image", "图中的数字是多少？",
        "How many circles are there?", "What word is written here?", PRECISION_MAX_BATCH_SIZE="2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "examples/models/wemm/predict_result.json").read_text(encoding="utf-8"))
    expected = {f"{FOLDER}/number.png": "2048", f"{FOLDER}/shapes.png": "3", f"{FOLDER}/word.png": "WEMM"}
    assert written == expected
    assert re.findall(r"^Answer\[(\d)\]: (.*)$", result.stdout, re.M) == list(
        zip("012", expected.values(), strict=True)
    )
    counts = [int(n) for n in re.findall(r"^Generate\[\d\] token num: (\d+)$", result.stdout, re.M)]
    assert len(counts) == 3
    [total], [latency], [throughput] = (
        re.findall(rf"^{re.escape(name)}: ([\d.]+)$", result.stdout, re.M)
        for name in ("All Token Nums", "Latency(s)", "E2E_Throughput(tokens/s)")
    )
    assert int(total) == sum(counts)
    assert float(throughput) == pytest.approx(int(total) / float(latency))
    assert re.findall(r"^current iter: (\d)$", result.stdout, re.M) == ["0", "1"]
    assert "------total req num: 3, infer start--------" in result.stdout
    assert "notes.txt" in result.stderr
    assert "error" not in result.stderr


def test_performance_measures_one_image_and_256_tokens(shell, tmp_path):
    folder = tmp_path / FOLDER
    folder.mkdir()
    shutil.copy(ROOT / "docs/images/word.png", folder)
    result = shell(tmp_path, "bash", SCRIPT, "--performance", "nano", FOLDER)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "examples/models/wemm/wemm_performance.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["batch"], row["output_len"]) == ("1", "256")
    assert int(row["embedding_len"]) > int(row["input_len"]) > 0
    times = {
        name: float(row[f"{name}(ms)"]) for name in ("fisrt_token_time", "non_first_token_time", "ResponseTime")
    }
    assert float(row["E2E Throughput Average(Tokens/s)"]) == pytest.approx(256e3 / times["ResponseTime"], rel=1e-3)
    decode = 255 * times["non_first_token_time"]
    assert times["fisrt_token_time"] + decode == pytest.approx(times["ResponseTime"], rel=0.1)
    assert "Generate[0] token num: 256" in result.stdout
    assert re.search(r"^Prefill time: .*ms, .*Decode token time: .*ms, E2E time: .*ms$", result.stdout, re.M)
