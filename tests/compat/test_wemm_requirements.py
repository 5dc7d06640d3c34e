"""The requirements file of the original's name says what the package says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_requirements_are_the_packages_and_yaml():
    lines = (ROOT / "requirements/models/requirements_wemm.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject, re.M | re.S)[1]
    assert required == [*re.findall(r'"([^"]+)"', block), "PyYAML>=6"]
