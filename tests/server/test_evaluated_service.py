"""A service is as accurate as its engine: the same questions over HTTP come to the same figure."""

from __future__ import annotations

import json

import pytest

from training.held_out import write_held_out
from wemm.cli import main

pytest.importorskip("openai")


def test_the_same_accuracy_and_answers_over_http(served, tmp_path, capsys):
    data = write_held_out(tmp_path, 2)
    common = ["--data", str(data), "--prompt-suffix", "", "--max-tokens", "48"]
    engine = ["--model", "nano", "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path / "engine")]
    service = ["--endpoint", f"{served.url}/v1", "--output", str(tmp_path / "service")]
    answers, summaries = [], []
    for where, name in ((engine, "engine"), (service, "service")):
        assert main(["eval", "textvqa", *common, *where]) == 0
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
        answers.append([json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()])
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"] > 0.8
    assert summaries[0]["data_sha256"] == summaries[1]["data_sha256"]
    same = ("question_id", "text", "score", "prompt_tokens", "image_tokens", "completion_tokens", "finish_reason")
    for ours, theirs in zip(*answers, strict=True):
        assert [ours[name] for name in same] == [theirs[name] for name in same]


def test_a_batch_over_http(served, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "hello", "id": 5, "max_tokens": 3}) + "\n")
    assert main(["batch", str(source), str(tmp_path / "out.jsonl"), "--endpoint", f"{served.url}/v1"]) == 0
    [line] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (line["id"], line["completion_tokens"] <= 3) == (5, True)
