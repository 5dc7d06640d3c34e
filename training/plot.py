"""The curves of a run as a picture.

python -m training.plot RUN_DIRECTORY docs/images/nano-training.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from training.tasks import TASKS


def plot(log_file: Path, picture: Path) -> None:
    """Losses above, accuracy on new questions below, over optimiser steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lines: list[dict[str, Any]] = [json.loads(line) for line in log_file.read_text("utf-8").splitlines()]
    checks = [line for line in lines if TASKS[0] in line]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for key, label in (("answer_loss", "answers"), ("patch_loss", "patches")):
        above.plot([line["step"] for line in lines], [line[key] for line in lines], label=label, linewidth=1)
    above.set(yscale="log", ylabel="cross entropy (training)")
    for task in (*TASKS, "patches"):
        style = "--" if task == "patches" else "-"
        below.plot([c["step"] for c in checks], [100 * c[task] for c in checks], style, marker=".", label=task)
    below.set(xlabel="optimiser step", ylabel="right on new images, %", ylim=(0, 101))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(ncols=2, fontsize=8)
    figure.savefig(picture, dpi=110)


def _main(
    run: Annotated[Path, typer.Argument(help="Directory of a training run.")],
    picture: Annotated[Path, typer.Argument(help="PNG to write.")],
) -> None:
    """Draw the loss and accuracy curves of a run."""
    plot(run / "log.jsonl", picture)


if __name__ == "__main__":
    typer.run(_main)
