"""An evaluation is a batch with scores: whole = resumed, errors apart from wrong answers, figures that add up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from training.held_out import write_held_out
from wemm.batch.question import Answer
from wemm.cli import main
from wemm.errors import ClientError, ParameterError, RankError, StorageError
from wemm.evaluation.run import DEFAULT_SUFFIX, TextVqaSettings, evaluate
from wemm.evaluation.textvqa import annotations_file
from wemm.progress import silent
from wemm.request import SamplingParams


class Scripted:
    """Gives each question its answer, or an error for None."""

    model = "scripted"

    def __init__(self, answers, dies_after=None):
        self._answers = answers
        self._dies_after = dies_after
        self.asked = []

    def answers(self, questions):
        for place, question in enumerate(questions):
            if len(self.asked) == self._dies_after:
                raise RankError("gone")
            text = question.messages[0]["content"][-1]["text"]
            self.asked.append(text)
            answer = self._answers[text.removesuffix(DEFAULT_SUFFIX)]
            yield place, Answer(text=answer) if answer is not None else Answer(error="no", error_type="MediaError")


@pytest.fixture
def data(tmp_path):
    """Four questions. Of ten people, four to ten agree; one question has three who do, in capitals."""
    references = {"colour?": ["red"] * 10, "number?": ["2"] * 4 + ["3"] * 6, "brand?": ["Acme"] * 3 + ["x"] * 7,
                  "word?": ["yes"] * 10}  # fmt: skip
    file = tmp_path / "set.jsonl"
    lines = [
        {"image": f"{i}.png", "question": question, "question_id": i} for i, question in enumerate(references)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    annotations = [
        {"question_id": i, "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers)]}
        for i, answers in enumerate(references.values())
    ]
    annotations_file(file).write_text(json.dumps({"annotations": annotations}))
    return file


ANSWERS = {"colour?": "Red.", "number?": "two", "brand?": "acme", "word?": None}


def _evaluate(client, data, **settings):
    settings = TextVqaSettings(data, data.parent / "out", **settings)
    return evaluate(client, settings, SamplingParams(), {"model": "scripted"}, silent)


def _samples(data):
    return [json.loads(line) for line in (data.parent / "out/samples.jsonl").read_text().splitlines()]


def test_an_error_is_no_wrong_answer(data):
    """1, 1 and 0.9 of the official rules; the question without an answer is counted apart."""
    summary = _evaluate(Scripted(ANSWERS), data).summary
    assert summary["accuracy"] == pytest.approx((1 + 1 + 0.9) / 3)
    assert (summary["num_samples"], summary["num_errors"], summary["num_scored"]) == (4, 1, 3)
    assert [sample["score"] for sample in _samples(data)] == pytest.approx([1, 1, 0.9, None])
    assert _samples(data)[3]["error"] == "no"


def test_the_original_tool_scores_errors_zero_and_capitals_wrong(data):
    summary = _evaluate(Scripted(ANSWERS), data, scoring="modeltest").summary
    assert summary["accuracy"] == summary["accuracies"]["modeltest"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert summary["accuracies"]["official"] == pytest.approx(2.9 / 3)
    assert summary["num_errors"] == 1


def test_the_interval_holds_the_accuracy_and_shrinks_with_errors_left_out(data):
    summary = _evaluate(Scripted(ANSWERS), data).summary
    low, high = summary["interval"]
    assert 0 <= low < summary["accuracy"] < high <= 1


def test_the_summary_is_the_file_and_the_mean_of_the_samples(data):
    summary = _evaluate(Scripted({**ANSWERS, "word?": "no"}), data).summary
    assert json.loads((data.parent / "out/summary.json").read_text()) == json.loads(json.dumps(summary))
    scores = [sample["score"] for sample in _samples(data)]
    assert summary["accuracy"] == pytest.approx(sum(scores) / len(scores))


def test_prefix_and_suffix_surround_the_question(data):
    client = Scripted({f"Look: {question}": answer for question, answer in ANSWERS.items()})
    _evaluate(client, data, prompt_prefix="Look: ")
    assert client.asked[0] == "Look: colour? Answer the question using a single word or phrase."
    assert _samples(data)[0]["prompt"] == client.asked[0]
    assert _samples(data)[0]["question"] == "colour?"


@pytest.mark.parametrize("dies_after", range(4))
def test_resumed_it_comes_to_the_same_and_asks_nothing_twice(data, dies_after):
    answers = {**ANSWERS, "word?": "no"}
    whole = _evaluate(Scripted(answers), data).summary
    first, second = Scripted(answers, dies_after=dies_after), Scripted(answers)
    with pytest.raises(RankError):
        _evaluate(first, data, overwrite=True)
    assert not (data.parent / "out/summary.json").exists()
    resumed = _evaluate(second, data, resume=True).summary
    assert sorted([*first.asked, *second.asked]) == sorted(set(first.asked) | set(second.asked))
    assert len(first.asked) + len(second.asked) == 4
    changing = ("date", "seconds")
    assert {k: v for k, v in resumed.items() if k not in changing} == {
        k: v for k, v in whole.items() if k not in changing
    }


def test_a_short_run_can_be_made_longer(data):
    client = Scripted(ANSWERS, dies_after=2)
    with pytest.raises(RankError):
        _evaluate(client, data)
    longer = Scripted(ANSWERS)
    assert _evaluate(longer, data, resume=True, limit=3).summary["num_samples"] == 3
    assert len(longer.asked) == 1


def test_other_words_are_another_run(data):
    with pytest.raises(RankError):
        _evaluate(Scripted(ANSWERS, dies_after=1), data)
    with pytest.raises(StorageError, match="prompt_suffix"):
        _evaluate(Scripted(ANSWERS), data, resume=True, prompt_suffix="!")


def test_nothing_answered_is_an_error_and_no_figure(data):
    with pytest.raises(ClientError, match="no question was answered"):
        _evaluate(Scripted(dict.fromkeys(ANSWERS)), data)
    assert not (data.parent / "out/summary.json").exists()


def test_settings_are_checked(data):
    with pytest.raises(ParameterError, match="official or modeltest"):
        TextVqaSettings(data, data.parent, scoring="mine")
    with pytest.raises(ParameterError, match="limit"):
        TextVqaSettings(data, data.parent, limit=0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """nano's held-out set, two questions per task."""
    return write_held_out(tmp_path_factory.mktemp("held out"), 2)


