"""What a checkpoint is (`ModelConfig`, read from its config.json) and how to run it (`EngineConfig`).

Frozen; checked once, here; "auto" values are resolved elsewhere into a new config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from wemm.errors import ConfigError, ParameterError

DTYPES = ("float32", "bfloat16", "float16")

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
class ModelConfig:
    """Everything config.json says about the network."""

    vision: VisionConfig
    downsampler: DownsamplerConfig
    text: TextConfig
    image: ImageConfig
    num_separators: int
    dtype: str | None = None
    """The dtype the files declare, if they do."""
    lora_cfg: PloraConfig | None = None
    """text_config.lora_cfg, used where there is no adapter_config.json."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a parsed config.json; `source` names it in errors. Raises ConfigError."""
        root = _Section(source, "", data)
        model_type = root.text("model_type", "wemm")
        if model_type not in ("wemm", "wemm_hf"):
            raise ConfigError(
                f"{source}: model_type {model_type!r} is not a WeMM checkpoint (wemm or wemm_hf); "
                "point to a directory that holds WeMM-Chat-2k-CN"
            )
        if root.flag("do_image_splitting", False):
            raise ConfigError(
                f"{source}: do_image_splitting true is not supported (the original itself keeps only "
                "the top-left quarter); set it to false"
            )
        config = cls(
            vision=_read_vision(root.section("vision_config")),
            downsampler=_read_downsampler(root.section("downsampler_config")),
            text=_read_text(root.section("text_config")),
            image=_read_image(root.section("image_processor", optional=True)),
            num_separators=root.section("spliter_emb_config").integer("num_embeddings"),
            dtype=_read_dtype(root),
            lora_cfg=_read_lora_cfg(root.section("text_config")),
        )
        separator_dim = root.section("spliter_emb_config").integer("embedding_dim")
        for name, given, expected in (
            ("downsampler_config.visual_hidden_size", config.downsampler.visual_hidden_size,
             config.vision.hidden_size),
            ("downsampler_config.llm_hidden_size", config.downsampler.llm_hidden_size,
             config.text.hidden_size),
            ("spliter_emb_config.embedding_dim", separator_dim, config.text.hidden_size),
        ):  # fmt: skip
            if given != expected:
                raise ConfigError(f"{source}: {name} is {given}, but the part it meets is {expected} wide")
        if config.num_separators < 2:
            raise ConfigError(f"{source}: spliter_emb_config.num_embeddings must be >= 2")
        return config


