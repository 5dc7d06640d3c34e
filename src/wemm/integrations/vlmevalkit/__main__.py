"""`python -m wemm.integrations.vlmevalkit MODEL …` is VLMEvalKit's `run.py …` that knows our model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wemm.config import engine_config
from wemm.errors import ClientError, ParameterError
from wemm.integrations.vlmevalkit import INSTALL, register

ANSWER_OPTIONS = ("max_tokens", "interleave")
"""Options of our class that are not the engine's."""


def main(arguments: Sequence[str]) -> int:
    """Register MODEL, then run the kit with the remaining arguments. Returns the exit status."""
    given, remaining = _parser().parse_known_args(arguments)
    try:
        options = _options(given.model, dict(_option(text) for text in given.option))
        script = _run_script()
        name = given.name or ("wemm" if "base_url" in options else Path(given.model).name)
        register(name, **options)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv = [str(script), *remaining, "--model", name]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wemm.integrations.vlmevalkit",
        description="VLMEvalKit's run.py with WeMM among its models; further options are run.py's own.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="checkpoint directory, hub id or bundled name; or an endpoint, http://…/v1")
    parser.add_argument("--name", help="what the results are called; by default as the checkpoint is, or wemm")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the model; repeatable"
    )
    return parser


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ParameterError(f"--option takes NAME=VALUE. Given: {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _options(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of our class. The kit hides an error of its models in a log, so options are checked here."""
    if model.startswith(("http://", "https://")):
        return {"base_url": model, **options}
    engine_config(model, {name: value for name, value in options.items() if name not in ANSWER_OPTIONS})
    return {"model": model, **options}


def _run_script() -> Path:
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or spec.origin is None:
        raise ParameterError(f"VLMEvalKit is not installed; {INSTALL}")
    script = Path(spec.origin).parents[1] / "run.py"
    if not script.is_file():
        raise ParameterError(f"no {script}: run.py lies beside the package in a checkout only; {INSTALL}")
    return script


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
