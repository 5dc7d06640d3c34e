"""What a checkpoint is (`ModelConfig`, `PloraConfig`) and how to run it (`EngineConfig`).

Frozen. How config.json spells a ModelConfig is in checkpoint/config_file.py; "auto" values are resolved
in engine/build.py.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wemm.errors import ParameterError

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4")
VISION_QUANTIZATIONS = ("int8",)

PLORA_LINEARS = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
"""The linears of every decoder layer that carry PLoRA, by checkpoint name."""


@dataclass(frozen=True)
class VisionConfig:
    """Idefics2/SigLIP NaViT tower (config.json: vision_config)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head (72 in the real tower)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_grid(self) -> int:
        """Side of the square table of learned positions."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class DownsamplerConfig:
    """k x k convolution with stride k, then depth-1 x [GELU, Linear] (config.json: downsampler_config)."""

    kernel_size: int
    visual_hidden_size: int
    llm_hidden_size: int
    depth: int = 2
    bias: bool = False


@dataclass(frozen=True)
class RopeScaling:
    """`linear` divides positions by factor; `dynamic` acts only beyond max_position_embeddings."""

    type: str
    factor: float


@dataclass(frozen=True)
class TextConfig:
    """InternLM2 (config.json: text_config)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def wqkv_out(self) -> int:
        """Rows of the packed query/key/value projection."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim


@dataclass(frozen=True)
class ImageConfig:
    """Resize rule (config.json: image_processor.size). Edges in pixels."""

    shortest_edge: int = 756
    longest_edge: int = 1960
    fixed_size: tuple[int, int] | None = None
    """(height, width) when the checkpoint asks for exactly one size."""


@dataclass(frozen=True)
class PloraConfig:
    """Rank and scaling of the image-token low-rank updates, and where they were read from."""

    r: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def rank(self, linear: str) -> int:
        """Rank of one linear, by its checkpoint name (`language_model.model.layers.0.attention.wo`)."""
        return _match_pattern(self.rank_pattern, linear, self.r)

    def scaling(self, linear: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        rank = self.rank(linear)
        alpha = _match_pattern(self.alpha_pattern, linear, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _match_pattern(pattern: Mapping[str, Any], linear: str, default: Any) -> Any:
    # PEFT's rule: a key is a regular expression that must match the end of the module's name.
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", linear):
            return value
    return default


@dataclass(frozen=True)
class QuantizationConfig:
    """Which weights are stored in fewer bits (quantization.py); None: in the model's dtype.

    Norms, embeddings, the output head, PLoRA's factors and the downsampler never are.
    """

    language: str | None = None
    """Scheme of the decoder's linears."""
    vision: str | None = None
    """Scheme of the vision tower's linears."""

    def __post_init__(self) -> None:
        for part, given, known in (
            ("quantization", self.language, QUANTIZATIONS),
            ("vision_quantization", self.vision, VISION_QUANTIZATIONS),
        ):
            if given not in (None, *known):
                raise ParameterError(f"{part} must be {' or '.join(known)}. Given: {given!r}")

    def over(self, stored: QuantizationConfig) -> QuantizationConfig:
        """This on top of what a checkpoint already is. Raises ParameterError where it is something else."""
        for option, asked, there in (
            ("quantization", self.language, stored.language),
            ("vision_quantization", self.vision, stored.vision),
        ):
            if asked is not None and there not in (None, asked):
                raise ParameterError(
                    f"{option} {asked!r}: the checkpoint is already quantised to {there}; leave the option out, "
                    "or give the float checkpoint"
                )
        return QuantizationConfig(self.language or stored.language, self.vision or stored.vision)

    def __bool__(self) -> bool:
        return self.language is not None or self.vision is not None

    def __str__(self) -> str:
        parts = {"language model": self.language, "vision tower": self.vision}
        return ", ".join(f"{part} {scheme}" for part, scheme in parts.items() if scheme) or "none"


UNQUANTIZED = QuantizationConfig()


@dataclass(frozen=True)
class ModelConfig:
    """Everything config.json says about the network."""

    vision: VisionConfig
    downsampler: DownsamplerConfig
    text: TextConfig
    image: ImageConfig
    num_separators: int
    dtype: str | None = None
    """The dtype the files declare, if they do."""
    quantization: QuantizationConfig = UNQUANTIZED
    """How the files store weights that were quantised ahead of time."""
    lora_cfg: PloraConfig | None = None
    """text_config.lora_cfg, used where there is no adapter_config.json."""


_WEMM_CHAT_2K_CN = ModelConfig(
    vision=VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=980, patch_size=14,
    ),
    downsampler=DownsamplerConfig(kernel_size=4, visual_hidden_size=1152, llm_hidden_size=4096),
    text=TextConfig(
        vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6,
        max_position_embeddings=32768, rope_scaling=RopeScaling("dynamic", 2.0),
    ),
    image=ImageConfig(),
    num_separators=2,
    dtype="float16",
)  # fmt: skip

PRESETS: Mapping[str, tuple[ModelConfig, PloraConfig]] = {
    "wemm-chat-2k-cn": (_WEMM_CHAT_2K_CN, PloraConfig(512, 512.0, source="preset")),
}
"""Architectures that can be built without files (`--load-format dummy`, `wemm info`)."""


TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


