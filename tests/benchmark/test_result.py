"""What leaves a benchmark: the machine's facts, tables, one JSON line, files, and refusals before the work."""

from __future__ import annotations

import csv
import json

import pytest

from wemm.benchmark.outputs import Outputs
from wemm.benchmark.report import command_line, finish, write_csv
from wemm.benchmark.result import (
    Result,
    Table,
    _instruction_sets,
    _physical_cores,
    _read_cpuinfo,
    engine_settings,
    environment,
    percentiles,
)
from wemm.config import EngineConfig
from wemm.errors import ParameterError, StorageError
from wemm.platforms import resolve_platform

TABLE = Table("Two rows", ("way", "time (s)"), [("a, b", 0.5), ('say "c"\nd', 1e-9)])


def _result(**changes):
    values = dict(
        benchmark="test", environment={"cpu": "x"}, settings={"model": "nano"}, figures={"seconds": 0.5},
        tables=[TABLE], chart=lambda path: path.write_text("drawn"), notes=["a note"],
    )  # fmt: skip
    return Result(**{**values, **changes})


def test_the_environment_is_complete_and_ready_for_json():
    found = environment(resolve_platform("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == found["cpu"] != ""
    assert found["logical_cores"] >= found["usable_cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["date"][-6] in "+-", "a date without a zone says little"


def test_cores_and_instruction_sets_come_from_cpuinfo(tmp_path):
    core = (
        "processor\t: {0}\nmodel name\t: A CPU\nphysical id\t: 0\ncore id\t: {1}\nflags\t\t: fpu amx_bf16 avx2\n"
    )
    file = tmp_path / "cpuinfo"
    file.write_text("\n".join(core.format(i, i // 2) for i in range(4)) + "\n")
    cpus = _read_cpuinfo(file)
    assert len(cpus) == 4
    assert _physical_cores(cpus) == 2
    assert _instruction_sets(cpus) == ["avx2", "amx_bf16"]


def test_a_system_without_cpuinfo_has_an_environment_too(tmp_path):
    cpus = _read_cpuinfo(tmp_path / "absent")
    assert (cpus, _physical_cores(cpus), _instruction_sets(cpus)) == ([], None, [])


def test_settings_name_what_differs_from_the_default():
    engine = EngineConfig("nano", max_num_seqs=3)
    assert engine_settings(engine, "float32") == {"model": "nano", "dtype": "float32", "max_num_seqs": 3}


@pytest.mark.parametrize(("count", "p95"), [(1, 1), (10, 10), (20, 19), (100, 95), (101, 96)])
def test_percentiles_are_values_that_were_measured(count, p95):
    values = percentiles(list(range(count, 0, -1)))
    assert (values["p95"], values["worst"]) == (p95, count)


def test_csv_comes_back_as_it_was_written(tmp_path):
    file = tmp_path / "table.csv"
    write_csv(file, TABLE)
    with file.open(newline="", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines)
    assert tuple(header) == TABLE.columns
    assert [(name, float(value)) for name, value in rows] == TABLE.rows
    assert file.read_bytes().startswith(b"way,time (s)\r\n")


@pytest.mark.parametrize("given", [["--api-key", "sk-1"], ["--api-key=sk-1"]])
def test_the_command_is_kept_but_for_keys(given):
    shown = command_line(["/bin/wemm", "bench", "serve", *given, "--model", "a b"])
    assert shown.startswith("wemm bench serve --api-key")
    assert shown.endswith("--model 'a b'")
    assert "sk-1" not in shown


def test_a_result_is_tables_then_one_json_line_then_files(tmp_path, capsys):
    outputs = Outputs(csv=tmp_path / "a.csv", plot=tmp_path / "a.svg", report=tmp_path / "a.html")
    outputs.check()
    result = _result()
    finish([result], outputs)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Two rows"
    assert lines[-2] == "a note"
    shown = json.loads(lines[-1])
    assert shown.pop("command").startswith("wemm")
    assert shown == result.line()
    assert list(result.line()) == ["benchmark", "environment", "settings", "seconds"]
    assert (tmp_path / "a.svg").read_text() == "drawn"
    assert "nano" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_several_results_are_one_json_line(capsys):
    finish([_result(), _result(benchmark="other")], Outputs())
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["benchmark"] for result in line["results"]] == ["test", "other"]


def test_a_narrow_terminal_breaks_no_number(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    table = Table("wide", tuple(f"column number {i}" for i in range(12)), [tuple(1e6 + i for i in range(12))])
    finish([_result(tables=[table])], Outputs())
    assert "1,000,000   1,000,001" in capsys.readouterr().out


def test_accuracy_stands_beside_speed_in_the_report(tmp_path):
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"task": "textvqa", "accuracy": 0.875, "num_samples": 8}))
    outputs = Outputs(report=tmp_path / "a.html", accuracy=summary)
    outputs.check()
    finish([_result()], outputs)
    assert "87.5" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    absent = tmp_path / "absent" / "x.csv"
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    page = tmp_path / "a.html"
    cases = [
        (dict(csv=absent), StorageError, f"--csv {absent}: there is no directory {absent.parent}"),
        (dict(csv=tmp_path), StorageError, f"--csv {tmp_path}: is a directory"),
        (dict(plot=tmp_path / "x.xyz"), ParameterError, "the name must end in .png, .svg, .pdf"),
        (dict(report=page, accuracy=tmp_path / "none"), ParameterError, "No such file"),
        (dict(report=page, accuracy=broken), ParameterError, f"--accuracy {broken}:"),
        (dict(accuracy=broken), ParameterError, "add --report"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind) as caught:
            Outputs(**options).check()
        assert message in str(caught.value)


def test_a_directory_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(StorageError, match="cannot be written; give another place"):
        Outputs(csv=tmp_path / "x.csv").check()


@pytest.mark.parametrize(("option", "module"), [("plot", "matplotlib"), ("report", "jinja2")])
def test_an_absent_library_is_named_with_its_remedy(tmp_path, monkeypatch, option, module):
    monkeypatch.setattr("wemm.benchmark.outputs.find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=rf"--{option} needs {module}: pip install 'wemm\[bench\]'"):
        Outputs(**{option: tmp_path / "x.png"}).check()


def test_a_full_disk_costs_no_figure(capsys):
    def fail(path):
        raise OSError(28, "No space left on device")

    from pathlib import Path

    with pytest.raises(StorageError, match=r"--plot x\.png: No space left on device"):
        finish([_result(chart=fail)], Outputs(plot=Path("x.png")))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] == 0.5
