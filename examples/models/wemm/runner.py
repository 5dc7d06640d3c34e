"""The original's arguments and printed lines: every image of a directory is asked one text.

Image i is asked text i; a list of texts that is shorter goes on with its last one.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from examples.models.wemm.result_files import PerformanceRow, append_performance, merge_predictions
from wemm.batch.question import user_turn
from wemm.config import EngineConfig
from wemm.errors import ClientError, ParameterError, WemmError
from wemm.processing.media import image_file
from wemm.request import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from wemm.engine.llm import LLM

_DEFAULT_TEXT = "Explain the details in the image."
_WARM_UP_TOKENS = 2
_WITHOUT_EFFECT = {
    "num_beams": 1, "temperature": 1.0, "top_k": 1, "top_p": 0.0, "length_penalty": 1.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
"""Sampling arguments of the original and their defaults. Like the original, always take the likeliest token."""


@dataclass(frozen=True)
class Item:
    """One image and what it is asked."""

    path: str
    """The directory as given, and the name."""
    text: str


@dataclass(frozen=True)
class Run:
    """Everything asked once: what came of each item, in order, and the seconds of each batch."""

    outputs: Sequence[RequestOutput]
    batch_seconds: Sequence[float]

    @property
    def num_tokens(self) -> int:
        """Of all answers, the end token of each included."""
        return sum(_num_tokens(output) for output in self.outputs)


def main() -> int:
    """Parse, run, write. Returns the exit status; 1 if an image had no answer, 130 when interrupted."""
    arguments = _parser().parse_args()
    try:
        return _run(arguments)
    except WemmError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ClientError) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask WeMM-Chat-2k-CN about every image of a directory.")
    add = parser.add_argument
    add("--model_path", default="", help="checkpoint directory, or the bundled nano")
    add("--image_or_video_path", default="/image/path", help="directory of images")
    add("--input_texts_for_image", nargs="+", default=[_DEFAULT_TEXT], metavar="TEXT", help="questions")
    add("--prediction_result", action="store_true", help="merge the answers into predict_result.json")
    add("--performance", action="store_true", help="append a row to wemm_performance.csv; fills up the last batch")
    add("--max_position_embeddings", type=_optional_int, help="tokens of prompt and answer together at most")
    add("--max_input_length", type=int, default=4096, help="tokens of a prompt that memory is kept for")
    add("--max_output_length", type=int, default=256, help="tokens of an answer at most")
    add("--max_prefill_tokens", type=int, default=-1, help="tokens computed in one step; -1: the engine's choice")
    add("--max_batch_size", type=int, default=1, help="images asked about at once")
    add("--block_size", type=int, default=128, help="tokens per KV cache block")
    add("--ignore_eos", action="store_true", help="go on after the end token")
    add("--skip_special_tokens", action="store_true", help="leave control tokens out of the answers")
    add("--trust_remote_code", action="store_true", help="accepted; no code of a checkpoint is ever run")
    add("--lora_adapter_id", default="wemm", help="accepted; PLoRA is always applied to image tokens")
    add("--tp", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="ranks: 1, 2, 4 or 8")
    for name, default in _WITHOUT_EFFECT.items():
        add(f"--{name}", type=type(default), default=default, help="accepted, without effect")
    return parser


def _optional_int(text: str) -> int | None:
    return None if text == "None" else int(text)


def _run(arguments: argparse.Namespace) -> int:
    _warn_of_sampling(arguments)
    items = read_items(arguments.image_or_video_path, arguments.input_texts_for_image)
    if arguments.performance:
        items = filled_up(items, arguments.max_batch_size)
    engine = engine_config(arguments)
    sampling = SamplingParams(
        max_tokens=arguments.max_output_length,
        ignore_eos=arguments.ignore_eos,
        skip_special_tokens=arguments.skip_special_tokens,
        repetition_guard=False,
    )
    from wemm.engine.llm import LLM
    from wemm.progress import terminal_bar

    with LLM(progress=terminal_bar, **vars(engine)) as llm:
        _warm_up(llm, items[0], engine.max_num_seqs)
        run = _ask_all(llm, items, sampling, engine.max_num_seqs)
    _print_answers(run)
    if arguments.performance:
        _report_performance(run, engine.max_num_seqs)
    if arguments.prediction_result:
        answered = zip(items, run.outputs, strict=True)
        merge_predictions({item.path: output.outputs[0].text for item, output in answered if not output.error})
    return _report_errors(items, run)


def read_items(directory: str, texts: Sequence[str]) -> list[Item]:
    """Images by name, each with its text; what is no image is skipped with a warning. Raises ParameterError."""
    if not Path(directory).is_dir():
        raise ParameterError(f"--image_or_video_path must be a directory of images. Given: {directory!r}")
    names = [path.name for path in sorted(Path(directory).iterdir()) if _is_image(path)]
    if not names:
        raise ParameterError(f"{directory} has no images")
    if len(texts) > len(names):
        raise ParameterError(
            f"input_text length must equal input_images length: {len(texts)} texts, {len(names)} images"
        )
    texts = [*texts, *[texts[-1]] * (len(names) - len(texts))]
    start = directory if directory.endswith("/") else f"{directory}/"
    return [Item(start + name, text) for name, text in zip(names, texts, strict=True)]


def filled_up(items: Sequence[Item], batch: int) -> list[Item]:
    """The last item again until the last batch is whole: another size of batch would be another measurement."""
    return [*items, *[items[-1]] * (-len(items) % max(1, batch))]


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The engine without caches and guesses: every answer pays for itself. Raises ClientError."""
    from wemm.engine.build import find_source

    if not arguments.model_path:
        raise ParameterError("--model_path is empty: give the directory of the checkpoint")
    config = EngineConfig(
        model=arguments.model_path,
        tensor_parallel_size=arguments.tp,
        max_num_seqs=arguments.max_batch_size,
        block_size=arguments.block_size,
        enable_prefix_caching=False,
        image_cache_memory=0,
        num_speculative_tokens=0,
    )
    if arguments.max_prefill_tokens > 0:
        config = replace(config, max_num_batched_tokens=arguments.max_prefill_tokens)
    longest = arguments.max_position_embeddings
    if longest is None:
        known = find_source(config).config.text.max_position_embeddings
        longest = min(known, arguments.max_input_length + arguments.max_output_length)
    return replace(config, max_model_len=longest)


