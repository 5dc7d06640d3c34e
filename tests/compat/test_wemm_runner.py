"""The runner behind run_pa.sh: which images with which texts, the files, what cannot be answered."""

from __future__ import annotations

import csv
import json
import stat
import sys
from pathlib import Path

import pytest

from examples.models.wemm import result_files, runner
from examples.models.wemm.result_files import HEADER, PerformanceRow, append_performance, merge_predictions
from wemm.errors import ParameterError, StorageError
from wemm.request import CompletionOutput, RequestMetrics, RequestOutput

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples/models/wemm"
WORD = ROOT / "docs/images/word.png"
ROW = PerformanceRow(2, 10, 4, 30, 5.0, 2.0, 16.0, 3.0)


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    for name in ("b.png", "10.png", "a.PNG", "2"):
        (directory / name).write_bytes(WORD.read_bytes())
    return directory


def test_images_come_by_name_and_the_last_text_goes_on(folder):
    items = runner.read_items(f"{folder}/", ["one", "two"])
    assert [item.path for item in items] == [f"{folder}/{name}" for name in ("10.png", "2", "a.PNG", "b.png")]
    assert [item.text for item in items] == ["one", "two", "two", "two"]


def test_what_is_no_image_is_skipped_with_a_warning(folder, capsys):
    (folder / "readme.md").write_text("no image")
    (folder / "z.png").write_bytes(b"no image")
    (folder / "folder").mkdir()
    assert len(runner.read_items(str(folder), ["what?"])) == 4
    warnings = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning: skipped: ") for line in warnings] == [True] * 3
    assert all(any(name in line for line in warnings) for name in ("readme.md", "z.png", "folder"))


def test_more_texts_than_images_are_refused_in_the_words_of_the_original(folder):
    with pytest.raises(
        ParameterError, match="input_text length must equal input_images length: 5 texts, 4 images"
    ):
        runner.read_items(str(folder), ["?"] * 5)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="has no images"):
        runner.read_items(str(tmp_path), ["?"])
    with pytest.raises(ParameterError, match="must be a directory"):
        runner.read_items(str(tmp_path / "absent"), ["?"])


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_a_measured_batch_is_whole(batch, count):
    items = [runner.Item(name, "?") for name in "abc"]
    filled = runner.filled_up(items, batch)
    assert len(filled) == count
    assert filled[:3] == items
    assert set(filled[3:]) <= {items[-1]}


def _arguments(*given):
    return runner._parser().parse_args(["--model_path", "nano", *given])


@pytest.mark.parametrize(
    ("given", "longest"),
    [
        ([], 2048),  # all that nano knows
        (["--max_input_length", "100", "--max_output_length", "20"], 120),
        (["--max_position_embeddings", "300"], 300),
        (["--max_position_embeddings", "None"], 2048),
    ],
)
def test_memory_is_kept_for_input_and_output_as_far_as_the_model_goes(given, longest):
    assert runner.engine_config(_arguments(*given)).max_model_len == longest


def test_the_arguments_of_the_original_reach_the_engine(monkeypatch):
    config = runner.engine_config(
        _arguments("--max_batch_size", "3", "--block_size", "64", "--max_prefill_tokens", "500")
    )
    assert (config.max_num_seqs, config.block_size, config.max_num_batched_tokens) == (3, 64, 500)
    assert runner.engine_config(_arguments()).max_num_batched_tokens == 4096
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert runner.engine_config(_arguments()).tensor_parallel_size == 4
    assert runner.engine_config(_arguments("--tp", "2")).tensor_parallel_size == 2


@pytest.mark.parametrize(
    "given", [["--max_batch_size", "0"], ["--block_size", "0"], ["--tp", "3"], ["--max_position_embeddings", "-1"]]
)
def test_impossible_numbers_are_refused(given):
    with pytest.raises(ParameterError):
        runner.engine_config(_arguments(*given))


def test_sampling_arguments_are_accepted_and_named_as_without_effect(capsys):
    runner._warn_of_sampling(_arguments())
    assert capsys.readouterr().err == ""
    runner._warn_of_sampling(_arguments("--temperature", "0.7", "--num_beams", "4"))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: --num_beams, --temperature: without effect")


