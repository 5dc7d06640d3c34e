"""`wemm batch`: a folder or a JSONL file of images and questions → a JSONL file of answers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from wemm.cli.clients import ClientOptions, client_options
from wemm.cli.options import SamplingOverrides, sampling_options
from wemm.errors import ClientError
from wemm.progress import terminal_bar
from wemm.request import SamplingParams


@sampling_options
@client_options
def batch(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A folder of images, or a JSONL file (see below).", show_default=False),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL file to write.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this of every image.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ask every line of this file of every image, which is encoded once."),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Also the folders in the folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run that ended early stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again, whatever is there.")] = False,
    *,
    options: ClientOptions,
    sampling: SamplingOverrides,
) -> None:
    """Answer many questions, continuously batched; an image that several ask about is encoded once.

    IN is a folder of images, or a JSONL file with {"image": PATH or [PATHS], "prompt": TEXT} or {"messages": […]}
    a line; max_tokens, temperature and the like beside them hold for that line, other keys are passed through.
    OUT has a line per item, in order: the input, text, token_ids, finish_reason, token counts and seconds per
    stage, or error. Until it is complete, answers are kept in OUT.partial: after a kill, --resume asks only what
    is left.

    Example: wemm batch photos/ answers.jsonl --model nano --prompt "What is written here?"
    """
    from wemm.batch.inputs import read_items, read_prompts
    from wemm.batch.journal import check_target
    from wemm.batch.run import run_batch

    check_target(target, resume, overwrite)
    prompts = [*([prompt] if prompt is not None else []), *(read_prompts(questions) if questions else [])]
    read_items(source, prompts, sampling.apply(SamplingParams()), recursive)  # mistakes must not cost the loading
    started = time.perf_counter()
    with options.open() as (client, default):
        items = read_items(source, prompts, sampling.apply(default), recursive)
        try:
            summary = run_batch(client, items, target, options.settings, resume, overwrite, terminal_bar)
        except KeyboardInterrupt:
            print(f"{target}: answers so far are kept; go on with --resume", file=sys.stderr)
            raise
    if summary.num_errors == summary.num_items:
        raise ClientError(f"no item was answered (see {target}); the first: {summary.first_error}")
    if summary.num_errors:
        share = f"{summary.num_errors} of {summary.num_items}"
        print(f"{share} items have an error in {target}; --resume asks them again", file=sys.stderr)
    if sys.stderr.isatty():
        seconds = time.perf_counter() - started
        kept = f", {summary.num_kept} of them from before" if summary.num_kept else ""
        print(f"{summary.num_items} answers{kept} in {seconds:.1f} s: {target}", file=sys.stderr)
