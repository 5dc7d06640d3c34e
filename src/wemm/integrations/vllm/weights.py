"""Tensors of a checkpoint → the parameters of one rank and stage, by our weight map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from wemm.checkpoint.shards import open_shard
from wemm.checkpoint.weight_map import canonical_name, is_plora
from wemm.config import TextConfig
from wemm.errors import CheckpointError
from wemm.integrations.vllm.checkpoint import Files
from wemm.integrations.vllm.plora import PloraFactors, tensor_parallel

_MERGED = {"w1": ("w13", 0), "w3": ("w13", 1)}
"""Our linear → that of vLLM which holds it, and which part of it."""


def load(model: nn.Module, files: Files, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Fill `model` from tensors in either spelling. Returns the names of its parameters that were filled.

    Raises CheckpointError for a tensor that the checkpoint must not have.
    """
    loaded: set[str] = set()
    for name, value in _tensors(files, weights):
        spec = files.specs.get(name)
        if spec is None:
            raise CheckpointError(f"unexpected tensor {name}")
        loaded.update(_fill(model, files.config.text, spec.parameter, value))
    return loaded


def _tensors(files: Files, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in weights:
        key = canonical_name(name)
        if not (files.adapter and is_plora(key)):
            yield key, value
    for key, stored in files.adapter.items():
        with open_shard(stored.file) as shard:
            yield key, shard.get_tensor(stored.name)


def _fill(model: nn.Module, text: TextConfig, name: str, value: torch.Tensor) -> list[str]:
    if not name.startswith("language_model."):
        return _copy(model, name, value)
    if name in ("language_model.tok_embeddings.weight", "language_model.output.weight"):
        # The row of the image token.
        return _copy(model, name, F.pad(value, (0, 0, 0, 1)))
    parent, linear, kind = name.rsplit(".", 2)
    linear, part = _MERGED.get(linear, (linear, None))
    path = f"{parent}.{linear}"
    if is_pp_missing_parameter(path, model):
        return []
    if kind.startswith("plora"):
        return _fill_factor(model, text, path, kind, part or 0, value)
    path = f"{path}.{kind}"
    if linear == "wqkv":
        for shard, rows in zip("qkv", split_wqkv(value, text), strict=True):
            _copy(model, path, rows, shard)
        return [path]
    return _copy(model, path, value) if part is None else _copy(model, path, value, part)


def _copy(model: nn.Module, path: str, value: torch.Tensor, *part: Any) -> list[str]:
    if is_pp_missing_parameter(path, model):
        return []
    parameter = model.get_parameter(path)
    load_parameter: Callable[..., None] = getattr(parameter, "weight_loader", default_weight_loader)
    load_parameter(parameter, value, *part)
    return [path]


def _fill_factor(
    model: nn.Module, text: TextConfig, linear: str, kind: str, part: int, value: torch.Tensor
) -> list[str]:
    # The factor that meets the cut dimension is cut with the base, the other is whole on every rank.
    factors = model.get_submodule(f"{linear}_plora")
    assert isinstance(factors, PloraFactors)
    ranks = tensor_parallel()
    is_row_parallel = linear.endswith((".wo", ".w2"))
    if kind == "plora_a":
        columns = ranks.slice(value.shape[1]) if is_row_parallel else slice(None)
        factors.load_a(value[:, columns], part)
        return [f"{linear}_plora.a"]
    if linear.endswith(".wqkv"):
        value = torch.cat([rows[ranks.slice(len(rows))] for rows in split_wqkv(value, text)])
    elif not is_row_parallel:
        value = value[ranks.slice(len(value))]
    factors.load_b(value, part)
    return [f"{linear}_plora.b.{part}"]


def split_wqkv(value: torch.Tensor, text: TextConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows packed per KV head (its query heads, its key, its value) → query, key and value rows, all heads."""
    num_groups = text.num_key_value_heads
    group = text.num_attention_heads // num_groups
    packed = value.unflatten(0, (num_groups, group + 2, text.head_dim))
    query, key, value = packed.split((group, 1, 1), 1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)