def option(default: Any, text: str) -> Any:
    """A dataclass field whose text is also the `--help` of the command-line option."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. The field texts are the `--help` of every command that loads one."""

    model: str = field(
        metadata={"help": "Checkpoint directory, hub id, bundled name (nano, tiny) or preset (wemm-chat-2k-cn)."}
    )
    dtype: str = option(
        "auto",
        "auto, float32, bfloat16 or float16. auto: the checkpoint's own; on a CPU bfloat16 for float16.",
    )
    quantization: str | None = option(
        None,
        "int8 or int4: how the decoder's weights are kept, PLoRA as it is; float weights are quantised while they "
        "load. Default: as the checkpoint has them.",
    )
    vision_quantization: str | None = option(None, "int8: the same for the vision tower.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, npu or any other torch device. auto: what is present.")
    tensor_parallel_size: int = option(1, "Ranks that share the weights: 1, 2, 4 or 8.")
    max_model_len: int | None = option(
        None, "Tokens of prompt and answer together at most. Default: what the model and the memory allow."
    )
    max_num_seqs: int = option(64, "Sequences computed together at most.")
    max_num_batched_tokens: int = option(
        4096, "Tokens computed in one step at most; a longer prompt takes several steps, decodes go beside it."
    )
    max_num_batched_patches: int | None = option(
        None,
        "Image patches through the vision tower in one step at most; a larger image takes several steps, some "
        "layers in each. Default: 512 on a CPU, else 4096.",
    )
    block_size: int = option(16, "Tokens per KV cache block.")
    kv_cache_memory: int | None = option(
        None,
        "Bytes for the KV cache (4GiB, 512MiB, …). Default: what the sequences need; on a CPU up to half of what "
        "is free, on a GPU or NPU up to what the largest step leaves of it.",
    )
    kv_cache_dtype: str = option(
        "auto", "auto: the model's dtype; int8: half the memory per token of 16 bit, a scale per token and head."
    )
    enable_prefix_caching: bool = option(
        True, "Requests that begin with the same tokens and images share what was computed for them."
    )
    image_cache_memory: int | None = option(
        None,
        "Bytes of visual embeddings kept for images that are asked about again; 0 keeps none. "
        "Default: 256 MiB, at most a sixteenth of what is free.",
    )
    num_speculative_tokens: int = option(
        8,
        "Tokens guessed at most per step from what the prompt and the answer repeat; answers stay the same. "
        "0: none.",
    )
    async_scheduling: bool | None = option(
        None,
        "Prepare a step while the device computes the one before; answers stay the same. Default: on a GPU.",
    )
    enforce_eager: bool = option(
        False, "Run every decode step op by op; otherwise steps of few sequences are recorded once and replayed."
    )
    load_format: str = option("auto", "auto: read the weights; dummy: build the architecture with random weights.")
    seed: int = option(0, "Seed of requests that bring none of their own.")
    plora: bool = option(True, "Apply PLoRA to image tokens. Turning it off changes answers.")
    reference_image_mode: bool = option(
        False, "Treat images exactly as the original: ignore EXIF orientation, drop alpha, clip 16-bit."
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ParameterError(f"dtype must be auto, {', '.join(DTYPES)}. Given: {self.dtype!r}")
        _ = self.asked_quantization  # says what is wrong with it
        if self.kv_cache_dtype not in ("auto", "int8"):
            raise ParameterError(f"kv_cache_dtype must be auto or int8. Given: {self.kv_cache_dtype!r}")
        if self.load_format not in ("auto", "dummy"):
            raise ParameterError(f"load_format must be auto or dummy. Given: {self.load_format!r}")
        if self.tensor_parallel_size not in TENSOR_PARALLEL_SIZES or self.tensor_parallel_size is True:
            raise ParameterError(
                f"tensor_parallel_size must be 1, 2, 4 or 8. Given: {self.tensor_parallel_size!r}"
            )
        for name, least, optional in (
            ("max_model_len", 1, True),
            ("max_num_seqs", 1, False),
            ("max_num_batched_tokens", 1, False),
            ("max_num_batched_patches", 1, True),
            ("block_size", 1, False),
            ("kv_cache_memory", 1, True),
            ("image_cache_memory", 0, True),
            ("num_speculative_tokens", 0, False),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ParameterError(f"{name} must be an integer >= {least}. Given: {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ParameterError(f"seed must be an integer in [0, 2^32). Given: {self.seed!r}")

    def kv_dtype(self, dtype: str) -> str:
        """Of keys and values, for a model in `dtype`."""
        return dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def asked_quantization(self) -> QuantizationConfig:
        """What the options ask for, whatever the checkpoint is. Raises ParameterError."""
        return QuantizationConfig(self.quantization, self.vision_quantization)

    @classmethod
    def help(cls) -> dict[str, str]:
        """Field name → text."""
        return {f.name: f.metadata["help"] for f in fields(cls)}


def engine_config(model: str | Path, options: Mapping[str, Any]) -> EngineConfig:
    """The config of a call like LLM(model, **options). Raises ParameterError for an unknown option."""
    known = EngineConfig.help()
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
            raise ParameterError(f"unknown option {name!r}{hint}")
    return EngineConfig(model=str(model), **options)


_BYTE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """`4GiB`, `512M`, `1073741824` → bytes. Raises ParameterError."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ParameterError(f"a size is written like 4GiB, 512MiB or 1073741824. Given: {text!r}")
    return int(float(match[1]) * _BYTE_UNITS[match[2].upper()])


def format_bytes(size: int) -> str:
    """4294967296 → `4GiB`, in the largest unit that leaves a whole number; `parse_bytes` reads it back."""
    unit = next(u for u in ("T", "G", "M", "K", "") if size % _BYTE_UNITS[u] == 0)
    return f"{size // _BYTE_UNITS[unit]}{unit}iB" if unit else str(size)
