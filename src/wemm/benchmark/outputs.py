"""Which files a benchmark writes, known to be writable before minutes are spent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wemm.config import option
from wemm.errors import ParameterError, StorageError

_PLOT_TYPES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Outputs:
    """Which files to write: the field texts are the `--help`. `check` them before the measurement."""

    csv: Path | None = option(None, "Also write the table as CSV to this file.")
    plot: Path | None = option(None, "Also draw the result into this file (PNG, SVG, PDF).")
    report: Path | None = option(None, "Also write a page to read in a browser (HTML).")
    accuracy: Path | None = option(None, "summary.json of an evaluation, to stand in the report as well.")

    def check(self) -> None:
        """Refuse what could not be written, before minutes are spent. Raises ParameterError, StorageError."""
        if self.plot is not None:
            if self.plot.suffix.lower() not in _PLOT_TYPES:
                raise ParameterError(f"--plot {self.plot}: the name must end in {', '.join(_PLOT_TYPES)}")
            _require("--plot", "matplotlib")
        if self.report is not None:
            _require("--report", "jinja2")
        if self.accuracy is not None and self.report is None:
            raise ParameterError("--accuracy goes into the report: add --report FILE.html")
        self.read_accuracy()
        for flag, path in (("--csv", self.csv), ("--plot", self.plot), ("--report", self.report)):
            if path is not None:
                _check_writable(flag, path)

    def read_accuracy(self) -> Mapping[str, Any] | None:
        """What stands in the summary. Raises ParameterError."""
        if self.accuracy is None:
            return None
        try:
            summary = json.loads(self.accuracy.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ParameterError(f"--accuracy {self.accuracy}: {error}") from None
        if not isinstance(summary, dict):
            raise ParameterError(f"--accuracy {self.accuracy}: not the summary.json of an evaluation")
        return summary


def _require(flag: str, module: str) -> None:
    if find_spec(module) is None:
        raise ParameterError(f"{flag} needs {module}: pip install 'wemm[bench]'")


def _check_writable(flag: str, path: Path) -> None:
    directory = path.parent
    if not directory.is_dir():
        raise StorageError(f"{flag} {path}: there is no directory {directory}")
    if path.is_dir():
        raise StorageError(f"{flag} {path}: is a directory; give the name of a file")
    if not os.access(path if path.exists() else directory, os.W_OK):
        raise StorageError(f"{flag} {path}: cannot be written; give another place")
