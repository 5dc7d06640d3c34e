"""The files of the checkpoint that vLLM loads, opened and checked by our rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from vllm.config import VllmConfig

from wemm.checkpoint.adapter import find_adapter
from wemm.checkpoint.checkpoint import open_checkpoint
from wemm.checkpoint.shards import StoredTensor
from wemm.checkpoint.weight_map import TensorSpec, expected_tensors
from wemm.config import ModelConfig, PloraConfig

_FILES = ["*.safetensors", "*.json"]


@dataclass(frozen=True)
class Files:
    """What a checkpoint holds, before a weight is read."""

    config: ModelConfig
    plora: PloraConfig
    specs: Mapping[str, TensorSpec]
    """Every tensor by renamed name."""
    adapter: Mapping[str, StoredTensor]
    """PLoRA that lies in another directory and takes the place of the checkpoint's own."""


def find_files(vllm_config: VllmConfig) -> Files:
    """Of `--model`, fetched if need be; `--load-format dummy` needs no tensors. Raises CheckpointError."""
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    directory = Path(model_config.model)
    is_dummy = load_config.load_format == "dummy"
    if not directory.is_dir():
        patterns = ["*.json"] if is_dummy else _FILES
        directory = Path(
            snapshot_download(
                model_config.model,
                revision=model_config.revision,
                cache_dir=load_config.download_dir,
                allow_patterns=patterns,
            )
        )
    if is_dummy:
        config: ModelConfig = model_config.hf_config.model_config
        plora = find_adapter(directory, config, {}).plora
        return Files(config, plora, expected_tensors(config, plora, config.quantization), {})
    checkpoint = open_checkpoint(directory)
    assert checkpoint.adapter is not None
    elsewhere = checkpoint.adapter.directory != directory
    adapter = checkpoint.adapter.tensors if elsewhere else {}
    return Files(checkpoint.config, checkpoint.adapter.plora, checkpoint.specs, adapter)
