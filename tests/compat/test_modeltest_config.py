"""The YAML files of modeltest: every key of the original is known, every other is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from modeltest.config_files import ModelSettings, read_model, read_task

from modeltest import config_files
from wemm.errors import ParameterError
from wemm.evaluation.run import DEFAULT_SUFFIX

yaml = pytest.importorskip("yaml")

CONFIG = Path(__file__).parents[1] / "modeltest/config"
MODEL_OF_A_SIBLING = """
model_name: wemm
model_path: nano
model_type: pa
data_type: fp16
use_chat_template: True
max_position_embedding: 300
block_size: 64
requested_gpu_framework: Huggingface
trust_remote_code: True
env: {A_NUMBER: 1, A_WORD: on}
mm_model:
  path: wemm
  classname: MultimodalPARunner
  warm_up_input_texts: [a, b]
  warm_up_image_path: [x.jpg]
  prompt_prefix: "Q: "
  prompt_suffix: " short"
  infer_params: {batch_size: 2, max_output_length: 32, ignore_eos: True, max_iters: 1}
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        file = tmp_path / "settings.yaml"
        file.write_text(text)
        return file

    return to_file


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "textvqa_val.jsonl"
    file.write_text("{}\n")
    return file


def test_the_files_of_the_tool_say_what_an_absent_key_means(write, questions):
    model = read_model(CONFIG / "model/wemm.yaml")
    assert model == ModelSettings(model.model_path)
    text = (CONFIG / "task/textvqa.yaml").read_text()
    path = yaml.safe_load(text)["local_dataset_path"]
    task = read_task(write(text.replace(path, str(questions))))
    assert task == read_task(write(f"local_dataset_path: {questions}"))
    assert model.prompt_suffix == DEFAULT_SUFFIX


@pytest.mark.parametrize(
    ("file", "keys"),
    [("model/wemm.yaml", config_files._MODEL_KEYS), ("task/textvqa.yaml", config_files._TASK_KEYS)],
)
def test_the_files_of_the_tool_explain_every_key(file, keys):
    text = (CONFIG / file).read_text()
    for name, kind in keys.items():
        for word in [name, *(kind if isinstance(kind, dict) else ())]:
            assert word in text


def test_every_key_of_the_original_is_accepted(write, caplog):
    settings = read_model(write(MODEL_OF_A_SIBLING))
    assert settings == ModelSettings(
        "nano", "wemm", "fp16", 300, 64, 1, {"A_NUMBER": "1", "A_WORD": "True"}, "Q: ", " short", 2, 32, True
    )
    [record] = caplog.records
    for name in ("model_type", "trust_remote_code", "mm_model.classname", "mm_model.infer_params.max_iters"):
        assert name in record.message


def test_every_key_of_the_task_is_accepted(write, questions, caplog):
    text = f"""
task_type: precision
task_name: textvqa
hf_dataset_path: maoxx241/textvqa_subset
om_dataset_path:
local_dataset_path: {questions}
prompt: ""
choices: []
shots: 0
requested_max_input_length: 100
requested_max_output_length: 20
need_logits: False
need_truncate_input: False
metric: {{metric_type: acc, scoring: modeltest}}
metadata: {{version: 1.0}}
subject_mapping:
"""
    task = read_task(write(text))
    assert (task.requested_max_input_length, task.requested_max_output_length) == (100, 20)
    assert task.scoring == "modeltest"
    [record] = caplog.records
    assert "hf_dataset_path" in record.message
    assert "om_dataset_path" not in record.message  # it has no value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model_path: nano\nmodel_pth: x", "unknown key model_pth; did you mean model_path"),
        ("model_path: nano\nmm_model: {zzz: 1}", r"unknown key mm_model\.zzz; known: "),
        ("model_path: nano\nmm_model: {infer_params: {zzz: 1}}", r"unknown key mm_model\.infer_params\.zzz"),
        ("model_path: nano\n7: x", "unknown key 7"),
        ("model_name: wemm", "model_path is missing"),
        ("model_path: nano\nblock_size: big", "block_size must be a whole number. Given: 'big'"),
        ("model_path: nano\nblock_size: true", "block_size must be a whole number. Given: True"),
        ("model_path: nano\nmm_model: yes", "mm_model must be a map"),
        ("model_path: nano\ndata_type: int8", "data_type must be auto or fp16 or bf16 or fp32. Given: 'int8'"),
        ("model_path: nano\nmodel_name: ../x", "becomes the name of a directory"),
        ("- a", "must be a map"),
        ("", "must be a map"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_mistake_is_named_with_the_file(write, text, complaint):
    with pytest.raises(ParameterError, match=complaint) as refusal:
        read_model(write(text))
    assert "settings.yaml" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("shots: 5", "shots must be 0"),
        ("task_type: performance", "task_type must be precision"),
        ("task_name: vocalsound", "task_name must be textvqa"),
        ("metric: {metric_type: bleu}", "metric_type must be acc"),
        ("metric: {scoring: loose}", "scoring must be official or modeltest"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(write, questions, text, complaint):
    with pytest.raises(ParameterError, match=complaint):
        read_task(write(f"local_dataset_path: {questions}\n{text}"))


def test_the_data_is_a_file_or_a_directory_with_one(write, questions, tmp_path):
    by_directory = read_task(write(f"local_dataset_path: {tmp_path}"))
    assert by_directory.local_dataset_path == questions
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(ParameterError, match="holds 2 JSONL files"):
        read_task(write(f"local_dataset_path: {tmp_path}"))
    with pytest.raises(ParameterError, match="does not exist"):
        read_task(write(f"local_dataset_path: {tmp_path / 'absent.jsonl'}"))


def test_a_relative_path_is_tried_one_directory_up(write, questions, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    found = read_task(write(f"local_dataset_path: {questions.name}")).local_dataset_path
    assert found.samefile(questions)
