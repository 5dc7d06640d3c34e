"""Weights from disk into a model built on the meta device: tensor by tensor, each rank its slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from wemm.checkpoint.checkpoint import Checkpoint
from wemm.checkpoint.shards import open_shard
from wemm.checkpoint.weight_memory import empty_weight
from wemm.distributed import SINGLE, TensorParallel
from wemm.errors import IntegrityError
from wemm.progress import Advance

_DUMMY_BLOCK = 2**22
_DUMMY_STRIDE = 7919  # a prime: every tensor begins elsewhere in the block


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    tensor_parallel: TensorParallel = SINGLE,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Fill every parameter of `model` (built on the meta device) with its slice of the checkpoint.

    A layer says how its weights are cut: `shard_dims` maps a parameter of its own to the dimension
    that ranks share, if it was built to share it. At any moment one tensor exists twice (file and memory).
    Raises CheckpointError.
    """
    owners = dict(_parameter_owners(model))
    for file, tensors in checkpoint.tensors_by_file().items():
        with open_shard(file) as shard:
            for tensor in tensors:
                spec = checkpoint.specs[tensor.key]
                module, attribute, shard_dim = owners.pop(spec.parameter)
                entry = shard.get_slice(tensor.name)
                index = [slice(None)] * len(spec.shape)
                if shard_dim is not None and getattr(module, attribute).shape[shard_dim] != spec.shape[shard_dim]:
                    index[shard_dim] = tensor_parallel.slice(spec.shape[shard_dim])
                stored_value = entry[tuple(index)]
                value = empty_weight(stored_value.shape, dtype, device).copy_(stored_value)
                _set_parameter(module, attribute, value)
                advance(value.numel() * value.element_size())
    if owners:
        raise IntegrityError(f"parameters without a tensor: {', '.join(sorted(owners))}")


def load_dummy_weights(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Fill a model built on the meta device with repeatable random weights, directly in `dtype`.

    One random block, repeated from a different offset for every tensor: as fast as memory can be
    written. Matrices are scaled by 1/sqrt(fan_in), one-dimensional weights are near 1, biases near 0.
    """
    block = torch.randn(_DUMMY_BLOCK, generator=torch.Generator().manual_seed(seed))
    scaled: dict[tuple[float, float], torch.Tensor] = {}
    for i, (module, attribute, _) in enumerate(dict(_parameter_owners(model)).values()):
        shape = getattr(module, attribute).shape
        scale = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1
        shift = 1.0 if len(shape) == 1 and attribute == "weight" else 0.0
        if (scale, shift) not in scaled:
            scaled[scale, shift] = (block * scale + shift).to(device=device, dtype=dtype)
        value = empty_weight(shape, dtype, device)
        _repeat(scaled[scale, shift], value.view(-1), offset=i * _DUMMY_STRIDE % _DUMMY_BLOCK)
        _set_parameter(module, attribute, value)
        advance(value.numel() * value.element_size())


def _repeat(block: torch.Tensor, target: torch.Tensor, offset: int) -> None:
    head = target[:offset]
    head.copy_(block[-offset:][: head.numel()] if offset else head)
    for piece in target[offset:].split(_DUMMY_BLOCK):
        piece.copy_(block[: piece.numel()])


def _parameter_owners(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str, int | None]]]:
    for prefix, module in model.named_modules():
        shard_dims: Mapping[str, int] = getattr(module, "shard_dims", {})
        for name, _ in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            yield path, (module, name, shard_dims.get(name))


def _set_parameter(module: Any, attribute: str, value: torch.Tensor) -> None:
    expected = getattr(module, attribute).shape
    if expected != value.shape:
        raise IntegrityError(f"{attribute} of {module} is {list(expected)}, its slice is {list(value.shape)}")
    setattr(module, attribute, nn.Parameter(value, requires_grad=False))
