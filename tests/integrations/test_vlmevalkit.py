"""VLMEvalKit: our model class and launcher against stand-ins with the kit's own signatures."""

from __future__ import annotations

import base64
import importlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_ins import KIT, accepts, dataset_type, installed

from wemm.errors import ParameterError
from wemm.integrations.vlmevalkit import __main__ as launcher
from wemm.integrations.vlmevalkit import register
from wemm.integrations.vlmevalkit.prompts import multiple_choice

IMAGES = Path(__file__).parents[2] / "docs/images"
WORD, NUMBER, SHAPES = (str(IMAGES / name) for name in ("word.png", "number.png", "shapes.png"))
LETTER = "\nAnswer with the option's letter from the given choices directly."
NAN = float("nan")

pytestmark = pytest.mark.filterwarnings("ignore:the first image")


def _message(*parts):
    """Files become images, other texts texts."""
    return [{"type": "image" if Path(part).exists() else "text", "value": part} for part in parts]


@pytest.fixture(scope="module")
def wemm_class():
    with installed():
        yield importlib.import_module("wemm.integrations.vlmevalkit.model").WeMM


@pytest.fixture(scope="module")
def model(wemm_class):
    return wemm_class(model="nano", device="cpu", max_tokens=32)


@pytest.fixture
def asked(wemm_class, monkeypatch):
    """A model without an engine, and the questions it is asked."""
    questions = []

    class Client:
        def answers(self, given):
            questions.extend(given)
            yield 0, SimpleNamespace(text="yes", error=None)

    monkeypatch.setattr(sys.modules[wemm_class.__module__], "_client", lambda *arguments: Client())
    return questions


def _content(questions):
    [question] = questions
    [turn] = question.messages
    assert turn["role"] == "user"
    return [part[part["type"]] for part in turn["content"]]


# The prompts


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ({"question": "Which?", "A": "cat", "B": "dog"}, f"Which?\nA. cat\nB. dog{LETTER}"),
        ({"question": "Which?", "hint": "Look.", "A": 1, "B": 2}, f"Look.\nWhich?\nA. 1\nB. 2{LETTER}"),
        ({"question": "Which?", "hint": NAN, "A": "cat", "B": None, "C": NAN, "D": "cow"},
         f"Which?\nA. cat\nD. cow{LETTER}"),
        ({"question": "哪一个？", "A": "猫", "B": "狗"}, "哪一个？\nA. 猫\nB. 狗\n请直接回答选项字母。"),
        ({"question": "Which?", "A": "猫"}, "Which?\nA. 猫\n请直接回答选项字母。"),
        ({"question": "How many?", "answer": "A"}, "How many?\nAnswer the question directly."),
        ({"question": "有几个？"}, "有几个？\n请直接回答问题。"),
    ],
)  # fmt: skip
def test_multiple_choice_is_asked_in_the_words_of_the_kits_own_wrapper(line, prompt):
    assert multiple_choice(line) == prompt


def test_only_multiple_choice_has_a_prompt_of_ours(wemm_class, asked):
    model = wemm_class(model="any")
    kinds = {name: dataset_type(name) for name in ("MMBench_DEV_EN", "TextVQA_VAL", "MME", "HallusionBench")}
    assert {name: model.use_custom_prompt(name) for name in kinds} == {n: k == "MCQ" for n, k in kinds.items()}
    model.set_dump_image(lambda line: [line["image"]])
    line = {"question": "Which?", "A": "cat", "image": WORD}
    assert model.build_prompt(line, dataset="MMBench_DEV_EN") == _message(WORD, multiple_choice(line))


def test_hallusionbench_alone_gets_its_sentence(wemm_class, asked):
    behind = " Please answer yes or no. Answer the question using a single word or phrase."
    for interleave in (False, True):
        model = wemm_class(model="any", interleave=interleave)
        for dataset, suffix in (("HallusionBench", behind), ("MME", ""), (None, "")):
            assert model.generate(_message(WORD, "Is it?"), dataset) == "yes"
            assert _content(asked) == [WORD, f"Is it?{suffix}"]
            asked.clear()


def test_the_first_image_stands_before_all_texts_unless_interleaved(wemm_class, asked):
    parts = ("Look:", WORD, "Now this:", NUMBER, "Which?")
    wemm_class(model="any").generate(_message(*parts))
    assert _content(asked) == [WORD, "Look:\nNow this:\nWhich?"]
    asked.clear()
    wemm_class(model="any", interleave=True).generate(_message(*parts))
    assert _content(asked) == list(parts)
    asked.clear()
    wemm_class(model="any").generate(_message("Which?"))
    assert _content(asked) == ["Which?"]


# The model


def test_the_class_fits_the_kit(wemm_class):
    for name, parameters in KIT["BaseModel"].items():
        assert accepts(getattr(wemm_class, name), parameters), name


