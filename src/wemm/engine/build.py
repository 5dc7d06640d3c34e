"""EngineConfig → a running engine: find, check, estimate, load, profile, plan."""

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
from wemm.checkpoint.loader import load_dummy_weights, load_weights, weight_bytes
from wemm.config import PRESETS, EngineConfig, ModelConfig, PloraConfig, QuantizationConfig
from wemm.cost import DTYPE_BYTES, MemoryPlan, ProfiledMemory, largest_image, plan_memory, size_text
from wemm.distributed import SINGLE, TensorParallel
from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.engine import Engine
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.memory_profile import LargestStep, largest_step, profile_memory
from wemm.engine.model_runner import ModelRunner, Runner
from wemm.engine.scheduler import Limits
from wemm.engine.worker import Followers, Group, LeaderRunner, follow, leave_group, torchrun_rank
from wemm.errors import CheckpointError, ParameterError, RankError
from wemm.kernels import load_kernels, recorder
from wemm.model.wemm import WemmModel
from wemm.platforms import Platform, resolve_platform
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.processor import Processor, ReadImage, image_reader
from wemm.processing.tokenizer import Tokenizer
from wemm.progress import ProgressBar, silent
from wemm.quantization import INT4_GROUP
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
    quantization: QuantizationConfig
    """How the weights are kept in memory."""


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
    quantization = config.asked_quantization.over(checkpoint.config.quantization)
    return Source(checkpoint.config, checkpoint.plora, checkpoint.dtype, directory, checkpoint, quantization)


def _random_weights(
    model_config: ModelConfig, plora: PloraConfig | None, config: EngineConfig, tokenizer_directory: Path
) -> Source:
    dtype = model_config.dtype or "float32"
    quantization = config.asked_quantization.over(model_config.quantization)
    return Source(model_config, plora if config.plora else None, dtype, tokenizer_directory, None, quantization)


