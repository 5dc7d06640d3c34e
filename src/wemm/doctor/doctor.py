"""The examination: every check in its order, none hiding a later one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wemm.checkpoint.checkpoint import Checkpoint, is_preset, locate, open_checkpoint, read_config
from wemm.config import EngineConfig
from wemm.doctor.canaries import CANARIES, PICTURES
from wemm.doctor.check import FAIL, SKIPPED, WARN, Check, Report
from wemm.doctor.files import check_files, sha256
from wemm.doctor.numerics import check_numerics
from wemm.doctor.reference import Reference
from wemm.doctor.running import run_engine
from wemm.doctor.sense import Search, agrees_with_scaling, check_sense
from wemm.doctor.stages import Precision
from wemm.doctor.tensors import check_inventory, check_plora, check_weights, measure, refused
from wemm.doctor.text import bundled_tokenizers, check_tokenizer
from wemm.engine.build import resolve_dtype
from wemm.errors import CheckpointError, MediaError, ParameterError
from wemm.platforms import resolve_platform
from wemm.processing.chat_template import Message
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.media import open_image
from wemm.processing.processor import Processor, image_reader
from wemm.processing.tokenizer import Tokenizer
from wemm.progress import ProgressBar

_NUM_TOKENS = 16
_NUM_TOKENS_QUICK = 4


@dataclass(frozen=True)
class Examination:
    """What is asked of the doctor besides the engine's options."""

    image: Path | None = None
    """A picture for the stages; default: a bundled one."""
    prompt: str | None = None
    quick: bool = False
    """A coarser picture, the vision tower not repeated in float32, causes not searched."""
    thorough: bool = False
    """Search for causes in large models too, even if the answers are half right."""
    canaries: bool = True
    """Ask about bundled pictures with known answers."""
    numerics: bool = True
    """Load the engine and compare it with the float32 definitions."""


def model_directory(config: EngineConfig) -> Path:
    """The files to examine. Raises ParameterError for a model without files, ModelNotFoundError."""
    if config.load_format == "dummy" or is_preset(config.model):
        raise ParameterError(
            f"{config.model!r} with random weights has no files to check: give a checkpoint directory or hub id"
        )
    return locate(config.model)


def examine(config: EngineConfig, wanted: Examination, progress: ProgressBar) -> Report:
    """Raises ClientError for wrong options or pictures; what is wrong with the model is in the report."""
    directory = model_directory(config)
    platform = resolve_platform(config.device)
    picture = wanted.image or PICTURES / CANARIES[0].picture
    _check_picture(picture)
    checks = [check_files(directory, progress)]
    checkpoint = _open(directory, config, checks)
    dtype = "unknown" if config.dtype == "auto" else config.dtype
    if checkpoint is not None:
        dtype = resolve_dtype(config, checkpoint.dtype, platform)
        statistics = measure(checkpoint, progress)
        checks += [check_weights(statistics, dtype), check_plora(checkpoint, statistics)]
    tokenizer = _tokenizer(directory, checks)
    if checkpoint is not None and tokenizer is not None:
        prompt = wanted.prompt or CANARIES[0].question
        model = _Model(checkpoint, tokenizer, config, dtype, platform.device)
        checks += _sense(model, wanted, checks, progress)
        checks += _numerics(model, _ask(picture, prompt, wanted.quick), wanted, progress)
    else:
        checks += [Check(name, SKIPPED, "not without tensors and tokenizer") for name in ("canaries", "stages")]
    return Report(config.model, str(directory), dtype, str(platform.device), checks)


@dataclass(frozen=True)
class _Model:
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    config: EngineConfig
    dtype: str
    device: torch.device


def _check_picture(picture: Path) -> None:
    try:
        open_image(picture)
    except MediaError as error:
        raise MediaError(f"--image {picture}: {error}") from None


def _open(directory: Path, config: EngineConfig, checks: list[Check]) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(directory, config.plora)
    except CheckpointError as error:
        checks.append(refused(error))
        return None
    checks.append(check_inventory(checkpoint))
    return checkpoint


def _tokenizer(directory: Path, checks: list[Check]) -> Tokenizer | None:
    try:
        check, tokenizer = check_tokenizer(directory, read_config(directory))
    except CheckpointError as error:
        check, tokenizer = Check("tokenizer", SKIPPED, str(error)), None
    checks.append(check)
    return tokenizer


def _ask(picture: Path, prompt: str, quick: bool) -> list[Message]:
    image = {"type": "image", "image": picture, "detail": "low" if quick else "auto"}
    return [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]


def _sense(model: _Model, wanted: Examination, checks: list[Check], progress: ProgressBar) -> list[Check]:
    text, tokenizer = model.checkpoint.config.text, model.tokenizer
    if not wanted.canaries:
        return [Check("canaries", SKIPPED, "--no-canaries")]
    if tokenizer.vocab_size > text.vocab_size or max(tokenizer.control_ids.values()) >= text.vocab_size:
        return [Check("canaries", SKIPPED, "the tokenizer has ids that the model does not know")]
    digest = sha256(model.checkpoint.directory / "tokenizer.model")
    reference = Reference(model.checkpoint, model.device)
    disputed = next((i for i, c in enumerate(checks) if c.figures.get("stated_elsewhere") is not None), None)
    if disputed is not None and agrees_with_scaling(model.checkpoint, reference, tokenizer):
        detail = f"{checks[disputed].detail}; the canaries side with the first"
        checks[disputed] = replace(checks[disputed], status=WARN, detail=detail, cause=None)
    # A cause that was found already makes the answers bad: no need to look for another.
    telling = [c for i, c in enumerate(checks) if c.name in ("weights", "PLoRA", "tokenizer") and i != disputed]
    known = any(check.status == FAIL for check in telling)
    search = Search(
        bundled_tokenizers(text.vocab_size, digest),
        wanted=not known and not wanted.quick,
        thorough=wanted.thorough,
    )
    check = check_sense(model.checkpoint, reference, tokenizer, search, progress)
    return [replace(check, cause=None) if known else check]


def _numerics(
    model: _Model, messages: Sequence[Message], wanted: Examination, progress: ProgressBar
) -> list[Check]:
    if not wanted.numerics:
        return [Check("stages", SKIPPED, "--no-numerics")]
    text = model.checkpoint.config.text
    max_tokens = _NUM_TOKENS_QUICK if wanted.quick else _NUM_TOKENS
    read = image_reader(ImageProcessor(model.checkpoint.config), model.config.reference_image_mode)
    processor = Processor(model.tokenizer, read, text.max_position_embeddings - max_tokens, text.vocab_size)
    prompt = processor.chat(messages)
    canaries_for = model.checkpoint.config if wanted.canaries else None
    run = run_engine(model.config, messages, max_tokens, canaries_for, progress)
    if isinstance(run, Check):
        return [run]
    reference = Reference(model.checkpoint, torch.device("cpu"))
    precision = Precision(model.dtype, model.config.asked_quantization.over(model.checkpoint.config.quantization))
    return check_numerics(run, prompt, reference, model.tokenizer, precision, wanted.quick, progress)
