"""`wemm serve`: the HTTP service."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from wemm.cli.options import ServeOptions, serve_options
from wemm.errors import ParameterError
from wemm.progress import terminal_bar
from wemm.server.config import ServerConfig


@serve_options(ServerConfig)
def serve(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="A MindIE service file, config.json; options given here win."
        ),
    ] = None,
    engine_name: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="wemm|vllm",
            help="vllm: the server of vLLM with this model, its own options behind -- (docs/scaling.md).",
        ),
    ] = "wemm",
    rest: Annotated[list[str] | None, typer.Argument(metavar="[-- VLLM_OPTIONS]", show_default=False)] = None,
    *,
    options: ServeOptions,
) -> None:
    """Serve a model over HTTP, to OpenAI, MindIE, TGI and Triton clients.

    Example: wemm serve --model nano --port 8000
    """
    if engine_name == "vllm":
        _serve_by_vllm(config, options.given(context), rest or [])
        return
    if engine_name != "wemm":
        raise ParameterError(f"--engine must be wemm or vllm. Given: {engine_name!r}")
    if rest:
        raise ParameterError(f"{rest[0]!r}: only --engine vllm takes options behind --")
    try:
        import fastapi  # noqa: F401
    except ImportError:
        raise ParameterError("wemm serve needs fastapi and uvicorn: pip install 'wemm[server]'") from None
    from wemm.server.logs import set_up_logs
    from wemm.server.serve import run

    server_values, engine_values = _read(config)
    server = _with_keys_of_environment(options.server(ServerConfig, context, server_values))
    engine = options.engine(context, engine_values)
    set_up_logs(server.log_level)
    run(server, engine, terminal_bar, _announce)


def _serve_by_vllm(config: Path | None, given: dict[str, object], rest: Sequence[str]) -> None:
    if config is not None:
        raise ParameterError("--config is read by our own engine; give --engine vllm its options one by one")
    from wemm.integrations.vllm.serve import command_line, run

    keys = [key for key in os.environ.get("WEMM_API_KEY", "").split(",") if key]
    if keys and "api_key" not in given:
        if len(keys) > 1:
            raise ParameterError(f"WEMM_API_KEY holds {len(keys)} keys; vLLM reads one from the environment")
        os.environ["VLLM_API_KEY"] = keys[0]
    run(command_line(given, rest))


def _read(path: Path | None) -> tuple[dict[str, object], dict[str, object]]:
    if path is None:
        return {}, {}
    from rich.console import Console

    from wemm.server.mindie.config_file import read_config_file, report_table

    file = read_config_file(path)
    Console(stderr=True).print(report_table(file.report))
    return file.server, file.engine


def _with_keys_of_environment(server: ServerConfig) -> ServerConfig:
    # Not as options of typer: its help would show the value.
    keys = [key for key in os.environ.get("WEMM_API_KEY", "").split(",") if key]
    admin_key = server.admin_key or os.environ.get("WEMM_ADMIN_KEY") or None
    return replace(server, api_key=[*server.api_key, *keys], admin_key=admin_key)


def _announce(urls: Sequence[str]) -> None:
    print(f"listening on {' '.join(urls)}", file=sys.stderr, flush=True)
