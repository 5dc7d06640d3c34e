"""The original's result files, below the working directory: predict_result.json and wemm_performance.csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from wemm.errors import StorageError
from wemm.request import RequestOutput

DIRECTORY = Path("examples/models/wemm")
PREDICTIONS = DIRECTORY / "predict_result.json"
PERFORMANCE = DIRECTORY / "wemm_performance.csv"

HEADER = (
    "batch",
    "input_len",
    "output_len",
    "embedding_len",
    "fisrt_token_time(ms)",  # the original's spelling, by which readers find it
    "non_first_token_time(ms)",
    "ResponseTime(ms)",
    "E2E Throughput Average(Tokens/s)",
)


@dataclass(frozen=True)
class PerformanceRow:
    """One run. Lengths are the first request's, times are medians."""

    batch: int
    input_len: int
    """Tokens of the text alone."""
    output_len: int
    embedding_len: int
    """Tokens of the whole prompt, those of the image included."""
    first_token_ms: float
    """From the question to its first token."""
    non_first_token_ms: float
    """Per token after the first."""
    response_ms: float
    """Of a batch, from its questions to its last token."""
    prefill_ms: float
    """Image and prompt of a request through the model."""

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput], batch_seconds: Sequence[float], batch: int) -> PerformanceRow:
        """From answers that all succeeded."""
        first = outputs[0]
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        metrics = [output.metrics for output in outputs]
        return cls(
            batch=batch,
            input_len=len(first.prompt_token_ids) - first.num_image_tokens,
            output_len=lengths[0],
            embedding_len=len(first.prompt_token_ids),
            first_token_ms=1e3 * median(m.first_token for m in metrics),
            non_first_token_ms=1e3
            * median(m.decode / max(1, length - 1) for m, length in zip(metrics, lengths, strict=True)),
            response_ms=1e3 * median(batch_seconds),
            prefill_ms=1e3 * median(m.vision + m.prefill for m in metrics),
        )

    @property
    def throughput(self) -> float:
        """Tokens of answers per second."""
        return self.batch * self.output_len / (self.response_ms / 1e3)

    def cells(self) -> list[str]:
        """In the order of HEADER."""
        lengths = (self.batch, self.input_len, self.output_len, self.embedding_len)
        times = (self.first_token_ms, self.non_first_token_ms, self.response_ms, self.throughput)
        return [*map(str, lengths), *(f"{value:.3f}" for value in times)]

    def benchmark_line(self) -> str:
        """The times on one line."""
        return (
            f"Prefill time: {self.prefill_ms:.3f}ms, Prefill average time: {self.prefill_ms / self.batch:.3f}ms, "
            f"Decode token time: {self.non_first_token_ms:.3f}ms, E2E time: {self.response_ms:.3f}ms"
        )

    def benchmark_table(self) -> str:
        """The row as a table in Markdown."""
        rows = (HEADER, ["---"] * len(HEADER), self.cells())
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def merge_predictions(answers: Mapping[str, str], file: Path = PREDICTIONS) -> None:
    """Add {image path: answer} to what the file has, sorted by path. Raises StorageError."""
    merged = {**_read_predictions(file), **answers}
    text = json.dumps(dict(sorted(merged.items())), ensure_ascii=False, indent=2)
    new = file.with_name(f"{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        new.touch(mode=0o600)  # answers are nobody else's business
        new.write_text(f"{text}\n", encoding="utf-8")
        new.replace(file)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from None


def append_performance(row: PerformanceRow, file: Path = PERFORMANCE) -> None:
    """Add a line, below a header if the file is new. Raises StorageError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+", encoding="utf-8", newline="") as lines:
            lines.seek(0)
            header = next(csv.reader(lines), None)
            if header is not None and tuple(name.strip() for name in header) != HEADER:
                raise StorageError(f"{file} has other columns: move it away")
            writer = csv.writer(lines, lineterminator="\n")
            if header is None:
                writer.writerow(HEADER)
            writer.writerow(row.cells())
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from None


def _read_predictions(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{file} cannot be read: {error}; move it away") from None
    if not isinstance(known, dict):
        raise StorageError(f"{file} is no object of answers by image path: move it away")
    return known
