"""EngineConfig → a running engine: find, check, plan, load."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from wemm.checkpoint.adapter import configured_plora
from wemm.checkpoint.checkpoint import (
    BUNDLED_DIRECTORY,
    Checkpoint,
    default_sampling_params,
    is_preset,
    locate,
    open_checkpoint,
    read_config,
)
from wemm.checkpoint.loader import load_dummy_weights, load_weights
from wemm.checkpoint.weight_map import expected_tensors
from wemm.config import PRESETS, EngineConfig, ModelConfig, PloraConfig
from wemm.cost import MemoryPlan, count_parameters, plan_memory
from wemm.engine.engine import Engine
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.model_runner import ModelRunner
from wemm.errors import CheckpointError, ParameterError
from wemm.kernels import load_kernels
from wemm.model.wemm import WemmModel
from wemm.platforms import resolve_platform
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.processor import Processor
from wemm.processing.tokenizer import Tokenizer
from wemm.progress import ProgressBar
from wemm.request import SamplingParams

logger = logging.getLogger(__name__)

_DUMMY_TOKENIZER = BUNDLED_DIRECTORY / "tiny"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: files, or an architecture to be filled with random weights."""

    config: ModelConfig
    plora: PloraConfig | None
    dtype: str
    tokenizer_directory: Path
    checkpoint: Checkpoint | None
    """None for random weights."""


@dataclass(frozen=True)
class BuiltEngine:
    """Everything a door needs."""

    engine: Engine
    processor: Processor
    tokenizer: Tokenizer
    source: Source
    memory_plan: MemoryPlan
    default_sampling_params: SamplingParams


def find_source(config: EngineConfig) -> Source:
    """Locate and check the model without reading weights. Raises CheckpointError, ModelNotFoundError."""
    if is_preset(config.model):
        if config.load_format != "dummy":
            raise ParameterError(
                f"{config.model!r} is a preset without weights: add --load-format dummy, or give a directory"
            )
        model_config, preset_plora = PRESETS[config.model]
        return _random_weights(model_config, preset_plora, config, _DUMMY_TOKENIZER)
    directory = locate(config.model)
    if config.load_format == "dummy":
        model_config = read_config(directory)
        plora = configured_plora(directory, model_config)
        if plora is None and config.plora:
            raise CheckpointError(
                f"{directory}: no PLoRA rank in its files; add adapter_config.json or use --no-plora"
            )
        return _random_weights(model_config, plora, config, directory)
    checkpoint = open_checkpoint(directory, config.plora)
    return Source(checkpoint.config, checkpoint.plora, checkpoint.dtype, directory, checkpoint)


def _random_weights(
    model_config: ModelConfig, plora: PloraConfig | None, config: EngineConfig, tokenizer_directory: Path
) -> Source:
    dtype = model_config.dtype or "float32"
    return Source(model_config, plora if config.plora else None, dtype, tokenizer_directory, None)


def build_engine(config: EngineConfig, progress: ProgressBar) -> BuiltEngine:
    """Load a model and make it ready. Raises ClientError for whatever the caller can mend."""
    platform = resolve_platform(config.device)
    source = find_source(config)
    tokenizer = Tokenizer(source.tokenizer_directory)
    text = source.config.text
    if tokenizer.vocab_size > text.vocab_size or max(tokenizer.control_ids.values()) >= text.vocab_size:
        raise CheckpointError(
            f"{source.tokenizer_directory}: the tokenizer has ids beyond vocab_size {text.vocab_size} "
            "of config.json"
        )
    if config.max_model_len is not None and not 2 <= config.max_model_len <= text.max_position_embeddings:
        raise ParameterError(
            f"max_model_len must be in [2, {text.max_position_embeddings}], the positions the model knows. "
            f"Given: {config.max_model_len}"
        )
    dtype = platform.preferred_dtype(source.dtype) if config.dtype == "auto" else config.dtype
    num_parameters = sum(count_parameters(expected_tensors(source.config, source.plora).values()).values())
    plan = plan_memory(
        source.config,
        num_parameters,
        dtype,
        platform.available_memory(),
        config.max_model_len,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.block_size,
        config.kv_cache_memory,
    )
    logger.info("%s on %s in %s, max_model_len %d", config.model, platform.device, dtype, plan.max_model_len)
    load_kernels(platform.device.type)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = WemmModel(source.config, source.plora)
    with progress("loading weights", plan.weights, "bytes") as advance:
        if source.checkpoint is not None:
            load_weights(model, source.checkpoint, torch_dtype, platform.device, advance=advance)
        else:
            load_dummy_weights(model, torch_dtype, platform.device, config.seed, advance=advance)
    num_blocks = plan.kv_tokens // config.block_size
    return BuiltEngine(
        engine=Engine(
            ModelRunner(model, source.config, platform, torch_dtype, num_blocks, config.block_size),
            tokenizer,
            KVCacheManager(num_blocks, config.block_size),
            plan.max_model_len,
            config.max_num_seqs,
            config.max_num_batched_tokens,
        ),
        processor=Processor(
            tokenizer,
            ImageProcessor(source.config),
            plan.max_model_len - 1,
            text.vocab_size,
            config.reference_image_mode,
        ),
        tokenizer=tokenizer,
        source=source,
        memory_plan=plan,
        default_sampling_params=default_sampling_params(source.tokenizer_directory),
    )