def test_predictions_are_merged_and_sorted(tmp_path):
    file = tmp_path / "new/predict_result.json"
    merge_predictions({"b.png": "old", "c.png": "猫"}, file)
    merge_predictions({"b.png": "new", "a.png": "x\ny"}, file)
    text = file.read_text(encoding="utf-8")
    assert list(json.loads(text).items()) == [("a.png", "x\ny"), ("b.png", "new"), ("c.png", "猫")]
    assert "猫" in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_of_the_original_is_gone_on_with(tmp_path):
    file = tmp_path / "predict_result.json"
    file.write_text('{"c.png": "\\u732b"}')
    merge_predictions({"a.png": "狗"}, file)
    assert json.loads(file.read_text(encoding="utf-8")) == {"a.png": "狗", "c.png": "猫"}


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_prediction_file_that_is_none_stays(tmp_path, content):
    file = tmp_path / "predict_result.json"
    file.write_text(content)
    with pytest.raises(StorageError, match="move it away"):
        merge_predictions({"a.png": "x"}, file)
    assert file.read_text() == content


def test_every_run_adds_a_row_below_one_header(tmp_path):
    file = tmp_path / "new/wemm_performance.csv"
    append_performance(ROW, file)
    append_performance(ROW, file)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2
    assert tuple(rows[0]) == HEADER
    assert float(rows[1]["E2E Throughput Average(Tokens/s)"]) == 2 * 4 / 0.016


def test_a_table_of_the_original_is_gone_on_with_and_another_is_not(tmp_path):
    padded = tmp_path / "padded.csv"
    padded.write_text(",   ".join(HEADER) + "\n")
    append_performance(ROW, padded)
    assert len(padded.read_text().splitlines()) == 2
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(StorageError, match="other columns"):
        append_performance(ROW, other)
    assert other.read_text() == "a,b\n1,2\n"


def test_the_columns_come_from_the_first_request_and_the_medians():
    def output(prompt, image, tokens, first, decode):
        completion = CompletionOutput(0, "", (7,) * tokens, None, None, "length")
        metrics = RequestMetrics(vision=0.001, prefill=0.002, decode=decode, first_token=first)
        return RequestOutput("", (1,) * prompt, (completion,), True, image, metrics=metrics)

    outputs = [output(30, 20, 5, 0.1, 0.4), output(40, 20, 5, 0.2, 0.8), output(50, 20, 5, 0.6, 0.8)]
    row = PerformanceRow.of(outputs, [2.0, 4.0, 9.0], batch=1)
    assert row.cells() == ["1", "10", "5", "30", "200.000", "200.000", "4000.000", "1.250"]
    assert row.prefill_ms == pytest.approx(3)


def test_an_image_without_an_answer_harms_no_other(folder, tmp_path, monkeypatch, capsys):
    (folder / "10.png").write_bytes(WORD.read_bytes()[:200])  # its header is whole
    monkeypatch.chdir(tmp_path)
    command = ["wemm.py", "--model_path", "nano", "--image_or_video_path", "images", "--prediction_result",
               "--input_texts_for_image", "What word is written here?", "--skip_special_tokens"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    assert runner.main() == 1
    assert "error: no answer about images/10.png" in capsys.readouterr().err
    written = json.loads(result_files.PREDICTIONS.read_text())
    assert written == dict.fromkeys(["images/2", "images/a.PNG", "images/b.png"], "WEMM")
    monkeypatch.setattr(sys, "argv", [*command, "--performance"])
    assert runner.main() == 2
    assert not result_files.PERFORMANCE.exists()


# An editable installation finds the package before the path is looked at: without it.
_AS_SCRIPT = """
import os, runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
script, sys.path[0], hidden = sys.argv[1:]
sys.path[:] = [entry for entry in sys.path if entry != hidden]
sys.argv[:] = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print(os.environ.get("PYTHONPATH"), sys.modules["wemm"].__file__, sep="\\n")
"""


@pytest.mark.parametrize("script", ["wemm.py", "rename_weights.py"])
def test_the_file_that_bears_the_name_of_the_package_hides_it_from_nobody(shell, tmp_path, script):
    result = shell(tmp_path, sys.executable, "-c", _AS_SCRIPT, HERE / script, HERE, "nothing")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {script}")
    assert result.stdout.splitlines()[-2:] == ["None", str(ROOT / "src/wemm/__init__.py")]


@pytest.mark.parametrize("script", ["wemm.py", "rename_weights.py"])
def test_without_an_installed_package_the_clones_own_is_used(shell, tmp_path, script):
    """Also by the processes that the runner starts."""
    result = shell(tmp_path, sys.executable, "-c", _AS_SCRIPT, HERE / script, HERE, ROOT / "src")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [str(ROOT / "src"), str(ROOT / "src/wemm/__init__.py")]


def test_the_runner_is_a_module_too(shell):
    result = shell(ROOT, sys.executable, "-m", "examples.models.wemm.wemm", "--help")
    assert result.returncode == 0, result.stderr
    assert "--image_or_video_path" in result.stdout
