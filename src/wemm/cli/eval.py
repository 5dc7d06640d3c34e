"""`wemm eval`: accuracy on a set whose answers are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import typer

from wemm.cli.clients import ClientOptions, client_options
from wemm.cli.options import SamplingOverrides, config_options, sampling_options
from wemm.evaluation.run import TextVqaSettings
from wemm.progress import terminal_bar
from wemm.request import SamplingParams

app = typer.Typer(help="Measure accuracy.", rich_markup_mode=None)


@app.callback()
def _evaluations() -> None:
    """Measure accuracy."""


@app.command()
@sampling_options
@client_options
@config_options(TextVqaSettings, "settings")
def textvqa(*, settings: TextVqaSettings, options: ClientOptions, sampling: SamplingOverrides) -> None:
    """VQA accuracy on TextVQA's files, all questions batched continuously.

    Prints a table with the 95 % interval, then summary.json's content on one line. A question that could not be
    answered is no wrong answer: it is counted as an error and has no score.

    Example: wemm eval textvqa --model nano --data nano_val.jsonl --output out --prompt-suffix ""
    """
    from wemm.batch.journal import check_target
    from wemm.evaluation.run import evaluate
    from wemm.evaluation.textvqa import load_samples

    check_target(settings.samples_file, settings.resume, settings.overwrite)
    load_samples(settings.data, settings.limit)  # mistakes must not cost the loading
    sampling.apply(SamplingParams())
    with options.open() as (client, default):
        params = sampling.apply(default)
        try:
            summary = evaluate(client, settings, params, options.settings, terminal_bar).summary
        except KeyboardInterrupt:
            print(f"{settings.output}: answers so far are kept; go on with --resume", file=sys.stderr)
            raise
    _print(summary)


def _print(summary: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    low, high = summary["interval"]
    table = Table(box=box.SIMPLE_HEAD, title=f"TextVQA, {summary['model']}, {summary['scoring']} scoring")
    columns = ("accuracy", "95 % interval", "questions", "errors", "by the other rules", "seconds")
    for column in columns:
        table.add_column(column, justify="right")
    other = next(value for name, value in summary["accuracies"].items() if name != summary["scoring"])
    table.add_row(
        f"{100 * summary['accuracy']:.2f} %",
        f"{100 * low:.2f} to {100 * high:.2f} %",
        str(summary["num_samples"]),
        str(summary["num_errors"]),
        f"{100 * other:.2f} %",
        f"{summary['seconds']:.1f}",
    )
    Console(width=max(100, Console().width)).print(table)
    if summary["num_errors"]:
        message = f"{summary['num_errors']} questions had no answer: samples.jsonl says why, --resume asks again"
        print(message, file=sys.stderr)
    print(json.dumps(summary, ensure_ascii=False))
