"""lmms-eval: our task file and model class against stand-ins with the harness's own signatures."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from stand_ins import LMMS, accepts, installed

from wemm.errors import ParameterError
from wemm.integrations.lmms_eval import TASKS, manifest
from wemm.integrations.lmms_eval.__main__ import main

IMAGES = Path(__file__).parents[2] / "docs/images"
ASKED = [
    ("word.png", "What word is written here?", "WEMM"),
    ("number.png", "图中的数字是多少？", "2048"),
    ("shapes.png", "How many circles are there?", "3"),
]


class Rows(list):
    """A data set of the harness, as far as the task asks it."""

    @classmethod
    def from_list(cls, rows):
        return cls(rows)


def _load(path):
    """As the harness reads a task: `!function file.name` is an attribute of a file beside it, `include` a base."""
    functions = importlib.import_module("importlib.util")

    class Loader(yaml.SafeLoader):
        pass

    def attribute(loader, node):
        file, name = loader.construct_scalar(node).split(".")
        spec = functions.spec_from_file_location(file, path.parent / f"{file}.py")
        module = functions.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    Loader.add_constructor("!function", attribute)
    task = yaml.load(path.read_text(encoding="utf-8"), Loader)
    base = task.pop("include", None)
    return {**_load(path.parent / base), **task} if base else task


@pytest.fixture
def textvqa(tmp_path, monkeypatch):
    """A function that writes questions and annotations: how many of ten people were right, per question."""
    questions = tmp_path / "textvqa_val.jsonl"
    monkeypatch.setenv("WEMM_TEXTVQA", str(questions))

    def write(*right):
        with questions.open("w", encoding="utf-8") as file:
            for number, (image, question, answer) in enumerate(ASKED[: len(right)]):
                line = {
                    "image": str(IMAGES / image),
                    "question": question,
                    "question_id": number,
                    "answer": answer,
                }
                print(json.dumps(line), file=file)
        people = [[answer] * n + ["other"] * (10 - n) for n, (_, _, answer) in zip(right, ASKED, strict=False)]
        annotations = [
            {"question_id": i, "answers": [{"answer": a, "answer_id": j} for j, a in enumerate(answers)]}
            for i, answers in enumerate(people)
        ]
        questions.with_name("textvqa_val_annotations.json").write_text(json.dumps({"annotations": annotations}))
        return questions

    return write


@pytest.fixture(scope="module")
def wemm_class():
    with installed():
        yield importlib.import_module("wemm.integrations.lmms_eval.model").WeMM


@pytest.fixture(scope="module")
def model(wemm_class):
    """As the harness makes it: --model_args model=nano,device=cpu, and what it adds itself."""
    given = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    assert sorted(given) == sorted(LMMS["lmms constructor is given"])
    model = wemm_class(model="nano", **{k: v for k, v in given.items() if v is not None})
    yield model
    model.clean()


def _requests(model, task, documents):
    """What the harness makes of a generate_until task for a chat model."""
    model.task_dict = {task["task"]: {"validation": documents}}

    def to_messages(document):
        images = [{"type": "image", "url": image} for image in task["doc_to_visual"](document)]
        prompts = task["lmms_eval_specific_kwargs"]["default"]
        text = {"type": "text", "text": task["doc_to_text"](document, prompts)}
        return [{"role": "user", "content": [*images, text]}]

    arguments = [("", to_messages, dict(task["generation_kwargs"]), i, task["task"], "validation")
                 for i in range(len(documents))]  # fmt: skip
    assert all(len(one) == len(LMMS["generate_until arguments of a chat model"]) for one in arguments)
    return [SimpleNamespace(args=one) for one in arguments]


# The task


@pytest.mark.parametrize("name", ["wemm_textvqa", "wemm_textvqa_plain"])
def test_the_task_file_says_what_the_harness_reads_and_nothing_else(name, textvqa):
    questions = textvqa(10)
    task = _load(TASKS / f"{name}.yaml")
    assert set(task) <= set(LMMS["TaskConfig"])
    assert task["task"] == name
    assert (task["dataset_path"], task["test_split"]) == ("json", "validation")
    assert task["dataset_kwargs"]["data_files"] == {"validation": str(questions)}
    assert task["output_type"] == "generate_until"
    [metric] = task["metric_list"]
    assert metric == {"metric": "vqa_accuracy", "aggregation": "mean", "higher_is_better": True}
    [document] = task["process_docs"](Rows())
    assert set(task["process_results"](document, ["WEMM"])) == {metric["metric"]}


def test_prompts_stand_around_the_question_as_it_is_written(textvqa):
    textvqa(10, 10)
    for name, behind in (
        ("wemm_textvqa", "\nAnswer the question using a single word or phrase."),
        ("wemm_textvqa_plain", ""),
    ):
        task = _load(TASKS / f"{name}.yaml")
        document = task["process_docs"](Rows())[1]
        prompts = task["lmms_eval_specific_kwargs"]["default"]
        assert task["doc_to_text"](document, prompts) == "图中的数字是多少？" + behind
        assert task["doc_to_text"](document) == "图中的数字是多少？"


def test_documents_keep_the_order_and_all_answers(textvqa):
    textvqa(10, 2, 0)
    task = _load(TASKS / "wemm_textvqa.yaml")
    documents = task["process_docs"](Rows())
    assert [document["question"] for document in documents] == [question for _, question, _ in ASKED]
    assert documents[1]["answers"] == ["2048"] * 2 + ["other"] * 8
    assert documents[1][task["doc_to_target"]] == "other"
    [image] = task["doc_to_visual"](documents[0])
    assert image.mode == "RGB"


@pytest.mark.parametrize(("right", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (10, 1)])
def test_an_answer_counts_by_how_many_people_gave_it(textvqa, right, score):
    textvqa(right)
    task = _load(TASKS / "wemm_textvqa.yaml")
    [document] = task["process_docs"](Rows())
    assert task["process_results"](document, ["wemm."])["vqa_accuracy"] == pytest.approx(score)


def test_missing_files_are_named_before_the_harness_downloads_anything(textvqa, monkeypatch):
    questions = textvqa(10, 10)
    text = questions.read_text(encoding="utf-8")
    questions.write_text(text.replace("word.png", "gone.png"), encoding="utf-8")
    with pytest.raises(ParameterError, match=r"1 of its images are missing, such as .*gone\.png"):
        _load(TASKS / "wemm_textvqa.yaml")
    questions.with_name("textvqa_val_annotations.json").unlink()
    with pytest.raises(ParameterError, match="textvqa_val_annotations.json"):
        _load(TASKS / "wemm_textvqa.yaml")
    monkeypatch.setenv("WEMM_TEXTVQA", str(questions.with_name("gone.jsonl")))
    with pytest.raises(ParameterError, match="gone.jsonl; WEMM_TEXTVQA="):
        _load(TASKS / "wemm_textvqa.yaml")


def test_without_the_variable_the_questions_are_looked_for_here(textvqa, monkeypatch):
    questions = textvqa(10)
    monkeypatch.delenv("WEMM_TEXTVQA")
    monkeypatch.chdir(questions.parent)
    assert _load(TASKS / "wemm_textvqa.yaml")["dataset_kwargs"]["data_files"] == {"validation": str(questions)}


# The model


def test_the_class_fits_the_harness(wemm_class):
    assert not inspect.isabstract(wemm_class)
    assert wemm_class.is_simple is False
    for name, parameters in LMMS["lmms"].items():
        assert accepts(getattr(wemm_class, name), parameters), name


def test_a_whole_task_runs_on_nano(model, textvqa):
    textvqa(10, 2, 10)
    task = _load(TASKS / "wemm_textvqa_plain.yaml")
    documents = task["process_docs"](Rows())
    answers = model.generate_until(_requests(model, task, documents))
    assert answers == ["WEMM", "2048", "3"]
    scores = [task["process_results"](*pair)["vqa_accuracy"] for pair in zip(documents, [[a] for a in answers],
                                                                              strict=True)]  # fmt: skip
    assert sum(scores) / len(scores) == pytest.approx((1 + 0.6 + 1) / 3)


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(model, textvqa):
    textvqa(10, 10, 10)
    task = _load(TASKS / "wemm_textvqa.yaml")
    requests = _requests(model, task, task["process_docs"](Rows()))
    together = model.generate_until(requests)
    assert together == [answer for request in requests for answer in model.generate_until([request])]
    assert model.generate_until([]) == []


def test_a_request_that_is_refused_fails_alone_and_is_marked(model, textvqa, tmp_path):
    textvqa(10, 10, 10)
    task = _load(TASKS / "wemm_textvqa_plain.yaml")
    task["doc_to_visual"] = lambda document: [document["image"]]
    documents = task["process_docs"](Rows())
    documents[1]["image"] = str(tmp_path / "gone.png")
    answers = model.generate_until(_requests(model, task, documents))
    assert (answers[0], answers[2]) == ("WEMM", "3")
    assert answers[1].startswith("[LMMS_EVAL_REQUEST_FAILED]")
    assert "gone.png" in answers[1]


def test_images_are_opened_as_the_engine_takes_the_questions(model, textvqa):
    textvqa(10, 10, 10)
    task = _load(TASKS / "wemm_textvqa_plain.yaml")
    opened, open_image = [], task["doc_to_visual"]
    task["doc_to_visual"] = lambda document: opened.append(1) or open_image(document)
    questions = model._questions(_requests(model, task, task["process_docs"](Rows())))
    assert len(opened) == 0
    next(questions)
    assert len(opened) == 1


def test_what_cannot_be_done_says_why(model, textvqa):
    with pytest.raises(NotImplementedError, match="generate_until variant"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
    model.task_dict = {"t": {"s": [None]}}
    film = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
    with pytest.raises(NotImplementedError, match="shows it video"):
        model.generate_until([SimpleNamespace(args=("", lambda document: film, {}, 0, "t", "s"))])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"temperature": 0, "max_tokens": 1024, "stop": ()}),
        ({"until": ["\n\n"], "do_sample": False}, {"temperature": 0, "stop": ()}),
        ({"until": "ASSISTANT:"}, {"stop": ("ASSISTANT:",)}),
        ({"until": ["", "Q:"]}, {"stop": ("Q:",)}),
        ({"max_new_tokens": 16, "num_beams": 1}, {"max_tokens": 16}),
        ({"max_new_tokens": None, "top_p": None}, {"max_tokens": 1024, "top_p": 1}),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0}),
        ({"temperature": 0, "top_p": 0, "do_sample": True}, {"temperature": 0, "top_p": 1}),
        ({"do_sample": True}, {"temperature": 1}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}),
    ],
)
def test_generation_kwargs_mean_what_they_mean_in_the_harness(wemm_class, given, expected):
    sampling_params = sys.modules[wemm_class.__module__].sampling_params
    params = sampling_params(given, 1024)
    assert {name: getattr(params, name) for name in expected} == expected


def test_beams_are_refused(wemm_class):
    with pytest.raises(ParameterError, match="num_beams=3"):
        sys.modules[wemm_class.__module__].sampling_params({"num_beams": 3}, 1024)


def test_several_processes_are_refused(wemm_class, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParameterError, match="tensor_parallel_size=2"):
        wemm_class(model="nano")


# How it gets there


def test_the_manifest_names_the_class(wemm_class):
    found = manifest()
    assert found.model_id == "wemm"
    module, _, name = found.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is wemm_class


@pytest.mark.parametrize("own", [[], ["--include_path", "mine"], ["--include_path=mine"]])
def test_the_command_adds_model_and_tasks_and_leaves_the_rest(own, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    with installed():
        seen = []
        sys.modules["lmms_eval.__main__"].cli_evaluate = lambda: seen.append(sys.argv)
        assert main(["--model", "wemm", *own]) == 0
        [manifest] = sys.modules["lmms_eval.models"].MODEL_REGISTRY_V2.manifests
    assert manifest.model_id == "wemm"
    assert seen == [["lmms-eval", "--model", "wemm", *(own or ["--include_path", str(TASKS)])]]


def test_without_the_harness_there_is_one_line_that_helps():
    blocked = "import sys; sys.modules['lmms_eval'] = None; "
    package = "import wemm.integrations.lmms_eval.__main__ as m; sys.exit(m.main([]))"
    result = subprocess.run([sys.executable, "-c", blocked + package], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: lmms-eval cannot be imported")
    assert "pip install" in result.stderr
    assert result.stderr.count("\n") == 1
