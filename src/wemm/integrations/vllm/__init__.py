"""vLLM: this model in its engine, for those who outgrow one machine. `register` is the entry point `wemm` of
`vllm.general_plugins`, which vLLM calls in every process it starts; importing this package needs no vLLM.
"""

from __future__ import annotations

INSTALL = "install it: pip install 'wemm[vllm]'"
ARCHITECTURE = "WemmForConditionalGeneration"
TOKENIZER_MODE = "wemm"
"""Names our tokenizer and renderer among those of vLLM."""


def register() -> None:
    """Make vLLM read WeMM checkpoints. Calling it twice changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from wemm.integrations.vllm import quantization  # noqa: F401 - registers itself
    from wemm.integrations.vllm.hub_config import MODEL_TYPES, Defaults

    if MODELS_CONFIG_MAP.get(ARCHITECTURE) is Defaults:
        return
    for config_class in MODEL_TYPES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    # By name: a process that only asks what a model can do imports it in another one.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    TokenizerRegistry.register(TOKENIZER_MODE, f"{__name__}.tokenizer", "VllmTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__name__}.renderer", "WemmRenderer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Defaults
