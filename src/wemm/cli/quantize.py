"""`wemm quantize`: a checkpoint whose weights take a half or a quarter of the space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wemm.progress import terminal_bar


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory, hub id or bundled name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    scheme: Annotated[
        str | None,
        typer.Option(help="int8 or int4: how the decoder's weights are stored.", show_default=False),
    ] = None,
    vision_scheme: Annotated[
        str | None,
        typer.Option(help="int8: the same for the vision tower. Default: not quantised.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of all that is not quantised: float16, bfloat16 or float32. Default: the source's own.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is already there.")] = False,
) -> None:
    """Quantise a checkpoint ahead of time, so that it loads as fast as the disk reads.

    PLoRA, embeddings, norms, the output head and the downsampler keep their precision. Every command can quantise
    while it loads, too (--quantization), and then reads the float weights each time. DST appears complete or not
    at all; its files carry the scheme and a SHA-256 of their tensors, which `wemm doctor` checks.

    Example: wemm quantize feipengma/WeMM-Chat-2k-CN ./wemm-int4 --scheme int4
    """
    from wemm.checkpoint.checkpoint import locate
    from wemm.checkpoint.convert import convert
    from wemm.config import QuantizationConfig
    from wemm.errors import ParameterError

    wanted = QuantizationConfig(scheme, vision_scheme)
    if not wanted:
        raise ParameterError("give --scheme int8 or int4, or --vision-scheme int8: nothing to quantise otherwise")
    written = convert(locate(source), target, dtype, force, terminal_bar, wanted)
    print(
        f"{written.directory}: {wanted}; {written.num_tensors} tensors in {written.num_shards} shards, "
        f"{written.num_bytes / 1e9:.3f} GB, verified"
    )