def test_a_whole_data_set_runs_on_nano(model):
    """What the kit does with a model that is no API."""
    assert not model.is_api
    rows = [(WORD, "What word is written here?"), (NUMBER, "图中的数字是多少？"),
            (SHAPES, "How many circles are there?")]  # fmt: skip
    model.set_dump_image(lambda line: [line["image"]])
    assert [model.generate(message=_message(*row), dataset="OCRVQA_TEST") for row in rows] == ["WEMM", "2048", "3"]


def test_a_question_that_is_refused_is_marked_as_failed(model, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    answer = model.generate(_message(str(damaged), "What is it?"))
    assert answer.startswith("Failed to obtain answer via API.")
    assert "damaged.png" in answer


def test_a_film_is_refused(model, tmp_path):
    film = tmp_path / "film.mp4"
    film.touch()
    with pytest.raises(AssertionError):
        model.generate([{"type": "video", "value": str(film)}, {"type": "text", "value": "What happens?"}])


def test_a_model_needs_a_checkpoint_or_an_endpoint(wemm_class):
    with pytest.raises(ParameterError, match="Given: neither"):
        wemm_class()


@pytest.fixture
def service():
    """An OpenAI endpoint that says "yes", and the bodies it was sent."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(
                {"object": "list", "data": [{"id": "served", "object": "model", "created": 0, "owned_by": ""}]}
            )

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}
            self._send(
                {"id": "", "object": "chat.completion", "created": 0, "model": "served", "choices": [choice]}
            )

        def _send(self, body):
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
        server.shutdown()


def test_an_endpoint_gets_the_files_byte_for_byte(wemm_class, service):
    pytest.importorskip("openai")
    url, bodies = service
    model = wemm_class(base_url=url, max_tokens=7)
    assert model.is_api
    assert model.generate(_message(WORD, "What word is written here?")) == "yes"
    model._client.close()
    [body] = bodies
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("served", 7, 0)
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What word is written here?"}
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == Path(WORD).read_bytes()


# How it gets there


def test_register_adds_a_recipe_to_the_kits_list(wemm_class, monkeypatch):
    supported = sys.modules["vlmeval.config"].supported_VLM
    register("WeMM-here", model="nano", max_num_seqs=4)
    recipe = supported.pop("WeMM-here")
    assert recipe.func is wemm_class
    assert recipe.keywords == {"model": "nano", "max_num_seqs": 4}


@pytest.fixture
def kit(monkeypatch, tmp_path):
    """A checkout of the kit whose run.py writes down what it is called with."""
    run = tmp_path / "run.py"
    run.write_text("import json, pathlib, sys; assert __name__ == '__main__'\n"
                   "pathlib.Path(__file__ + '.json').write_text(json.dumps(sys.argv))\n")  # fmt: skip
    spec = SimpleNamespace(origin=str(tmp_path / "vlmeval" / "__init__.py"))
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sys, "argv", [])
    return run


@pytest.mark.parametrize(
    ("arguments", "name", "keywords"),
    [
        (["nano"], "nano", {"model": "nano"}),
        (["/data/WeMM-Chat-2k-CN/"], "WeMM-Chat-2k-CN", {"model": "/data/WeMM-Chat-2k-CN/"}),
        (["nano", "--name=n", "--option=max_num_seqs=4", "--option=interleave=true", "--option", "dtype=float32"],
         "n", {"model": "nano", "max_num_seqs": 4, "interleave": True, "dtype": "float32"}),
        (["http://127.0.0.1:8000/v1", "--option", "api_key=k"], "wemm",
         {"base_url": "http://127.0.0.1:8000/v1", "api_key": "k"}),
    ],
)  # fmt: skip
def test_the_command_registers_the_model_and_runs_the_kit(wemm_class, kit, arguments, name, keywords):
    assert launcher.main([*arguments, "--data", "TextVQA_VAL", "MME", "--mode", "infer"]) == 0
    called = json.loads(Path(f"{kit}.json").read_text())
    assert called == [str(kit), "--data", "TextVQA_VAL", "MME", "--mode", "infer", "--model", name]
    assert sys.modules["vlmeval.config"].supported_VLM.pop(name).keywords == keywords


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nano", "--option", "max_num_seq=4"], "did you mean max_num_seqs?"),
        (["nano", "--option", "max_num_seqs"], "NAME=VALUE"),
        (["nano", "--option", "tensor_parallel_size=3"], "tensor_parallel_size must be 1, 2, 4 or 8"),
    ],
)
def test_a_wrong_option_is_one_line_before_the_kit_starts(wemm_class, kit, capsys, arguments, problem):
    assert launcher.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert problem in error
    assert not Path(f"{kit}.json").exists()


def test_without_the_kit_there_is_one_line_that_helps(kit, capsys, monkeypatch):
    kit.unlink()
    assert launcher.main(["nano"]) == 2
    assert "run.py lies beside the package in a checkout only" in capsys.readouterr().err
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    assert launcher.main(["nano"]) == 2
    assert "pip install -e VLMEvalKit" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    monkeypatch.setitem(sys.modules, "vlmeval.config", None)
    with pytest.raises(ParameterError, match="VLMEvalKit cannot be imported"):
        register("wemm", model="nano")
