"""PLoRA of a checkpoint: which files it comes from, its rank and scaling. Nothing is left out silently."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemm.checkpoint.json_file import read_json
from wemm.checkpoint.shards import StoredTensor, stored_tensors
from wemm.checkpoint.weight_map import is_plora
from wemm.config import ModelConfig, PloraConfig
from wemm.errors import CheckpointError, ConfigError

ADAPTER_ID = "wemm"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_MAP_NAME = "lora_adapter.json"
_MAX_RANK = 1024


@dataclass(frozen=True)
class Adapter:
    """PLoRA as found: its configuration and its tensors by renamed name."""

    plora: PloraConfig
    tensors: Mapping[str, StoredTensor]
    directory: Path


def find_adapter(directory: Path, config: ModelConfig, own: Mapping[str, StoredTensor]) -> Adapter:
    """The PLoRA of a checkpoint whose own shards hold `own`.

    lora_adapter.json may name another directory; its tensors then win. Rank and alpha come from
    that directory's adapter_config.json, else from config.json's lora_cfg, else from the tensors
    with scaling 1. Raises CheckpointError.
    """
    tensors = {name: tensor for name, tensor in own.items() if is_plora(name)}
    adapter_directory = _adapter_directory(directory)
    if adapter_directory != directory:
        other = {name: t for name, t in stored_tensors(adapter_directory).items() if is_plora(name)}
        if not other:
            raise CheckpointError(
                f"{directory / ADAPTER_MAP_NAME}: {adapter_directory} holds no Plora_A/Plora_B tensors"
            )
        tensors.update(other)
    plora = configured_plora(adapter_directory, config) or _from_tensors(directory, tensors)
    return Adapter(plora, tensors, adapter_directory)


def configured_plora(directory: Path, config: ModelConfig) -> PloraConfig | None:
    """Rank and scaling as the files state them: adapter_config.json, else config.json's lora_cfg."""
    return _read_adapter_config(directory / ADAPTER_CONFIG_NAME) or config.lora_cfg


def _adapter_directory(directory: Path) -> Path:
    path = directory / ADAPTER_MAP_NAME
    if not path.exists():
        return directory
    target = read_json(path).get(ADAPTER_ID)
    if not isinstance(target, str):
        raise ConfigError(f'{path}: must be {{"{ADAPTER_ID}": DIRECTORY}}')
    adapter_directory = directory / target
    if not os.path.isdir(adapter_directory):  # noqa: PTH112 - False for a name no file can have
        raise CheckpointError(
            f"{path}: adapter directory {target!r} does not exist; correct it, "
            "or delete the file to use the PLoRA of the checkpoint itself"
        )
    return directory if adapter_directory.resolve() == directory.resolve() else adapter_directory


def _read_adapter_config(path: Path) -> PloraConfig | None:
    if not path.exists():
        return None
    data = read_json(path)
    rank = _rank(path, "r", data.get("r", 8))
    alpha = _alpha(path, "lora_alpha", data.get("lora_alpha", 8))
    use_rslora = data.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise ConfigError(f"{path}: use_rslora must be true or false. Given: {use_rslora!r}")
    patterns = {key: data.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ConfigError(f"{path}: {key} must be an object. Given: {pattern!r}")
        for expression in pattern:
            _check_expression(path, key, expression)
    return PloraConfig(
        rank,
        alpha,
        use_rslora,
        {key: _rank(path, f"rank_pattern.{key}", value) for key, value in patterns["rank_pattern"].items()},
        {key: _alpha(path, f"alpha_pattern.{key}", value) for key, value in patterns["alpha_pattern"].items()},
        source=str(path),
    )


def _check_expression(path: Path, key: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{path}: {key} key {expression!r} is not a regular expression: {error}") from None


def _rank(path: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_RANK:
        raise ConfigError(f"{path}: {key} must be an integer in [1, {_MAX_RANK}]. Given: {value!r}")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MAX_RANK:
        raise ConfigError(f"{path}: {key} must be a number in (0, {_MAX_RANK}]. Given: {value!r}")
    return float(value)


def _from_tensors(directory: Path, tensors: Mapping[str, StoredTensor]) -> PloraConfig:
    ranks = {name: t.shape[0] for name, t in tensors.items() if name.endswith(".Plora_A.weight") and t.shape}
    if not ranks:
        raise CheckpointError(
            f"{directory}: no PLoRA tensors (Plora_A/Plora_B) and no {ADAPTER_CONFIG_NAME}; "
            "add them, or run without PLoRA by --no-plora"
        )
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {name.removesuffix(".Plora_A.weight"): rank for name, rank in ranks.items() if rank != common}
    return PloraConfig(
        common,
        float(common),
        rank_pattern=pattern,
        alpha_pattern={name: float(rank) for name, rank in pattern.items()},
        source="tensor shapes (scaling 1)",
    )