def build_engine(config: EngineConfig, progress: ProgressBar) -> BuiltEngine:
    """Load a model and make it ready. Raises ClientError for whatever the caller can mend.

    With several ranks this is the leader's part, and that of every process that torchrun started: those of
    rank 1 and up serve the leader until it closes, then exit.
    """
    rank = torchrun_rank(config)
    platform = resolve_platform(config.device, None if config.tensor_parallel_size == 1 else rank or 0)
    if rank:
        group = Group(platform.collective_backend, rank, config.tensor_parallel_size, store=None)
        follow(build_rank(config, platform, group), group)
        raise SystemExit(0)
    source = find_source(config)
    tokenizer = Tokenizer(source.tokenizer_directory)
    check(config, source, tokenizer)
    dtype = resolve_dtype(config, source.dtype, platform)
    estimate = _plan(config, source, platform, dtype)
    limits = _limits(config, source, platform, dtype)
    kv_tokens = None if config.kv_cache_memory is None else estimate.kv_tokens
    step = largest_step(limits, estimate.max_model_len, config.num_speculative_tokens, kv_tokens)
    runner, plan = _make_runner(config, source, platform, estimate, step, rank, progress)
    logger.info("%s on %s in %s, max_model_len %d", config.model, platform.device, dtype, plan.max_model_len)
    return BuiltEngine(
        engine=Engine(
            runner,
            tokenizer,
            KVCacheManager(plan.kv_tokens // config.block_size, config.block_size, config.enable_prefix_caching),
            EncoderCache(plan.image_cache),
            limits,
            plan.max_model_len,
            config.num_speculative_tokens,
            is_a_step_ahead(config, platform),
        ),
        processor=make_processor(config, source, tokenizer, plan.max_model_len),
        tokenizer=tokenizer,
        source=source,
        memory_plan=plan,
        default_sampling_params=default_sampling_params(source.tokenizer_directory),
    )


def make_processor(
    config: EngineConfig,
    source: Source,
    tokenizer: Tokenizer,
    max_model_len: int,
    read_image: ReadImage | None = None,
) -> Processor:
    """The door for prompts; images are read in the calling thread unless `read_image` does it."""
    read_image = read_image or image_reader(ImageProcessor(source.config), config.reference_image_mode)
    return Processor(tokenizer, read_image, max_model_len - 1, source.config.text.vocab_size)


def is_a_step_ahead(config: EngineConfig, platform: Platform) -> bool:
    """Whether the engine launches a step while the one before is computed."""
    return platform.computes_beside_cpu if config.async_scheduling is None else config.async_scheduling


def _make_runner(
    config: EngineConfig,
    source: Source,
    platform: Platform,
    estimate: MemoryPlan,
    step: LargestStep,
    rank: int | None,
    progress: ProgressBar,
) -> tuple[Runner, MemoryPlan]:
    """The runner, and how the memory was shared out in the end."""
    size, dtype = config.tensor_parallel_size, estimate.dtype
    # Whoever uses torchrun places its processes.
    shares = platform.cpu_shares(size) if rank is None else [None] * size
    followers = Followers(config, shares[1:]) if size > 1 and rank is None else None
    try:
        platform.occupy(shares[0])
        group = None
        if size > 1:
            group = Group(platform.collective_backend, 0, size, followers.store if followers else None)
            group.send("load", dtype, step)
        tensor_parallel = group.tensor_parallel if group else SINGLE
        model = _load_model(config, source, platform, dtype, tensor_parallel, progress)
        profiled = _profile(config, source, platform, dtype, model, step, group)
        plan = estimate
        if profiled is not None:
            plan = _plan(config, source, platform, dtype, profiled)
            sizes = size_text(plan.activations), size_text(plan.kv_cache), plan.kv_tokens
            logger.info("profiled: activations %s; leaves a KV cache of %s, %d tokens", *sizes)
        num_blocks = plan.kv_tokens // config.block_size
        if group is not None:
            group.send("build", num_blocks)
        runner = _runner(config, source, platform, dtype, model, num_blocks, tensor_parallel)
        return (LeaderRunner(runner, group, followers) if group else runner), plan
    except BaseException as error:
        # A connection breaks when a follower dies.
        lost = followers.blame(error) if followers is not None and isinstance(error, RuntimeError) else None
        if followers is not None:
            followers.stop()
        leave_group()
        platform.release()
        if lost is not None:
            raise RankError(lost) from error
        raise


def build_rank(config: EngineConfig, platform: Platform, group: Group) -> ModelRunner:
    """A follower's share of the model, sized as the leader says."""
    _, (dtype, step) = group.receive()
    source = find_source(config)
    model = _load_model(config, source, platform, dtype, group.tensor_parallel, silent)
    _profile(config, source, platform, dtype, model, step, group)
    _, (num_blocks,) = group.receive()
    return _runner(config, source, platform, dtype, model, num_blocks, group.tensor_parallel)


def _profile(
    config: EngineConfig,
    source: Source,
    platform: Platform,
    dtype: str,
    model: WemmModel,
    step: LargestStep,
    group: Group | None,
) -> ProfiledMemory | None:
    """Of the rank that has the least room for its caches, on every rank."""
    dtypes = _dtypes(config, dtype)
    profiled = profile_memory(step, model, source.config, platform, *dtypes, config.block_size)
    if profiled is None or group is None:
        return profiled
    return min(group.gather(profiled), key=lambda rank: rank.free - rank.activations)


def _dtypes(config: EngineConfig, dtype: str) -> tuple[torch.dtype, torch.dtype]:
    """Of the model, and of keys and values."""
    return getattr(torch, dtype), getattr(torch, config.kv_dtype(dtype))


def _runner(
    config: EngineConfig,
    source: Source,
    platform: Platform,
    dtype: str,
    model: WemmModel,
    num_blocks: int,
    tensor_parallel: TensorParallel,
) -> ModelRunner:
    is_eager = config.enforce_eager or config.tensor_parallel_size > 1
    return ModelRunner(
        model,
        source.config,
        platform,
        *_dtypes(config, dtype),
        num_blocks,
        config.block_size,
        None if is_eager else recorder(platform.device.type),
        tensor_parallel,
    )


def check(config: EngineConfig, source: Source, tokenizer: Tokenizer) -> None:
    """What can be known before weights are read. Raises CheckpointError, ParameterError."""
    text, size = source.config.text, config.tensor_parallel_size
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
    for name in ("num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(text, name) % size:
            raise ParameterError(
                f"tensor_parallel_size {size} must divide {name} {getattr(text, name)} of the model; "
                "use fewer ranks"
            )
    if source.config.quantization.language == "int4":
        for name in ("hidden_size", "intermediate_size"):
            if getattr(text, name) % (size * INT4_GROUP) and size > 1:
                raise ParameterError(
                    f"tensor_parallel_size {size}: groups of {INT4_GROUP} of an int4 checkpoint cannot be shared, "
                    f"{name} is {getattr(text, name)}; use fewer ranks, or the float checkpoint with "
                    "--quantization int4"
                )


def resolve_dtype(config: EngineConfig, declared: str, platform: Platform) -> str:
    """The dtype to compute in, for a checkpoint that declares one."""
    return platform.preferred_dtype(declared) if config.dtype == "auto" else config.dtype


def run_dtype(config: EngineConfig) -> str:
    """The same for a model that is not loaded. Raises what finding it raises."""
    if config.dtype != "auto":
        return config.dtype
    return resolve_dtype(config, find_source(config).dtype, resolve_platform(config.device))


def _plan(
    config: EngineConfig, source: Source, platform: Platform, dtype: str, profiled: ProfiledMemory | None = None
) -> MemoryPlan:
    """An estimate, which refuses what cannot fit before it is loaded; then by what was `profiled`."""
    size, available = config.tensor_parallel_size, platform.available_memory()
    if available is not None and platform.ranks_share_memory:
        available //= size
    with torch.device("meta"):
        rank = WemmModel(source.config, source.plora, TensorParallel(0, size), source.quantization)
    return plan_memory(
        source.config,
        weight_bytes(rank, getattr(torch, dtype)),
        dtype,
        available,
        config.max_model_len,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_num_batched_patches or platform.max_num_batched_patches(),
        config.block_size,
        config.kv_cache_memory,
        config.image_cache_memory,
        size,
        source.quantization,
        config.kv_dtype(dtype),
        profiled,
    )


def _load_model(
    config: EngineConfig,
    source: Source,
    platform: Platform,
    dtype: str,
    tensor_parallel: TensorParallel,
    progress: ProgressBar,
) -> WemmModel:
    load_kernels(platform.device.type)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = WemmModel(source.config, source.plora, tensor_parallel, source.quantization)
    with progress("loading weights", weight_bytes(model, torch_dtype), "bytes") as advance:
        if source.checkpoint is not None:
            load_weights(model, source.checkpoint, torch_dtype, platform.device, tensor_parallel, advance)
        else:
            load_dummy_weights(model, torch_dtype, platform.device, config.seed, advance)
    return model


def _limits(config: EngineConfig, source: Source, platform: Platform, dtype: str) -> Limits:
    largest = largest_image(source.config)
    embed_bytes = source.config.text.hidden_size * DTYPE_BYTES[dtype]
    patches = config.max_num_batched_patches or platform.max_num_batched_patches()
    return Limits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_batched_patches=patches,
        # Where images are small, as many go together as a step has time for.
        max_image_patches=max(largest.num_patches, patches),
        num_vision_layers=source.config.vision.num_hidden_layers,
        embed_bytes_per_token=embed_bytes,
        embed_bytes_per_call=-(-max(largest.num_patches, patches) // largest.num_patches)
        * largest.num_tokens
        * embed_bytes,
    )
