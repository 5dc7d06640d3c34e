"""The program `wemm`: each command builds a config and calls one function.

Exit status 0; 2 with one line `error: …` on stderr for whatever the user can mend; 1 with such a
line for what is not the user's fault; 130 when interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from wemm import __version__
from wemm.cli import batch, bench, chat, convert, doctor, generate, info, quantize, serve
from wemm.cli import eval as evaluation
from wemm.errors import ClientError, WemmError

app = typer.Typer(
    name="wemm",
    help="Inference engine for WeMM-Chat-2k-CN: answers about images, in Chinese and English.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("batch")(batch.batch)
app.command("serve")(serve.serve)
app.command("info")(info.info)
app.command("doctor")(doctor.doctor)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.add_typer(evaluation.app, name="eval")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"wemm {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say on stderr what is being done.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; never raises for a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = get_command(app).main(arguments or ["--help"], prog_name="wemm", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "wemm"
        return _fail(2, f"{error.format_message()} (see {command} --help)")
    except ClientError as error:
        return _fail(2, str(error))
    except WemmError as error:
        return _fail(1, str(error))
    except BrokenPipeError:
        # The reader has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status if isinstance(status, int) else 0


def _fail(status: int, message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
