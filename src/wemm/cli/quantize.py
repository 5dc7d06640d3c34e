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
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Fit int4 to what the model is shown: an image, a folder of them or a JSONL file as `wemm batch` "
            "reads it; repeat for several.",
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One a line, for images to calibrate on. Default: a few built in."),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(metavar="N", help="At most so many pairs of image and question.")
    ] = 128,
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

    With --calibrate, int4 loses less: GPTQ rounds each weight so that the outputs for those images and questions
    change least. One decoder layer at a time is in memory in full.

    Example: wemm quantize feipengma/WeMM-Chat-2k-CN ./wemm-int4 --scheme int4 --calibrate ./photos
    """
    from functools import partial

    from wemm.batch.inputs import read_prompts
    from wemm.calibration.calibrate import calibrate as calibrate_checkpoint
    from wemm.calibration.samples import QUESTIONS, sample_prompts
    from wemm.checkpoint.checkpoint import locate, open_checkpoint
    from wemm.checkpoint.convert import convert
    from wemm.config import QuantizationConfig
    from wemm.errors import ParameterError
    from wemm.platforms import resolve_platform

    wanted = QuantizationConfig(scheme, vision_scheme)
    if not wanted:
        raise ParameterError("give --scheme int8 or int4, or --vision-scheme int8: nothing to quantise otherwise")
    if questions and not calibrate:
        raise ParameterError(
            f"--questions are asked of images to calibrate on: give --calibrate. Given: {questions}"
        )
    directory, calibrator = locate(source), None
    if calibrate:
        asked = read_prompts(questions) if questions else QUESTIONS
        prompts = sample_prompts(open_checkpoint(directory), calibrate, asked, calibration_samples)
        platform = resolve_platform("auto")
        calibrator = partial(
            calibrate_checkpoint, prompts=prompts, platform=platform, dtype=dtype, progress=terminal_bar
        )
    written = convert(directory, target, dtype, force, terminal_bar, wanted, calibrator)
    how = f"{wanted} ({written.calibration})" if written.calibration else str(wanted)
    print(
        f"{written.directory}: {how}; {written.num_tensors} tensors in {written.num_shards} shards, "
        f"{written.num_bytes / 1e9:.3f} GB, verified"
    )
