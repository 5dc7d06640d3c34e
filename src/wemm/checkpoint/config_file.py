"""config.json → ModelConfig, key by key, with errors that name the key.

The original reads every language-model field from text_config and ignores most other keys; so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wemm.config import (
    DTYPES,
    QUANTIZATIONS,
    UNQUANTIZED,
    VISION_QUANTIZATIONS,
    DownsamplerConfig,
    ImageConfig,
    ModelConfig,
    PloraConfig,
    QuantizationConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
)
from wemm.errors import ConfigError


def parse_config(data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """A parsed config.json as ModelConfig; `source` names the file in errors. Raises ConfigError."""
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
    config = ModelConfig(
        vision=_read_vision(root.section("vision_config")),
        downsampler=_read_downsampler(root.section("downsampler_config")),
        text=_read_text(root.section("text_config")),
        image=_read_image(root.section("image_processor", optional=True)),
        num_separators=root.section("spliter_emb_config").integer("num_embeddings"),
        dtype=_read_dtype(root),
        lora_cfg=_read_lora_cfg(root.section("text_config")),
        quantization=_read_quantization(root),
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
        if not is_number or not 0 < value < _MAX_NUMBER:
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
_MAX_NUMBER = 1e30
_MAX_EDGE = 16384
_QUANT_METHOD = "wemm"


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


def quantization_section(quantization: QuantizationConfig) -> dict[str, Any]:
    """quantization_config of config.json; `parse_config` reads it back."""
    parts = {"language_model": quantization.language, "vision_tower": quantization.vision}
    return {"quant_method": _QUANT_METHOD, **{part: scheme for part, scheme in parts.items() if scheme}}


def _read_quantization(root: _Section) -> QuantizationConfig:
    if root.data.get("quantization_config") is None:
        return UNQUANTIZED
    section = root.section("quantization_config")
    method = section.text("quant_method", "")
    if method != _QUANT_METHOD:
        raise section.fail(
            "quant_method", f"must be {_QUANT_METHOD}: weights quantised by others are not read; "
            "take the float checkpoint and quantise it by `wemm quantize`",
        )  # fmt: skip
    schemes = {}
    for key, known in (("language_model", QUANTIZATIONS), ("vision_tower", VISION_QUANTIZATIONS)):
        schemes[key] = section.text(key, "") or None
        if schemes[key] not in (None, *known):
            raise section.fail(key, f"must be {' or '.join(known)}")
    return QuantizationConfig(schemes["language_model"], schemes["vision_tower"])