class _Section:
    """One JSON object of a config file, read key by key with errors that name the key."""

    def __init__(self, source: str, path: str, data: Any) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: {path or 'the file'} must be a JSON object. Given: {data!r}")
        self.source, self.path, self.data = source, path, data

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def fail(self, key: str, rule: str) -> ConfigError:
        return ConfigError(f"{self.source}: {self._name(key)} {rule}. Given: {self.data.get(key)!r}")

    def _get(self, key: str, default: Any) -> Any:
        if self.data.get(key) is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.source}: {self._name(key)} is missing")
            return default
        return self.data[key]

    def section(self, key: str, optional: bool = False) -> _Section:
        data = self._get(key, {} if optional else _REQUIRED)
        return _Section(self.source, self._name(key), data)

    def integer(self, key: str, default: Any = None, maximum: int = 2**20) -> int:
        # Bounded above too: a damaged count of layers must not become a list that fills the memory.
        value = self._get(key, _REQUIRED if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.fail(key, f"must be an integer in [1, {maximum}]")
        return value

    def number(self, key: str, default: Any = None) -> float:
        value = self._get(key, _REQUIRED if default is None else default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.fail(key, "must be a finite number > 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, "must be a string")
        return value

    def expect(self, key: str, allowed: tuple[str, ...]) -> None:
        if self.text(key, allowed[0]) not in allowed:
            raise self.fail(key, f"must be {' or '.join(allowed)}: no other form is known for this model")


_REQUIRED = object()
_MAX_LAYERS = 1024
_MAX_EDGE = 16384


def _read_vision(section: _Section) -> VisionConfig:
    section.expect("hidden_act", ("gelu_pytorch_tanh",))
    vision = VisionConfig(
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size"),
        num_hidden_layers=section.integer("num_hidden_layers", maximum=_MAX_LAYERS),
        num_attention_heads=section.integer("num_attention_heads"),
        image_size=section.integer("image_size"),
        patch_size=section.integer("patch_size"),
        num_channels=section.integer("num_channels", 3),
        layer_norm_eps=section.number("layer_norm_eps", 1e-6),
    )
    if vision.hidden_size % vision.num_attention_heads:
        raise section.fail("hidden_size", f"must be a multiple of {vision.num_attention_heads} heads")
    if vision.num_channels != 3:
        raise section.fail("num_channels", "must be 3: images are RGB")
    if vision.image_size < vision.patch_size:
        raise section.fail("image_size", f"must be at least one patch of {vision.patch_size} pixels")
    return vision


def _read_downsampler(section: _Section) -> DownsamplerConfig:
    section.expect("hidden_act", ("gelu",))
    kernel_size = section.integer("kernel_size")
    if section.integer("stride", kernel_size) != kernel_size:
        raise section.fail("stride", f"must equal kernel_size {kernel_size}")
    return DownsamplerConfig(
        kernel_size=kernel_size,
        visual_hidden_size=section.integer("visual_hidden_size"),
        llm_hidden_size=section.integer("llm_hidden_size"),
        depth=section.integer("depth", 2, maximum=_MAX_LAYERS),
        bias=section.flag("bias", False),
    )


def _read_text(section: _Section) -> TextConfig:
    section.expect("hidden_act", ("silu",))
    if section.flag("bias", False):
        raise section.fail("bias", "must be false: no WeMM checkpoint has biases here")
    if section.flag("tie_word_embeddings", False):
        raise section.fail("tie_word_embeddings", "must be false: the output head has its own weight")
    text = TextConfig(
        vocab_size=section.integer("vocab_size"),
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size"),
        num_hidden_layers=section.integer("num_hidden_layers", maximum=_MAX_LAYERS),
        num_attention_heads=section.integer("num_attention_heads"),
        num_key_value_heads=section.integer("num_key_value_heads"),
        rms_norm_eps=section.number("rms_norm_eps"),
        rope_theta=section.number("rope_theta"),
        max_position_embeddings=section.integer("max_position_embeddings"),
        rope_scaling=_read_rope_scaling(section),
    )
    if text.hidden_size % text.num_attention_heads or text.head_dim % 2:
        raise section.fail("hidden_size", f"must make {text.num_attention_heads} heads of even width")
    if text.num_attention_heads % text.num_key_value_heads:
        raise section.fail("num_attention_heads", f"must be a multiple of {text.num_key_value_heads} KV heads")
    return text


def _read_rope_scaling(section: _Section) -> RopeScaling | None:
    if section.data.get("rope_scaling") is None:
        return None
    scaling = section.section("rope_scaling")
    kind = scaling.text("type", scaling.text("rope_type", ""))
    if kind not in ("linear", "dynamic"):
        raise scaling.fail("type", "must be linear or dynamic")
    return RopeScaling(kind, scaling.number("factor", 1.0))


def _read_image(section: _Section) -> ImageConfig:
    # Only `size` is in force; the original ignores mean, std and resample too (reference 2.2).
    size = section.section("size", optional=True)
    if "height" in size.data or "width" in size.data:
        return ImageConfig(
            fixed_size=(size.integer("height", maximum=_MAX_EDGE), size.integer("width", maximum=_MAX_EDGE))
        )
    edges = size.integer("shortest_edge", 756, _MAX_EDGE), size.integer("longest_edge", 1960, _MAX_EDGE)
    image = ImageConfig(*edges)
    if image.shortest_edge > image.longest_edge:
        raise size.fail("shortest_edge", f"must not exceed longest_edge {image.longest_edge}")
    return image


def _read_dtype(root: _Section) -> str | None:
    # The inner value is the one the original really uses; its README asks for the outer one.
    for section in (root.section("text_config"), root):
        for key in ("torch_dtype", "dtype"):
            name = section.text(key, "").removeprefix("torch.")
            if name in DTYPES:
                return name
    return None


def _read_lora_cfg(text: _Section) -> PloraConfig | None:
    if text.data.get("lora_cfg") is None:
        return None
    lora = text.section("lora_cfg")
    if "lora_r" not in lora.data and "lora_alpha" not in lora.data:
        return None
    return PloraConfig(lora.integer("lora_r"), lora.number("lora_alpha"), source="config.json: lora_cfg")


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


def option(default: Any, text: str) -> Any:
    """A dataclass field whose text is also the `--help` of the command-line option."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. The field texts are the `--help` of every command that loads one."""

    model: str = field(
        metadata={"help": "Checkpoint directory, hub id, bundled name (tiny) or preset (wemm-chat-2k-cn)."}
    )
    dtype: str = option(
        "auto",
        "auto, float32, bfloat16 or float16. auto: the checkpoint's own; on a CPU bfloat16 for float16.",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or any other torch device. auto: cuda if present.")
    tensor_parallel_size: int = option(1, "Ranks that share the weights. Only 1 in this version.")
    max_model_len: int | None = option(
        None, "Tokens of prompt and answer together at most. Default: what the model and the memory allow."
    )
    max_num_seqs: int = option(64, "Sequences computed together at most.")
    max_num_batched_tokens: int = option(
        4096, "Prompt tokens computed in one step at most; a longer prompt takes several steps."
    )
    block_size: int = option(16, "Tokens per KV cache block.")
    kv_cache_memory: int | None = option(
        None,
        "Bytes for the KV cache (4GiB, 512MiB, …). Default: what the sequences need, up to half of what is free.",
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
        if self.load_format not in ("auto", "dummy"):
            raise ParameterError(f"load_format must be auto or dummy. Given: {self.load_format!r}")
        if self.tensor_parallel_size != 1:
            raise ParameterError(
                f"tensor_parallel_size must be 1 in this version. Given: {self.tensor_parallel_size!r}"
            )
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "kv_cache_memory",
        ):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "kv_cache_memory"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParameterError(f"{name} must be an integer >= 1. Given: {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ParameterError(f"seed must be an integer in [0, 2^32). Given: {self.seed!r}")

    @classmethod
    def help(cls) -> dict[str, str]:
        """Field name → text."""
        return {f.name: f.metadata["help"] for f in fields(cls)}


_BYTE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """`4GiB`, `512M`, `1073741824` → bytes. Raises ParameterError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ParameterError(f"a size is written like 4GiB, 512MiB or 1073741824. Given: {text!r}")
    return int(float(match[1]) * _BYTE_UNITS[match[2].upper()])
