"""`wemm doctor`: what is wrong with a checkpoint on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from wemm.cli.options import model_and_engine_options
from wemm.config import EngineConfig
from wemm.progress import terminal_bar


@model_and_engine_options
def doctor(
    image: Annotated[
        Path | None,
        typer.Option("--image", "-i", metavar="FILE", help="A picture for the stages. Default: a bundled one."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The question about it.", show_default=False),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    record_hashes: Annotated[
        bool, typer.Option("--record-hashes", help="Write SHA256SUMS into the directory and stop.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Half the picture's edges, no vision tower in float32, no search for causes, 4 tokens."
        ),
    ] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Search for causes even where the known answers are half right.")
    ] = False,
    canaries: Annotated[
        bool, typer.Option("--canaries/--no-canaries", help="Ask about bundled pictures with known answers.")
    ] = True,
    numerics: Annotated[
        bool, typer.Option("--numerics/--no-numerics", help="Load the engine and compare it with float32.")
    ] = True,
    *,
    engine: EngineConfig,
) -> None:
    """Check a checkpoint stage by stage on this machine: files, tensors, PLoRA, tokenizer, numerics, answers.

    Exit status 0 if all is sound, warnings allowed; 1 if something is wrong, and the last line names the likely
    cause.

    Example: wemm doctor /data/WeMM-Chat-2k-CN --dtype bfloat16
    """
    from wemm.doctor.doctor import Examination, examine, model_directory
    from wemm.doctor.files import SUMS_NAME
    from wemm.doctor.files import record_hashes as record
    from wemm.doctor.report import as_json, print_report

    if record_hashes:
        directory = model_directory(engine)
        print(f"{directory / SUMS_NAME}: {record(directory, terminal_bar)} files")
        return
    wanted = Examination(image, prompt, quick, thorough, canaries, numerics)
    report = examine(engine, wanted, terminal_bar)
    if json_output:
        print(json.dumps(as_json(report), ensure_ascii=False))
    else:
        print_report(report)
    if not report.ok:
        raise typer.Exit(1)
