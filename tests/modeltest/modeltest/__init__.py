"""The original's accuracy tool, over `wemm.evaluation`: its commands, its YAML files, its result files."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[3] / "src"
_installed = find_spec("wemm")

if (_installed is None or _installed.origin is None) and _SOURCE.is_dir():
    # The clone's own, where only its requirements are installed.
    sys.path.append(str(_SOURCE))
