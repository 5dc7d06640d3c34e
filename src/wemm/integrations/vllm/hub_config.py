"""config.json as vLLM reads it: what it needs to plan memory and caches. The network itself is built from
`ModelConfig`, by the same rules as in our engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from vllm.config import ModelConfig as VllmModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from wemm.checkpoint.config_file import parse_config
from wemm.config import ModelConfig, TextConfig
from wemm.integrations.vllm import ARCHITECTURE, TOKENIZER_MODE

_NARROWEST_HEAD = 32
_OURS = (
    "vision_config",
    "text_config",
    "downsampler_config",
    "spliter_emb_config",
    "image_processor",
    "do_image_splitting",
    "quantization_config",
)


class WemmTextConfig(PreTrainedConfig):
    """The sizes of the decoder."""

    model_type = "wemm_text"

    def __init__(self, **sizes: Any) -> None:
        for name, value in sizes.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=False)


class WemmConfig(PreTrainedConfig):
    """A whole config.json; `model_config` is what our own parser makes of it."""

    model_type = "wemm"

    def __init__(self, **data: Any) -> None:
        self.sections: dict[str, Any] = {key: data.pop(key) for key in _OURS if key in data}
        for name in ("architectures", "auto_map", "model_type"):
            data.pop(name, None)
        super().__init__(architectures=[ARCHITECTURE], **data)
        self.text_config = WemmTextConfig(**_text_sizes(self.model_config.text)) if self.sections else None

    @property
    def model_config(self) -> ModelConfig:
        """Raises ConfigError."""
        return parse_config(self.sections)

    @property
    def image_token_id(self) -> int:
        """Stands for every prompt position that an image fills: the first id behind the vocabulary."""
        return self.model_config.text.vocab_size


class WemmHubConfig(WemmConfig):
    """The same under the name that the hub's config.json gives."""

    model_type = "wemm_hf"

    def __init__(self, **data: Any) -> None:  # without one of its own, the class would be given one
        super().__init__(**data)


MODEL_TYPES = (WemmConfig, WemmHubConfig)


class Defaults(VerifyAndUpdateConfig):
    """What `auto` means for this model."""

    @staticmethod
    def verify_and_update_model_config(model_config: VllmModelConfig) -> None:
        """Our tokenizer, unless another was asked for."""
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE


def _text_sizes(text: TextConfig) -> Mapping[str, Any]:
    return {
        # One more: vLLM indexes tables of this size with the id of the image token too.
        "vocab_size": text.vocab_size + 1,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": cache_head_dim(text),
        "max_position_embeddings": text.max_position_embeddings,
        # Scaling of the type `dynamic` begins where max_position_embeddings ends.
        "rope_parameters": rope_parameters(text),
    }


def cache_head_dim(text: TextConfig) -> int:
    """Width of a head in vLLM's cache: its attention takes none narrower than 32, so small models fill up."""
    return max(text.head_dim, _NARROWEST_HEAD)


def rope_parameters(text: TextConfig) -> dict[str, Any]:
    """In the words of vLLM."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.rope_scaling is not None and text.rope_scaling.type == "linear":
        parameters |= {"rope_type": "linear", "factor": text.rope_scaling.factor}
    return parameters
