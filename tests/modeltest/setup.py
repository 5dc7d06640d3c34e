"""Dependencies: the wemm that is installed already, or that of this clone, as no index has it."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from setuptools import setup

# Where it will be installed, which a build apart from it does not import from.
installed = list(Path(sysconfig.get_path("purelib")).glob("wemm-*.dist-info"))
clone = Path(__file__).resolve().parents[2]

setup(install_requires=["wemm" if installed else f"wemm @ {clone.as_uri()}", "PyYAML>=6"])
