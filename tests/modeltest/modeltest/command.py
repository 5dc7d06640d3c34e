"""The command line: modeltest, model_test and model-test, or `python -m modeltest`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from modeltest.config_files import TOOL_DIRECTORY, ModelSettings, TaskSettings, read_model, read_task
from modeltest.precision import Options, run
from modeltest.result_files import RESULT_HEADER, Place, result_row
from wemm.errors import ClientError, WemmError
from wemm.progress import terminal_bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Run once. Exit status 0; 2 and one line `error: …` for what the user can mend; 1 for the rest; 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    given = _parser().parse_args(arguments)
    try:
        _run(given)
    except WemmError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ClientError) else 1
    except KeyboardInterrupt:
        print("interrupted: answers so far are kept; the same command goes on with them", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modeltest", description="Accuracy of a model on a data set.")
    add = parser.add_argument
    add("--model_config_path", type=Path, required=True, help="YAML file, as config/model/wemm.yaml")
    add("--task_config_path", type=Path, required=True, help="YAML file, as config/task/textvqa.yaml")
    add("--batch_size", type=int, help="questions under way at once; answers are the same for every number")
    add("--tp", type=int, help="ranks: 1, 2, 4 or 8; default: the model file's tp")
    add("--output_dir", default="", help=f"where results go; default: {TOOL_DIRECTORY / 'outputs'}")
    add("--save_debug_enable", action="store_true", help="also write every question with its answer")
    add("--lcoc_disable", action="store_true", help="accepted, without a meaning here")
    add("--limit", type=int, help="only the first questions, this many")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on with a run that was begun; keep a finished one"
    )
    again.add_argument("--overwrite", action="store_true", help="start again, also where a run was begun")
    return parser


def _run(given: argparse.Namespace) -> None:
    model, task = read_model(given.model_config_path), read_task(given.task_config_path)
    for name in ("batch_size", "tp"):
        if getattr(given, name) is not None:
            model = replace(model, **{name: getattr(given, name)})
    options = Options(
        output=Path(given.output_dir) if given.output_dir else TOOL_DIRECTORY / "outputs",
        limit=given.limit,
        resume=given.resume,
        overwrite=given.overwrite,
        debug=given.save_debug_enable,
    )
    _print_settings(model, task)
    evaluation, place = run(model, task, options, terminal_bar)
    _print_result(evaluation.summary, task, place)


def _print_settings(model: ModelSettings, task: TaskSettings) -> None:
    for title, settings in (("model", model), ("task", task)):
        _print_grid(title, ("key", "value"), [[key, value] for key, value in asdict(settings).items()])


def _print_result(summary: Any, task: TaskSettings, place: Place) -> None:
    row = [f"{v:.4f}" if isinstance(v, float) else v for v in result_row(summary, task.shots)]
    _print_grid(f"{summary['scoring']} scoring", RESULT_HEADER, [row])
    if summary["num_errors"]:
        print(f"{summary['num_errors']} questions had no answer; samples.jsonl says why", file=sys.stderr)
    print(place.result_csv)


def _print_grid(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, title=title, box=box.ASCII_DOUBLE_HEAD)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=max(100, Console().width), markup=False).print(table)
