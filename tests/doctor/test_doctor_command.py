"""`wemm doctor`: what is printed, the JSON object and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import typer
from typer.main import get_command

from wemm.cli.doctor import doctor
from wemm.errors import ClientError

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "shapes.png"
BASE = ["--device", "cpu", "--dtype", "float32"]

SCHEMA = {
    "type": "object",
    "required": ["model", "directory", "dtype", "device", "ok", "likely_cause", "causes", "checks"],
    "additionalProperties": False,
    "properties": {
        "model": {"type": "string"},
        "directory": {"type": "string"},
        "dtype": {"enum": ["float32", "bfloat16", "float16", "unknown"]},
        "device": {"type": "string"},
        "ok": {"type": "boolean"},
        "likely_cause": {"type": ["string", "null"]},
        "causes": {"type": "array", "items": {"type": "string"}},
        "checks": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "status", "detail", "cause", "figures"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "status": {"enum": ["ok", "warn", "fail", "skipped"]},
                    "detail": {"type": "string"},
                    "cause": {"type": ["string", "null"]},
                    "figures": {"type": "object"},
                },
            },
        },
    },
}


@pytest.fixture
def run(capsys):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(doctor)

    def call(*arguments):
        status = get_command(app).main([str(a) for a in (*BASE, *arguments)], standalone_mode=False)
        captured = capsys.readouterr()
        return status or 0, captured.out, captured.err

    return call


def _no_constants(text):
    raise AssertionError(f"{text} is not JSON")


def test_a_sound_checkpoint(run):
    status, out, err = run("nano")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "sound"
    for word in ("files", "PLoRA", "tokenizer", "canaries", "decoder layer 3", "relative", "cosine", "logits"):
        assert word in out


def test_the_last_line_names_the_likely_cause(run, patient):
    (patient / "tokenizer.model").write_bytes(b"not a tokenizer")
    status, out, _ = run(patient, "--quick")
    assert status == 1
    assert out.splitlines()[-1].startswith("likely cause: ")
    assert "tokenizer.model: not a SentencePiece model" in out.splitlines()[-1]


@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_the_json_object(run, model):
    status, out, err = run(model, "--json", "--quick")
    report = json.loads(out, parse_constant=_no_constants)
    jsonschema.validate(report, SCHEMA)
    assert err == ""
    assert status == (0 if report["ok"] else 1)
    assert report["ok"] == (model == "nano")
    assert report["likely_cause"] == next(iter(report["causes"]), None)
    assert "NaN" not in out


def test_what_is_not_finite_is_null_in_json(run, patient, rewrite):
    rewrite(lambda t: t["language_model.output.weight"].fill_(float("nan")))
    status, out, _ = run(patient, "--json", "--quick")
    report = json.loads(out, parse_constant=_no_constants)
    assert status == 1
    assert "NaN or Inf in language_model.output.weight" in report["likely_cause"]


def test_a_picture_and_question_of_ones_own(run):
    status, out, _ = run("nano", "-i", PICTURE, "-p", "How many circles are there?", "--json", "--no-canaries")
    report = json.loads(out)
    checks = {check["name"]: check for check in report["checks"]}
    assert status == 0
    assert checks["first tokens"]["figures"]["text"] == "3"
    assert checks["canaries"]["status"] == "skipped"
    assert "answers" not in checks


def test_quick_does_not_repeat_the_tower(run):
    report = json.loads(run("nano", "--json", "--quick")[1])
    [stages] = [check["figures"] for check in report["checks"] if check["name"] == "stages"]
    assert stages["tower_compared"] is False
    assert stages["stages"][0]["name"] == "embedded prompt"


def test_without_plora_the_answers_are_bad_and_the_report_says_why(run):
    status, out, _ = run("nano", "--no-plora", "--no-numerics")
    assert status == 1
    assert out.splitlines()[-1] == "likely cause: PLoRA is turned off: run without --no-plora"


def test_no_numerics_loads_no_engine(run):
    report = json.loads(run("nano", "--json", "--no-numerics")[1])
    assert [check["name"] for check in report["checks"] if check["status"] == "skipped"] == ["stages"]


def test_record_hashes(run, patient):
    status, out, _ = run(patient, "--record-hashes")
    assert status == 0
    assert out == f"{patient / 'SHA256SUMS'}: 6 files\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano", "--load-format", "dummy"], "has no files to check"),
        (["wemm-chat-2k-cn"], "has no files to check"),
        (["nano", "--image", "absent.png"], "--image absent.png"),
        (["no-such-model"], "no model 'no-such-model'"),
        (["nano", "--device", "toaster"], "device 'toaster' cannot be used"),
    ],
)
def test_mistakes_of_the_caller_are_errors_not_reports(run, arguments, message):
    with pytest.raises(ClientError, match=message):
        run(*arguments)
