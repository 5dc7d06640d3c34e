"""What a checkpoint and an image cost, in closed form: one model is known exactly.

FLOPs count a multiply and an add as two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from wemm.checkpoint.weight_map import TensorSpec, expected_tensors, part_of
from wemm.config import PLORA_LINEARS, UNQUANTIZED, ModelConfig, PloraConfig, QuantizationConfig
from wemm.errors import InsufficientMemoryError
from wemm.processing.image_processor import ImagePlan, ImageProcessor
from wemm.quantization import KV_SCALE_BYTES

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def count_parameters(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Parameters by part (vision_tower, downsampler, separators, language_model, plora)."""
    counts: Counter[str] = Counter()
    for spec in specs:
        if spec.is_scale:
            continue
        size = 1
        for length in spec.shape:
            size *= length
        counts[part_of(spec.name)] += size
    return dict(counts)


def stored_bytes(specs: Iterable[TensorSpec], dtype: str) -> int:
    """Of tensors in memory, those that are not quantised in `dtype`."""
    total = 0
    for spec in specs:
        size = spec.own_dtype.itemsize if spec.own_dtype else DTYPE_BYTES[dtype]
        total += math.prod(spec.stored_shape) * size
    return total


def decode_bytes(config: ModelConfig, dtype: str, quantization: QuantizationConfig = UNQUANTIZED) -> int:
    """Weights that a decode step reads: the language model's; of its embeddings, a row."""
    specs = expected_tensors(config, None, quantization).values()
    read = (spec for spec in specs if part_of(spec.name) == "language_model" and "tok_embeddings" not in spec.name)
    return stored_bytes(read, dtype)


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Key and value of one token in every layer, in a dtype or int8 with its scales."""
    text = config.text
    per_head = text.head_dim + KV_SCALE_BYTES if dtype == "int8" else text.head_dim * DTYPE_BYTES[dtype]
    return 2 * text.num_hidden_layers * text.num_key_value_heads * per_head


@dataclass(frozen=True)
class ImageCost:
    """One image through the model, before any text."""

    plan: ImagePlan
    kv_bytes: int
    tower_flops: int
    tower_attention_flops: int
    """Part of tower_flops."""
    downsampler_flops: int
    prefill_flops: int
    """Language model with PLoRA over the image tokens."""


def image_cost(config: ModelConfig, plora: PloraConfig | None, width: int, height: int, dtype: str) -> ImageCost:
    """Cost of an image from its width and height alone."""
    plan = ImageProcessor(config).plan(width, height)
    vision, down = config.vision, config.downsampler
    per_patch = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    embedding = vision.num_channels * vision.patch_size**2 * vision.hidden_size
    attention = 4 * plan.num_patches**2 * vision.hidden_size * vision.num_hidden_layers
    tower = 2 * plan.num_patches * (per_patch * vision.num_hidden_layers + embedding) + attention
    num_grid = plan.token_grid[0] * plan.token_grid[1]
    group = down.kernel_size**2 * down.visual_hidden_size * down.llm_hidden_size
    return ImageCost(
        plan=plan,
        kv_bytes=plan.num_tokens * kv_bytes_per_token(config, dtype),
        tower_flops=tower,
        tower_attention_flops=attention,
        downsampler_flops=2 * num_grid * (group + (down.depth - 1) * down.llm_hidden_size**2),
        prefill_flops=prefill_flops(config, plora, plan.num_tokens, plan.num_tokens),
    )


def prefill_flops(config: ModelConfig, plora: PloraConfig | None, num_tokens: int, num_image_tokens: int) -> int:
    """Language model over a prompt, logits of the last token included."""
    text = config.text
    shapes = {
        "attention.wqkv": (text.wqkv_out, text.hidden_size),
        "attention.wo": (text.hidden_size, text.hidden_size),
        "feed_forward.w1": (text.intermediate_size, text.hidden_size),
        "feed_forward.w3": (text.intermediate_size, text.hidden_size),
        "feed_forward.w2": (text.hidden_size, text.intermediate_size),
    }
    base = sum(rows * columns for rows, columns in shapes.values())
    low_rank = sum((sum(shapes[name]) * plora.rank(name)) for name in PLORA_LINEARS) if plora else 0
    causal_attention = 2 * num_tokens * (num_tokens + 1) * text.hidden_size
    per_layer = 2 * num_tokens * base + 2 * num_image_tokens * low_rank + causal_attention
    return per_layer * text.num_hidden_layers + 2 * text.vocab_size * text.hidden_size


def largest_image(config: ModelConfig) -> ImagePlan:
    """The most any image can cost; the vision tower takes no more patches than this at once."""
    edge = max(config.image.fixed_size or (config.image.longest_edge,))
    return ImageProcessor(config).plan(edge, edge)


def activation_bytes(
    config: ModelConfig, max_num_batched_tokens: int, max_num_batched_patches: int, dtype: str
) -> int:
    """Largest working set of a step, estimated: one vision-tower call, or one prefill."""
    size, vision, text = DTYPE_BYTES[dtype], config.vision, config.text
    tower = max(largest_image(config).num_patches, max_num_batched_patches) * (
        2 * vision.intermediate_size * size + vision.hidden_size * (6 * size + 8)
    )
    prefill = max_num_batched_tokens * (3 * text.intermediate_size * 4 + text.hidden_size * (6 * size + 8))
    return max(tower, prefill)


@dataclass(frozen=True)
class MemoryPlan:
    """How the memory of a device is meant to be used, in bytes."""

    dtype: str
    weights: int
    activations: int
    kv_cache: int
    kv_tokens: int
    """Tokens the KV cache holds."""
    max_model_len: int
    image_cache: int
    available: int | None
    reserve: int = 0
    """Left to what no profile shows."""


@dataclass(frozen=True)
class ProfiledMemory:
    """What the device of one rank told when the largest step had run on it, in bytes."""

    free: int
    """Beside the weights, by the driver."""
    activations: int
    """The step took so much at its peak."""
    max_model_len: int
    """The longest sequence it had."""


_MIN_MODEL_LEN = 2048
_IMAGE_CACHE = 2**28
_LEAST_RESERVE, _RESERVED_PART = 2**29, 50
"""Decode graphs, which are recorded while requests are served, and gaps in what the allocator holds: of what is
available a fiftieth, and no less than 512 MiB."""


def plan_memory(
    config: ModelConfig,
    weights: int,
    dtype: str,
    available: int | None,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_num_batched_patches: int,
    block_size: int,
    kv_cache_memory: int | None,
    image_cache_memory: int | None = 0,
    num_ranks: int = 1,
    quantization: QuantizationConfig = UNQUANTIZED,
    kv_dtype: str | None = None,
    profiled: ProfiledMemory | None = None,
) -> MemoryPlan:
    """Size the caches of one rank, and max_model_len if it is open. Raises InsufficientMemoryError with the plan.

    `weights` (bytes), `available` and the memory options are those of one of `num_ranks` ranks. Activations are
    estimated, and the KV cache may have half of what they leave. If they were `profiled`, it may have all but a
    reserve, and what is available is what was free then and the weights that are there already.
    """
    longest = max_model_len or config.text.max_position_embeddings
    least = max_model_len or min(_MIN_MODEL_LEN, config.text.max_position_embeddings)
    if profiled is None:
        activations = activation_bytes(config, max_num_batched_tokens, max_num_batched_patches, dtype)
        reserve, share = 0, 2
    else:
        available, longest = profiled.free + weights, min(longest, profiled.max_model_len)
        activations, share = profiled.activations, 1
        # Who says how large the KV cache is has thought of the rest.
        reserve = max(_LEAST_RESERVE, available // _RESERVED_PART) if kv_cache_memory is None else 0
    image_cache = image_cache_memory
    if image_cache is None:
        image_cache = _IMAGE_CACHE if available is None else min(_IMAGE_CACHE, available // 16)
    taken = weights + activations + image_cache + reserve
    per_block = kv_bytes_per_token(config, kv_dtype or dtype) * block_size // num_ranks
    wanted_blocks = -(-longest // block_size) * max_num_seqs
    least_blocks = -(-least // block_size)
    if kv_cache_memory is not None:
        num_blocks = kv_cache_memory // per_block
        if num_blocks < least_blocks:
            raise InsufficientMemoryError(
                f"kv_cache_memory {size_text(kv_cache_memory)} holds {num_blocks * block_size} tokens, but one "
                f"sequence of {least} needs {size_text(least_blocks * per_block)}; raise --kv-cache-memory "
                "or lower --max-model-len"
            )
    elif available is None:
        num_blocks = wanted_blocks
    else:
        num_blocks = min(wanted_blocks, max((available - taken) // share // per_block, least_blocks))
    plan = MemoryPlan(
        dtype=dtype,
        weights=weights,
        activations=activations,
        kv_cache=num_blocks * per_block,
        kv_tokens=num_blocks * block_size,
        max_model_len=min(longest, num_blocks * block_size),
        image_cache=image_cache,
        available=available,
        reserve=reserve,
    )
    if available is not None and taken + plan.kv_cache > available:
        raise InsufficientMemoryError(_refusal(plan, available, quantization, profiled is not None))
    return plan


def _refusal(plan: MemoryPlan, available: int, quantization: QuantizationConfig, is_profiled: bool) -> str:
    """The plan, and what would make it fit."""
    dtype = plan.dtype
    weights, activations, kv_cache, image_cache, reserve = map(
        size_text, (plan.weights, plan.activations, plan.kv_cache, plan.image_cache, plan.reserve)
    )
    stored = f"{dtype}; {quantization}" if quantization else dtype
    smaller = " use --dtype bfloat16," if dtype == "float32" else ""
    smaller = smaller or ("" if quantization.language == "int4" else " use --quantization int4,")
    lower = "--max-model-len or --kv-cache-memory"
    if is_profiled:
        lower = "--max-model-len, --kv-cache-memory or --max-num-batched-tokens"
    needed = plan.weights + plan.activations + plan.kv_cache + plan.image_cache + plan.reserve
    return (
        f"not enough memory: weights {weights} ({stored}) + activations {activations}"
        f"{' (profiled)' if is_profiled else ''} + KV cache {kv_cache} ({plan.kv_tokens} tokens) + image cache "
        f"{image_cache}{f' + reserve {reserve}' if plan.reserve else ''} = {size_text(needed)}, but "
        f"{size_text(available)} are available;{smaller} lower {lower}, or use a larger machine"
    )


def size_text(num_bytes: int) -> str:
    """Bytes as people write them."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