def _command(data, output, *more):
    return ["eval", "textvqa", "--model", "nano", "--device", "cpu", "--dtype", "float32", "--data", str(data),
            "--output", str(output), "--prompt-suffix", "", "--max-tokens", "48", *more]  # fmt: skip


def test_nano_through_the_command_line(held_out, tmp_path, capsys):
    assert main(_command(held_out, tmp_path / "out")) == 0
    captured = capsys.readouterr()
    *_, line = captured.out.splitlines()
    summary = json.loads(line)
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["accuracy"] > 0.8
    assert summary["num_samples"] == 18
    assert f"{100 * summary['accuracy']:.2f} %" in captured.out
    assert captured.err == ""


def test_killed_in_the_middle_and_resumed_nano_scores_the_same(held_out, tmp_path, capsys):
    slow = ("--max-num-seqs", "1", "--min-tokens", "40")
    assert main(_command(held_out, tmp_path / "whole", *slow)) == 0
    command = [sys.executable, "-m", "wemm", *_command(held_out, tmp_path / "out", *slow)]
    process = subprocess.Popen(command)
    partial = tmp_path / "out/samples.jsonl.partial"
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = [json.loads(line)["token_ids"] for line in partial.read_bytes().split(b"\n")[1:-1]]
    assert main(_command(held_out, tmp_path / "out", *slow, "--resume")) == 0
    whole, resumed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "out"))
    assert resumed["accuracy"] == whole["accuracy"]
    assert 3 <= len(kept) < 18
    timings = [json.loads(line)["token_ids"] for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert all(token_ids in timings for token_ids in kept)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "nano", "--data", "absent.jsonl", "--output", "out"], "absent.jsonl cannot be read"),
        (["--data", "set.jsonl", "--output", "out"], "give --model, or --endpoint"),
        (
            ["--model", "nano", "--data", "set.jsonl", "--output", "out", "--scoring", "mine"],
            "official or modeltest",
        ),
        (["--model", "nano", "--data", "set.jsonl", "--output", "out", "--limit", "0"], "limit"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--data", "set.jsonl", "--output", "out"], "cannot be reached"),
    ],
)
def test_mistakes_are_one_line(data, monkeypatch, capsys, arguments, problem):
    monkeypatch.chdir(data.parent)
    assert main(["eval", "textvqa", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert problem in captured.err
