"""A folder or a JSONL file becomes questions; every mistake in it is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemm.batch.inputs import json_lines, read_items, read_prompts
from wemm.batch.question import keys, user_turn
from wemm.errors import ParameterError
from wemm.request import SamplingParams

GREEDY = SamplingParams()


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines):
        file = tmp_path / "in.jsonl"
        texts = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        file.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return file

    return write


@pytest.fixture
def folder(tmp_path):
    for name in ("b.PNG", "a 图.jpg", "notes.txt", "inner/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder_is_its_images_in_order_with_every_question(folder):
    items = read_items(folder, ["甲", "乙"], GREEDY)
    assert [(item.line["image"], item.line["prompt"]) for item in items] == [
        ("a 图.jpg", "甲"), ("a 图.jpg", "乙"), ("b.PNG", "甲"), ("b.PNG", "乙"),
    ]  # fmt: skip
    assert items[0].question.image_paths == [str(folder / "a 图.jpg")]
    assert items[0].question.messages == user_turn("甲", [folder / "a 图.jpg"])


def test_folders_in_the_folder_when_asked_for(folder):
    names = [item.line["image"] for item in read_items(folder, ["?"], GREEDY, recursive=True)]
    assert names == ["a 图.jpg", "b.PNG", "inner/c.webp"]


def test_a_line_of_prompt_and_images(jsonl):
    file = jsonl({"image": "x.png", "prompt": "what?", "id": 7}, {"images": ["/a.png", "b.png"], "prompt": "two?"})
    one, two = read_items(file, [], GREEDY)
    assert one.line == {"image": "x.png", "prompt": "what?", "id": 7}
    assert one.question.image_paths == [str(file.parent / "x.png")]
    assert two.question.image_paths == ["/a.png", str(file.parent / "b.png")]


def test_a_line_without_a_prompt_takes_each_of_the_others(jsonl):
    items = read_items(jsonl({"image": "x.png"}, {"image": "y.png", "prompt": "own"}), ["a", "b"], GREEDY)
    assert [item.line["prompt"] for item in items] == ["a", "b", "own"]


def test_a_line_of_messages_and_one_of_the_batch_format_of_openai(jsonl):
    messages = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "?"}]}]
    file = jsonl(
        {"messages": messages, "max_tokens": 5},
        {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions",
         "body": {"messages": messages, "max_completion_tokens": 9, "temperature": 0.5}},
    )  # fmt: skip
    one, two = read_items(file, [], GREEDY)
    assert one.question.image_paths == two.question.image_paths == [str(file.parent / "x.png")]
    assert one.question.sampling.max_tokens == 5
    assert (two.question.sampling.max_tokens, two.question.sampling.temperature) == (9, 0.5)
    assert two.line["custom_id"] == "r-1"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["{}", "{"], "line 2 of .* is not JSON"),
        (['"text"'], "line 1 of .* must be an object"),
        (["", '{"image": "x.png"}'], "line 2 of .* has neither prompt nor messages"),
        (['{"image": 5, "prompt": "?"}'], "line 1 of .*image must be a path"),
        (['{"image": [""], "prompt": "?"}'], "line 1 of .*image must be a path"),
        (['{"prompt": ["?"]}'], "line 1 of .*prompt must be text"),
        (['{"messages": "hello"}'], "line 1 of .*messages must be a list"),
        (['{"prompt": "?", "temperature": -1}'], "line 1 of .*temperature"),
        (['{"prompt": "?", "max_tokens": "many"}'], "line 1 of .*max_tokens"),
        (['{"body": []}'], "line 1 of .*body must be an object"),
    ],
)
def test_every_mistake_names_its_line(jsonl, lines, problem):
    if lines[0] == "{}":
        lines[0] = '{"prompt": "fine"}'
    with pytest.raises(ParameterError, match=problem):
        read_items(jsonl(*lines), [], GREEDY)


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("any") / "in.jsonl"
    file.write_bytes(b"\n".join(lines))
    try:
        read_items(file, ["?"], GREEDY)
    except ParameterError as error:
        assert str(file) in str(error)


def test_a_folder_without_questions_or_images_is_refused(folder, tmp_path):
    with pytest.raises(ParameterError, match="--prompt TEXT or --questions FILE"):
        read_items(folder, [], GREEDY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ParameterError, match="has no images"):
        read_items(tmp_path / "empty", ["?"], GREEDY)
    with pytest.raises(ParameterError, match="does not exist"):
        read_items(tmp_path / "nothing", ["?"], GREEDY)


def test_questions_are_the_lines_of_a_file(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("\ufeff一？\n\n  two?  \n", encoding="utf-8")
    assert read_prompts(file) == ["一？", "two?"]
    file.write_text("\n")
    with pytest.raises(ParameterError, match="has no question"):
        read_prompts(file)
    with pytest.raises(ParameterError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")


def test_line_separators_of_unicode_stay_within_a_line(jsonl):
    file = jsonl({"prompt": "a\u2028b\x85c"})
    assert [line["prompt"] for _, line in json_lines(file)] == ["a\u2028b\x85c"]


def test_keys_say_what_is_asked_wherever_it_is_started_from(jsonl, monkeypatch):
    file = jsonl({"image": "x.png", "prompt": "?"}, {"image": "x.png", "prompt": "?"}, {"prompt": "?"})
    from_afar = keys(item.question for item in read_items(file, [], GREEDY))
    monkeypatch.chdir(file.parent)
    assert keys(item.question for item in read_items(Path("in.jsonl"), [], GREEDY)) == from_afar
    assert from_afar[1] == f"{from_afar[0]}#2"
    assert len(set(from_afar)) == 3
    warmer = [item.question for item in read_items(file, [], SamplingParams(temperature=1.0))]
    assert not set(keys(warmer)) & set(from_afar)
