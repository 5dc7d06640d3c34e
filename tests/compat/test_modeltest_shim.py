"""mm_run.sh from a clean shell: killed, called again, and its figure is that of `wemm eval textvqa`."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from modeltest.command import main
from test_modeltest_files import parse

from training.held_out import write_held_out
from wemm.cli import main as wemm

pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
NUM_QUESTIONS = 27
OUTPUT = "output/2025-11-25/modeltest/wemm/precision_result"
DIRECTORY = "precision_test/textvqa/bf16/wemm"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_held_out(tmp_path_factory.mktemp("held out"), 3)


def _edited(directory, data):
    """The tool as a user has edited it."""
    shutil.copytree(ROOT / "tests/modeltest", directory, ignore=shutil.ignore_patterns("output*", "*.egg-info"))
    for name, key, value in (
        ("model/wemm", "model_path", "nano"),
        ("model/wemm", "prompt_suffix", '""'),
        ("task/textvqa", "local_dataset_path", f'"{data}"'),
    ):
        file = directory / f"config/{name}.yaml"
        text, count = re.subn(rf"(?m)^( *{key}:).*$", rf"\1 {value}", file.read_text())
        assert count == 1
        file.write_text(text)
    return directory


def _answers(partial):
    """Key → record of the answers that are on disk."""
    lines = partial.read_text().split("\n")[1:-1] if partial.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory, data, clean_environment):
    """(directory of results, what was answered before the kill, what the second call printed)."""
    tool = _edited(tmp_path_factory.mktemp("a clone") / "modeltest", data)
    command = ["bash", str(tool / "scripts/mm_run.sh"), "textvqa", "wemm"]
    environment = {**clean_environment, "DATE": "2025-11-25"}
    partial = tool / OUTPUT / "samples.jsonl.partial"
    first = subprocess.Popen(command, cwd="/", env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    while len(_answers(partial)) < 4 and first.poll() is None:
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = _answers(partial)
    second = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    return tool / OUTPUT, before, second.stdout


def test_no_answered_question_is_asked_again(killed_and_resumed):
    output, before, _ = killed_and_resumed
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert 4 <= len(before) < len(samples) == NUM_QUESTIONS
    # To the microsecond: the answer of the first call.
    assert {record["seconds"] for record in before.values()} <= {sample["seconds"] for sample in samples}
    assert not (output / "samples.jsonl.partial").exists()


def test_the_value_is_that_of_wemm_eval(killed_and_resumed, data, tmp_path, capsys):
    output, _, _ = killed_and_resumed
    assert wemm(["eval", "textvqa", "--model", "nano", "--data", str(data), "--output", str(tmp_path / "out"),
                 "--prompt-suffix", ""]) == 0  # fmt: skip
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    [file] = (output / "results").rglob("*.csv")
    assert file == output / f"results/CPU/{DIRECTORY}/textvqa_pa_batch1_tp1_result.csv"
    with file.open(newline="") as lines:
        [row] = csv.DictReader(lines)
    assert float(row["Value"]) == summary["accuracy"] > 0.5
    assert [float(row["CI low"]), float(row["CI high"])] == summary["interval"]
    assert (row["Total"], row["Errors"]) == (str(NUM_QUESTIONS), "0")
    assert json.loads((output / "summary.json").read_text())["data_sha256"] == summary["data_sha256"]


def test_the_debug_files_hold_every_question(killed_and_resumed):
    output, _, _ = killed_and_resumed
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    [text] = (output / f"debug/CPU/{DIRECTORY}").glob("output_*.txt")
    cases = parse(text.read_bytes().decode())
    assert [(answer, query) for answer, _, query, _ in cases] == [(s["text"], s["prompt"]) for s in samples]
    assert all(
        0 < float(seconds) <= sample["seconds"] for (*_, seconds), sample in zip(cases, samples, strict=True)
    )
    with (text.parent / "textvqa_pa_batch1_tp1_debug_info.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for row, sample in zip(rows, samples, strict=True):
        assert int(row["key"]) == sample["question_id"]
        assert row["test_result"] == sample["text"]
        assert json.loads(row["output_token_ids"]) == sample["token_ids"]
        assert len(json.loads(row["input_token_ids"])) == sample["prompt_tokens"]
        assert json.loads(row["golden_result"]) == sample["references"]
        assert float(row["pass"]) == sample["score"]


def test_the_terminal_shows_settings_and_result_as_grids(killed_and_resumed):
    *_, printed = killed_and_resumed
    for word in ("model_path", "local_dataset_path", "N-Shot", "textvqa", "acc"):
        assert word in printed
    assert printed.splitlines()[-1].endswith("_result.csv")


@pytest.fixture
def modeltest(data, tmp_path, monkeypatch, capsys):
    """modeltest(*options): in this process; (status, stderr)."""
    tool = _edited(tmp_path / "tool", data)
    monkeypatch.chdir(tool)

    def call(*options):
        status = main(["--model_config_path", "config/model/wemm.yaml", "--task_config_path",
                       "config/task/textvqa.yaml", "--output_dir", "out", "--limit", "2", *options])  # fmt: skip
        return status, capsys.readouterr().err

    return call


def test_a_finished_run_is_asked_again_unless_it_is_to_be_kept(modeltest):
    assert modeltest("--batch_size", "4") == (0, "")
    samples = Path("out/samples.jsonl")
    first = samples.read_text()
    assert len(first.splitlines()) == 2
    assert [file.name for file in Path("out").rglob("*.csv")] == ["textvqa_pa_batch4_tp1_result.csv"]
    status, complaint = modeltest("--resume")
    assert status == 2
    assert "samples.jsonl" in complaint
    assert "--overwrite" in complaint
    assert samples.read_text() == first
    assert modeltest()[0] == 0
    assert samples.read_text() != first  # other seconds


def test_mistakes_are_one_line_and_status_2(modeltest):
    for options, complaint in (
        (["--tp", "3"], "tensor_parallel_size must be 1, 2, 4 or 8"),
        (["--batch_size", "0"], "max_num_seqs"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--task_config_path", "absent.yaml"], "absent.yaml cannot be read"),
    ):
        status, message = modeltest(*options)
        assert status == 2
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert complaint in message
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["vocalsound", "wemm"], "unknown dataset vocalsound; there are: textvqa"),
        (["textvqa", "llava"], "unknown model llava; there are: wemm"),
        (["textvqa"], "usage: mm_run.sh DATASET MODEL [OPTION...]; datasets: textvqa; models: wemm"),
        ([], "usage: "),
    ],
)
def test_the_script_names_what_there_is(shell, tmp_path, arguments, complaint):
    result = shell(tmp_path, "bash", ROOT / "tests/modeltest/scripts/mm_run.sh", *arguments, PYTHON="false")
    assert (result.returncode, result.stdout) == (1, "")
    assert complaint in result.stderr


def test_the_script_passes_on_what_it_does_not_know(shell, tmp_path):
    result = shell(tmp_path, "bash", ROOT / "tests/modeltest/scripts/mm_run.sh", "textvqa", "wemm", "--limit", "5",
                   "--output_dir", "a b", PYTHON="echo", DATE="2025-01-02")  # fmt: skip
    assert result.returncode == 0
    assert result.stdout == (
        "-m modeltest --model_config_path config/model/wemm.yaml --task_config_path config/task/textvqa.yaml "
        "--output_dir output/2025-01-02/modeltest/wemm/precision_result --save_debug_enable --lcoc_disable "
        "--limit 5 --output_dir a b\n"
    )
