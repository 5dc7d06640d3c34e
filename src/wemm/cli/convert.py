"""`wemm convert`: hub checkpoint → renamed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wemm.progress import terminal_bar


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory, hub id or bundled name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float16, bfloat16 or float32. Default: the source's own.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is already there.")] = False,
) -> None:
    """Write a checkpoint with renamed tensors and every side file the original asks to edit by hand.

    Optional: every command loads a hub checkpoint directly. DST appears complete or not at all.

    Example: wemm convert feipengma/WeMM-Chat-2k-CN ./wemm --dtype bfloat16
    """
    from wemm.checkpoint.checkpoint import locate
    from wemm.checkpoint.convert import convert as convert_checkpoint

    converted = convert_checkpoint(locate(source), target, dtype, force, terminal_bar)
    print(
        f"{converted.directory}: {converted.num_tensors} tensors in {converted.num_shards} shards, "
        f"{converted.num_bytes / 1e9:.3f} GB, verified"
    )
