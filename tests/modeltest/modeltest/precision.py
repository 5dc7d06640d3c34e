"""One accuracy run: settings of both files → the engine, the evaluation, the files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from modeltest.config_files import DTYPES, ModelSettings, TaskSettings
from modeltest.result_files import (
    DEBUG_HEADER,
    RESULT_HEADER,
    Case,
    Place,
    debug_row,
    result_row,
    write_csv,
    write_debug_text,
)
from wemm.config import EngineConfig
from wemm.evaluation.run import Evaluation, TextVqaSettings
from wemm.processing.chat_template import Control, Message, Text, render
from wemm.processing.processor import IMAGE_TOKEN_ID
from wemm.processing.tokenizer import Tokenizer
from wemm.progress import ProgressBar
from wemm.request import SamplingParams

_DEVICES = {"cuda": "GPU"}


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    output: Path
    limit: int | None = None
    resume: bool = False
    overwrite: bool = False
    debug: bool = False


def run(
    model: ModelSettings, task: TaskSettings, options: Options, progress: ProgressBar
) -> tuple[Evaluation, Place]:
    """Ask, score, write. An answer is the likeliest token after the other, as in the original.

    Raises ClientError; answers are kept then, and the same call goes on with them.
    """
    for name, value in model.env.items():
        os.environ.setdefault(name, value)
    from wemm.batch.engine_client import EngineClient
    from wemm.engine.llm import LLM
    from wemm.evaluation.run import evaluate
    from wemm.evaluation.textvqa import load_samples

    settings, sampling = _settings(model, task, options), _sampling(model, task)
    load_samples(settings.data, settings.limit)  # mistakes must not cost the loading
    engine = _engine(model, task)
    place = _place(model, task, options, engine)
    with LLM(progress=progress, **vars(engine)) as llm:
        _forget_finished(options)
        asked = {"model": engine.model, "dtype": engine.dtype}
        evaluation = evaluate(EngineClient(llm), settings, sampling, asked, progress)
    write_csv(place.result_csv, RESULT_HEADER, [result_row(evaluation.summary, task.shots)])
    if options.debug:
        cases = list(_cases(evaluation, settings, sampling, engine))
        write_debug_text(place.debug_text(datetime.now()), cases)
        write_csv(place.debug_csv, DEBUG_HEADER, [debug_row(case) for case in cases])
    return evaluation, place


def input_token_ids(tokenizer: Tokenizer, messages: list[Message], image_tokens: int) -> list[int]:
    """As the engine makes them of a conversation with one image, without opening it."""
    ids = [tokenizer.bos_id]
    for segment in render(messages):
        if isinstance(segment, Control):
            ids.append(tokenizer.control_ids[segment.name])
        elif isinstance(segment, Text):
            ids += tokenizer.encode(segment.text)
        else:
            ids += [IMAGE_TOKEN_ID] * image_tokens
    return ids


def _settings(model: ModelSettings, task: TaskSettings, options: Options) -> TextVqaSettings:
    return TextVqaSettings(
        data=task.local_dataset_path,
        output=options.output,
        scoring=task.scoring,
        prompt_prefix=model.prompt_prefix,
        prompt_suffix=model.prompt_suffix,
        limit=options.limit,
        resume=not options.overwrite,
        overwrite=options.overwrite,
    )


def _sampling(model: ModelSettings, task: TaskSettings) -> SamplingParams:
    longest = min(model.max_output_length, task.requested_max_output_length)
    return SamplingParams(max_tokens=longest, ignore_eos=model.ignore_eos)


def _engine(model: ModelSettings, task: TaskSettings) -> EngineConfig:
    from wemm.engine.build import find_source

    config = EngineConfig(
        model=model.model_path,
        dtype=DTYPES[model.data_type],
        tensor_parallel_size=model.tp,
        max_num_seqs=model.batch_size,
        block_size=model.block_size,
    )
    longest = model.max_position_embedding
    if longest < 0:
        known = find_source(config).config.text.max_position_embeddings
        longest = min(known, task.requested_max_input_length + task.requested_max_output_length)
    return replace(config, max_model_len=longest)


def _place(model: ModelSettings, task: TaskSettings, options: Options, engine: EngineConfig) -> Place:
    from wemm.engine.build import run_dtype
    from wemm.platforms import resolve_platform

    device = resolve_platform(engine.device).device.type
    data_type = next(name for name, ours in DTYPES.items() if ours == run_dtype(engine))
    return Place(
        output=options.output,
        device=_DEVICES.get(device, device.upper()),
        data_type=data_type,
        task_name=task.task_name,
        model_name=model.model_name,
        batch_size=model.batch_size,
        tp=model.tp,
    )


def _forget_finished(options: Options) -> None:
    """A finished run is asked again, as the original does; one that was begun goes on."""
    if not options.resume and not options.overwrite:
        for name in ("samples.jsonl", "summary.json"):
            (options.output / name).unlink(missing_ok=True)


def _cases(
    evaluation: Evaluation, settings: TextVqaSettings, sampling: SamplingParams, engine: EngineConfig
) -> Iterator[Case]:
    from wemm.engine.build import find_source

    tokenizer = Tokenizer(find_source(engine).tokenizer_directory)
    for sample, answer, score in zip(evaluation.samples, evaluation.answers, evaluation.scores, strict=True):
        messages = list(settings.question(sample, sampling).messages)
        failed = answer.error is not None
        yield Case(
            key=sample.question_id,
            image=sample.image_path,
            query=messages[-1]["content"][-1]["text"],
            answer=answer,
            score=getattr(score, settings.scoring),
            references=sample.references,
            input_token_ids=[] if failed else input_token_ids(tokenizer, messages, answer.image_tokens),
        )
