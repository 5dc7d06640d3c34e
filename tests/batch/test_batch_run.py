"""`wemm batch`: every item answered once, in order, through kills and errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wemm.batch.inputs import Item
from wemm.batch.question import Answer, Question, user_turn
from wemm.batch.run import run_batch
from wemm.cli import main
from wemm.errors import RankError
from wemm.progress import silent
from wemm.request import SamplingParams

IMAGES = Path(__file__).parents[2] / "docs" / "images"
KNOWN = {"word.png": ("What word is written here?", "WEMM"), "number.png": ("图中的数字是多少？", "2048"),
         "shapes.png": ("What colour is the star?", "blue")}  # fmt: skip


class Parrot:
    """Answers with the question, backwards in time; fails where told to."""

    model = "parrot"

    def __init__(self, fails=(), dies_after=None):
        self.asked = []
        self._fails = fails
        self._dies_after = dies_after

    def answers(self, questions):
        waiting = list(enumerate(questions))
        for place, question in reversed(waiting):
            if len(self.asked) == self._dies_after:
                raise RankError("gone")
            text = question.messages[0]["content"][-1]["text"]
            self.asked.append(text)
            failed = Answer(error="no", error_type="MediaError")
            yield place, failed if text in self._fails else Answer(text=text.upper(), completion_tokens=1)


def _items(texts):
    return [
        Item({"prompt": text, "id": i}, Question(user_turn(text), SamplingParams()))
        for i, text in enumerate(texts)
    ]


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run(client, texts, target, resume=False, overwrite=False):
    return run_batch(client, _items(texts), target, {"model": "parrot"}, resume, overwrite, silent)


def test_answers_stand_in_the_order_of_the_questions(tmp_path):
    target = tmp_path / "out.jsonl"
    _run(Parrot(), "abcb", target)
    assert [(line["id"], line["prompt"], line["text"]) for line in _lines(target)] == [
        (0, "a", "A"), (1, "b", "B"), (2, "c", "C"), (3, "b", "B"),
    ]  # fmt: skip


@pytest.mark.parametrize("dies_after", range(5))
def test_interrupted_and_resumed_nothing_is_asked_twice_and_nothing_is_missing(tmp_path, dies_after):
    target = tmp_path / "out.jsonl"
    first, second = Parrot(dies_after=dies_after), Parrot()
    with pytest.raises(RankError):
        _run(first, "abcdea", target)
    assert not target.exists()
    summary = _run(second, "abcdea", target, resume=True)
    assert sorted([*first.asked, *second.asked]) == list("aabcde")
    assert [line["text"] for line in _lines(target)] == list("ABCDEA")
    assert summary.num_kept == dies_after


def test_an_error_stays_with_its_item_and_resume_asks_that_one_again(tmp_path):
    target = tmp_path / "out.jsonl"
    summary = _run(Parrot(fails="b"), "abc", target)
    assert (summary.num_errors, summary.first_error) == (1, "no")
    assert [line.get("text") for line in _lines(target)] == ["A", None, "C"]
    assert _lines(target)[1] == {"prompt": "b", "id": 1, "error": "no", "error_type": "MediaError"}
    again = Parrot()
    assert _run(again, "abc", target, resume=True).num_errors == 0
    assert again.asked == ["b"]
    assert [line["text"] for line in _lines(target)] == list("ABC")


def test_more_items_than_before_are_asked_beside_the_old_answers(tmp_path):
    target = tmp_path / "out.jsonl"
    with pytest.raises(RankError):
        _run(Parrot(dies_after=2), "ab-", target)
    again = Parrot()
    _run(again, "xab", target, resume=True)
    assert [line["text"] for line in _lines(target)] == list("XAB")
    assert "b" not in again.asked


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in KNOWN:
        shutil.copy(IMAGES / name, folder)
    return folder


def _batch(*arguments):
    return main(["batch", *map(str, arguments), "--model", "nano", "--device", "cpu", "--dtype", "float32"])


def test_a_real_batch_is_right_and_names_what_cannot_be_read(pictures, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no image")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"image": f"pictures/{name}", "prompt": prompt, "answer": answer}
             for name, (prompt, answer) in KNOWN.items()]  # fmt: skip
    lines.insert(1, {"image": "pictures/broken.png", "prompt": "?"})
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _batch(source, target) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 of 4 items have an error" in captured.err
    answers = _lines(target)
    assert "is not an image in one of the formats" in answers.pop(1)["error"]
    for line in answers:
        assert line["text"] == line["answer"]
        assert line["completion_tokens"] == len(line["token_ids"])
        assert line["timings"]["total"] == line["seconds"] > 0
        assert 0 < line["image_tokens"] < line["prompt_tokens"]


def test_many_questions_about_one_picture_encode_it_once(pictures, tmp_path, monkeypatch):
    """Under two names, beside another picture: two pictures, two encodings, however many questions."""
    from wemm.engine.llm import LLM

    shutil.copy(pictures / "word.png", pictures / "a copy.png")
    (pictures / "shapes.png").unlink()
    questions = tmp_path / "questions.txt"
    questions.write_text("".join(f"{prompt}\n" for prompt, _ in KNOWN.values()), encoding="utf-8")
    counts, close = [], LLM.close

    def counting(llm):
        if llm._built is not None:
            counts.append(llm.stats.num_encoded_images)
        close(llm)

    monkeypatch.setattr(LLM, "close", counting)
    assert _batch(pictures, tmp_path / "out.jsonl", "--questions", questions, "--image-cache-memory", "64K") == 0
    assert counts == [2]
    assert len(_lines(tmp_path / "out.jsonl")) == 9


def test_all_items_failing_is_an_error(pictures, tmp_path, capsys):
    for name in KNOWN:
        (pictures / name).write_bytes(b"")
    assert _batch(pictures, tmp_path / "out.jsonl", "-p", "?") == 2
    assert capsys.readouterr().err.startswith("error: no item was answered")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["absent", "out.jsonl", "-p", "?", "-m", "nano"], "absent does not exist"),
        (["pictures", "out.jsonl", "-m", "nano"], "--prompt TEXT or --questions FILE"),
        (["pictures", "out.jsonl", "-p", "?"], "give --model, or --endpoint"),
        (["pictures", "out.jsonl", "-p", "?", "-m", "nano", "--max-tokens", "0"], "max_tokens"),
        (["pictures", "out.jsonl", "-p", "?", "--endpoint", "ftp://x"], "--endpoint is a URL"),
        (["pictures", "out.jsonl", "-p", "?", "--endpoint", "http://x", "--concurrency", "0"], "--concurrency"),
        (["pictures", "word.png/out.jsonl", "-p", "?", "-m", "nano"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(pictures, tmp_path, monkeypatch, capsys, arguments, problem):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures / "word.png", tmp_path)
    assert main(["batch", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert problem in captured.err


def test_what_is_there_is_seen_before_a_model_is_loaded(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wemm.cli.clients.ClientOptions.open", lambda self: pytest.fail("loaded"))
    done, begun = tmp_path / "done.jsonl", tmp_path / "begun.jsonl"
    done.write_text("{}")
    (tmp_path / "begun.jsonl.partial").write_text("{}")
    for target, problem in ((done, "there and complete"), (begun, "is begun")):
        assert _batch(pictures, target, "-p", "?") == 2
        assert problem in capsys.readouterr().err


def test_killed_in_the_middle_and_resumed(pictures, tmp_path):
    """A real kill -9: what the journal has is not asked again, and the answers are those of an undisturbed run."""
    questions = tmp_path / "questions.txt"
    questions.write_text("".join(f"{i}: what is written here?\n" for i in range(40)))
    target, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = ["--questions", questions, "--max-num-seqs", "2", "--max-tokens", "24", "--ignore-eos"]
    command = [sys.executable, "-m", "wemm", "batch", *map(str, [pictures, target, *options]), "-m", "nano",
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    process = subprocess.Popen(command)
    partial = tmp_path / "out.jsonl.partial"
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 5):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = partial.read_bytes().rpartition(b"\n")[0] + b"\n"
    assert not target.exists()

    from wemm.batch.engine_client import EngineClient

    asked = []
    answers = EngineClient.answers

    def counting(client, questions):
        questions = list(questions)
        asked.extend(questions)
        return answers(client, questions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineClient, "answers", counting)
        assert _batch(pictures, target, *options, "--resume") == 0
    assert len(asked) + kept.count(b"\n") - 1 == 120
    assert _batch(pictures, whole, *options) == 0
    without_time = [{k: v for k, v in line.items() if k not in ("seconds", "timings", "cached_tokens")}
                    for line in _lines(target)]  # fmt: skip
    assert without_time == [{k: v for k, v in line.items() if k not in ("seconds", "timings", "cached_tokens")}
                            for line in _lines(whole)]  # fmt: skip
