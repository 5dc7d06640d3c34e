"""Answers survive a kill, are never mixed with those of other settings, and become a file whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemm.batch.journal import Journal
from wemm.errors import StorageError

SETTINGS = {"model": "nano", "dtype": "auto"}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "answers.jsonl"


def _open(target, resume=False, overwrite=False, **settings):
    return Journal(target, {**SETTINGS, **settings}, resume, overwrite)


def test_what_was_appended_is_there_again(target):
    with _open(target) as journal:
        journal.append("a", {"text": "甲\n乙"})
        journal.append("b", {"text": "2"})
    with _open(target, resume=True) as journal:
        assert journal.records == {"a": {"text": "甲\n乙"}, "b": {"text": "2"}}
        journal.append("c", {"text": "3"})
    with _open(target, resume=True) as journal:
        assert list(journal.records) == ["a", "b", "c"]


def test_a_record_is_on_disk_when_append_returns(target):
    with _open(target) as journal:
        journal.append("a", {"text": "1"})
        last = target.with_name("answers.jsonl.partial").read_text().splitlines()[-1]
        assert json.loads(last) == {"key": "a", "text": "1"}


@given(cut=st.integers(min_value=0))
def test_a_kill_costs_at_most_the_last_record(tmp_path_factory, cut):
    """Cut anywhere behind its first line, it holds the records whose lines are whole, and can be gone on with."""
    target = tmp_path_factory.mktemp("cut") / "answers.jsonl"
    with _open(target) as journal:
        for key in "abcd":
            journal.append(key, {"text": f"文 {key}"})
    partial = target.with_name("answers.jsonl.partial")
    whole = partial.read_bytes()
    start = whole.index(b"\n") + 1
    kept = whole[: start + cut % (len(whole) - start + 1)]
    partial.write_bytes(kept)
    with _open(target, resume=True) as journal:
        assert list(journal.records) == list("abcd")[: kept.count(b"\n") - 1]
        journal.append("e", {"text": "5"})
        before = dict(journal.records)
    with _open(target, resume=True) as journal:
        assert journal.records == before


def test_a_journal_cut_within_its_first_line_is_begun_again(target):
    with _open(target) as journal:
        journal.append("a", {"text": "1"})
    partial = target.with_name("answers.jsonl.partial")
    partial.write_bytes(partial.read_bytes()[:5])
    with _open(target, resume=True) as journal:
        assert journal.records == {}


def test_publishing_leaves_the_file_and_nothing_else(target):
    with _open(target) as journal:
        journal.append("a", {"text": "1"})
        journal.publish([{"n": 1}, {"n": 2}])
    assert [json.loads(line) for line in target.read_text().splitlines()] == [{"n": 1}, {"n": 2}]
    assert [path.name for path in target.parent.iterdir()] == ["answers.jsonl"]


def test_what_failed_is_asked_again_even_after_publishing(target):
    with _open(target) as journal:
        journal.append("a", {"text": "1"})
        journal.append("b", {"error": "no", "error_type": "MediaError"})
        journal.publish([{}])
    with pytest.raises(StorageError, match=r"is begun .*--resume"):
        _open(target)
    with _open(target, resume=True) as journal:
        assert list(journal.records) == ["a"]
        journal.append("b", {"text": "2"})
        journal.publish([{}])
    with pytest.raises(StorageError, match="there and complete"):
        _open(target, resume=True)


def test_begun_work_is_not_lost_by_accident(target):
    with _open(target) as journal:
        journal.append("a", {"text": "1"})
    with pytest.raises(StorageError, match=r"is begun .*--resume to go on, --overwrite to start again"):
        _open(target)
    with _open(target, overwrite=True) as journal:
        assert journal.records == {}


def test_answers_to_other_settings_are_not_taken_over(target):
    with _open(target) as journal:
        journal.append("a", {"text": "1"})
    with pytest.raises(StorageError, match=r"dtype 'auto', now 'float32'"):
        _open(target, resume=True, dtype="float32")
    with _open(target, resume=True) as journal:
        assert list(journal.records) == ["a"]


def test_one_run_at_a_time(target):
    with _open(target), pytest.raises(StorageError, match="another run"):
        _open(target, overwrite=True)
    _open(target, overwrite=True).close()


@pytest.mark.parametrize("damage", [b"nonsense\n", b"[1]\n", b'{"text": "no key"}\n', b"\xff\n"])
def test_a_damaged_line_is_named(target, damage):
    with _open(target) as journal:
        journal.append("a", {"text": "1"})
    partial = target.with_name("answers.jsonl.partial")
    partial.write_bytes(partial.read_bytes() + damage + b'{"key": "b"}\n')
    with pytest.raises(StorageError, match=r"line 3 of .*answers.jsonl.partial is damaged"):
        _open(target, resume=True)


@pytest.mark.parametrize("first", ['{"key": "a"}', "{}", '{"wemm_journal": 2, "settings": {}}'])
def test_a_file_that_is_no_journal_is_refused(target, first):
    target.parent.mkdir()
    target.with_name("answers.jsonl.partial").write_text(f"{first}\n")
    with pytest.raises(StorageError, match="no journal of this version"):
        _open(target, resume=True)


def test_a_directory_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        _open(tmp_path / "file" / "answers.jsonl")


def test_a_full_disk_is_one_error(target):
    with _open(target) as journal, Path("/dev/full").open("wb", buffering=0) as full:
        file, journal._file = journal._file, full
        with pytest.raises(StorageError, match="cannot be written: No space left on device"):
            journal.append("a", {"text": "1"})
        assert journal.records == {}
        journal._file = file
