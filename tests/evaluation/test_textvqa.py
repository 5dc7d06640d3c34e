"""TextVQA's files are read as they are published; what is wrong in them is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemm.errors import ParameterError
from wemm.evaluation.textvqa import annotations_file, data_sha256, load_samples

LINE = {"image": "x.png", "question": "what?", "question_id": 1, "answer": "a"}
ANSWERS = [{"answer": "a", "answer_id": i} for i in range(10)]


@pytest.fixture
def files(tmp_path):
    def write(lines, annotations):
        data = tmp_path / "textvqa_val.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        annotations_file(data).write_text(json.dumps(annotations))
        return data

    return write


def _annotated(*question_ids):
    return {"annotations": [{"question_id": i, "answers": ANSWERS} for i in question_ids]}


def test_a_sample_has_its_picture_and_ten_answers(files):
    data = files([LINE, {**LINE, "question_id": 2, "image": "/abs/y.png"}], _annotated(1, 2))
    one, two = load_samples(data)
    assert (one.image, one.image_path) == ("x.png", str(data.parent / "x.png"))
    assert two.image_path == "/abs/y.png"
    assert one.references == ["a"] * 10
    assert [sample.question_id for sample in load_samples(data, limit=1)] == [1]


def test_annotations_lie_beside_under_the_name_up_to_its_first_dot():
    assert annotations_file(Path("d/textvqa_val.v1.jsonl")) == Path("d/textvqa_val_annotations.json")


def test_relative_pictures_are_relative_to_the_file_not_to_where_one_stands(files, monkeypatch, tmp_path):
    data = files([LINE], _annotated(1))
    monkeypatch.chdir(data.parent)
    assert load_samples(Path(data.name))[0].image_path == str(data.parent / "x.png")


@pytest.mark.parametrize(
    ("line", "annotations", "problem"),
    [
        ({"image": 5}, _annotated(1), "line 1 of .*image must be text"),
        ({"question": ""}, _annotated(1), "line 1 of .*question must be text"),
        ({"question_id": None}, _annotated(1), "line 1 of .*question_id must be"),
        ({"question_id": 7}, _annotated(1), "line 1 of .*question_id 7 has no annotation"),
        ({}, {"annotations": [{"question_id": 1, "answers": []}]}, "question_id 1 needs answers"),
        ({}, {"annotations": [{"question_id": 1, "answers": ["a"]}]}, "question_id 1 needs answers"),
        ({}, {"annotations": [{"question_id": 1, "answers": [{"text": "a"}]}]}, "question_id 1 needs answers"),
        ({}, {"annotations": [{"answers": ANSWERS}]}, "it lacks 'question_id'"),
        ({}, {"other": 1}, "it lacks 'annotations'"),
        ({}, [], "must be {"),
        ({}, {"annotations": 5}, "must be {"),
        ({}, {"annotations": [{"question_id": [], "answers": ANSWERS}]}, "must be {"),
    ],
)
def test_every_mistake_is_named(files, line, annotations, problem):
    with pytest.raises(ParameterError, match=problem):
        load_samples(files([{**LINE, **line}], annotations))


def test_a_question_twice_is_refused(files):
    with pytest.raises(ParameterError, match="occurs twice"):
        load_samples(files([LINE, LINE], _annotated(1)))


def test_missing_files_are_named(files, tmp_path):
    data = files([LINE], _annotated(1))
    annotations_file(data).unlink()
    with pytest.raises(ParameterError, match=r"textvqa_val_annotations.json cannot be read.*lie beside"):
        load_samples(data)
    with pytest.raises(ParameterError, match=r"absent.jsonl cannot be read"):
        load_samples(tmp_path / "absent.jsonl")
    with pytest.raises(ParameterError, match="has no questions"):
        load_samples(files([], _annotated(1)))


@given(lines=st.binary(max_size=80), annotations=st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(tmp_path_factory, lines, annotations):
    data = tmp_path_factory.mktemp("any") / "any.jsonl"
    data.write_bytes(lines)
    annotations_file(data).write_bytes(annotations)
    with pytest.raises(ParameterError):
        load_samples(data)


def test_the_hash_tells_sets_apart(files):
    first = data_sha256(files([LINE], _annotated(1)))
    assert data_sha256(files([LINE], _annotated(1, 2))) != first
    assert data_sha256(files([LINE], _annotated(1))) == first