def _is_image(path: Path) -> bool:
    try:
        image_file(path)
    except ClientError as error:
        print(f"warning: skipped: {error}", file=sys.stderr)
        return False
    return True


def _warn_of_sampling(arguments: argparse.Namespace) -> None:
    given = [name for name, default in _WITHOUT_EFFECT.items() if getattr(arguments, name) != default]
    if given:
        names = ", ".join(f"--{name}" for name in given)
        print(f"warning: {names}: without effect, the likeliest token is taken always", file=sys.stderr)


def _warm_up(llm: LLM, item: Item, batch: int) -> None:
    print("---------------begin warm_up---------------")
    params = SamplingParams(max_tokens=_WARM_UP_TOKENS, ignore_eos=True)
    for _ in llm.chat_as_completed([user_turn(item.text, [item.path])] * batch, params):
        pass  # an image that has no answer gets its line later
    print(f"warmup_memory(GB): {_peak_memory() / 2**30:.2f}")
    print("---------------end warm_up---------------")


def _peak_memory() -> int:
    """Bytes: of the accelerator where there is one, else of this process."""
    import torch

    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _ask_all(llm: LLM, items: Sequence[Item], sampling: SamplingParams, batch: int) -> Run:
    print("---------------begin inference---------------")
    print(f"------total req num: {len(items)}, infer start--------")
    outputs: list[RequestOutput] = []
    seconds = []
    for i, first in enumerate(range(0, len(items), batch)):
        print(f"current iter: {i}", flush=True)
        conversations = [user_turn(item.text, [item.path]) for item in items[first : first + batch]]
        started = time.perf_counter()
        done = dict(llm.chat_as_completed(conversations, sampling))
        seconds.append(time.perf_counter() - started)
        outputs += [done[place] for place in range(len(conversations))]
    print("---------------end inference---------------")
    return Run(outputs, seconds)


def _num_tokens(output: RequestOutput) -> int:
    return 0 if output.error else len(output.outputs[0].token_ids)


def _print_answers(run: Run) -> None:
    for i, output in enumerate(run.outputs):
        if not output.error:
            print(f"Answer[{i}]: {output.outputs[0].text}")
            print(f"Generate[{i}] token num: {_num_tokens(output)}")
    latency = sum(run.batch_seconds)
    print(f"All Token Nums: {run.num_tokens}")
    print(f"Latency(s): {latency}")
    print(f"E2E_Throughput(tokens/s): {run.num_tokens / latency}")


def _report_performance(run: Run, batch: int) -> None:
    for output in run.outputs:
        if output.error:
            raise output.error
    row = PerformanceRow.of(run.outputs, run.batch_seconds, batch)
    print(row.benchmark_line())
    print(row.benchmark_table())
    append_performance(row)


def _report_errors(items: Sequence[Item], run: Run) -> int:
    failed = [(item, output.error) for item, output in zip(items, run.outputs, strict=True) if output.error]
    for item, error in failed:
        print(f"error: no answer about {item.path}: {error}", file=sys.stderr)
    return 1 if failed else 0
