"""Weights from disk into a model built on the meta device: tensor by tensor, each rank its slice.

A layer says how its weights are cut: `shard_dims` maps a parameter of its own to the dimension that ranks share,
if it was built to share it. It says which have a dtype of their own (`own_dtypes`), and by which `scheme` its
weight is quantised; a float tensor is then quantised as it passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wemm.checkpoint.checkpoint import Checkpoint
from wemm.checkpoint.shards import open_shard
from wemm.checkpoint.weight_map import SCALE_SUFFIX, TensorSpec
from wemm.checkpoint.weight_memory import empty_weight
from wemm.distributed import SINGLE, TensorParallel
from wemm.errors import IntegrityError
from wemm.progress import Advance
from wemm.quantization import Scheme

_DUMMY_BLOCK = 2**22
_DUMMY_STRIDE = 7919  # a prime: every tensor begins elsewhere in the block


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    tensor_parallel: TensorParallel = SINGLE,
    advance: Advance = lambda num_bytes: None,
    part: str = "",
) -> None:
    """Fill every parameter of `model` (built on the meta device) with its slice of the checkpoint.

    With `part`, the name of a submodule, only those in it. At any moment one tensor exists twice (file and
    memory). Raises CheckpointError.
    """
    places = _places(model.get_submodule(part), part)
    for file, tensors in checkpoint.tensors_by_file(part).items():
        with open_shard(file) as shard:
            for tensor in tensors:
                spec = checkpoint.specs[tensor.key]
                place = places.pop(spec.parameter)
                values = shard.get_slice(tensor.name)[place.index(spec, tensor_parallel)]
                if place.scheme is None or spec.scheme is not None:
                    place.fill(empty_weight(values.shape, place.dtype(dtype), device).copy_(values))
                    advance(place.num_bytes(dtype))
                else:
                    scale = places.pop(spec.parameter + SCALE_SUFFIX)
                    quantized = place.scheme.quantize(values.to(device))
                    for filled, value in zip((place, scale), quantized, strict=True):
                        filled.fill(empty_weight(value.shape, value.dtype, device).copy_(value))
                        advance(filled.num_bytes(dtype))
    if places:
        raise IntegrityError(f"parameters without a tensor: {', '.join(sorted(places))}")


def load_dummy_weights(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Fill a model built on the meta device with repeatable random weights, directly in their precision.

    One random block, repeated from a different offset for every tensor: as fast as memory can be
    written. Matrices are scaled by 1/sqrt(fan_in), one-dimensional weights are near 1, biases near 0.
    """
    blocks = _RandomBlocks(seed)
    for i, place in enumerate(_places(model).values()):
        block = blocks.of(place, dtype, device)
        value = empty_weight(place.shape, place.dtype(dtype), device)
        _repeat(block, value.view(-1), offset=i * _DUMMY_STRIDE % _DUMMY_BLOCK)
        place.fill(value)
        advance(place.num_bytes(dtype))


def weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the parameters of a model take, those without a dtype of their own in `dtype`."""
    return sum(place.num_bytes(dtype) for place in _places(model).values())


@dataclass(frozen=True)
class _Place:
    """A parameter of a model: where it belongs."""

    module: Any
    attribute: str

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = getattr(self.module, self.attribute).shape
        return shape

    @property
    def scheme(self) -> Scheme | None:
        """How it is quantised, if it is a weight that is."""
        return getattr(self.module, "scheme", None) if self.attribute == "weight" else None

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        own: Mapping[str, torch.dtype] = getattr(self.module, "own_dtypes", {})
        return own.get(self.attribute, model_dtype)

    def num_bytes(self, model_dtype: torch.dtype) -> int:
        return self.shape.numel() * self.dtype(model_dtype).itemsize

    def index(self, spec: TensorSpec, tensor_parallel: TensorParallel) -> tuple[slice, ...]:
        """The part of a stored tensor that belongs here."""
        shard_dims: Mapping[str, int] = getattr(self.module, "shard_dims", {})
        index = [slice(None)] * len(spec.stored_shape)
        dim = shard_dims.get(self.attribute)
        here = self.shape
        if self.scheme is not None and spec.scheme is None:  # still to be quantised: as wide as what it multiplies
            here = torch.Size((here[0], self.module.in_size))
        # A scale per row does not share the columns.
        if dim is not None and dim < len(index) and here[dim] != spec.stored_shape[dim]:
            index[dim] = tensor_parallel.slice(spec.stored_shape[dim])
        return tuple(index)

    def fill(self, value: torch.Tensor) -> None:
        if self.shape != value.shape:
            raise IntegrityError(
                f"{self.attribute} of {self.module} is {list(self.shape)}, its slice is {list(value.shape)}"
            )
        setattr(self.module, self.attribute, nn.Parameter(value, requires_grad=False))


def _places(model: nn.Module, path: str = "") -> dict[str, _Place]:
    return {
        f"{prefix}.{name}" if prefix else name: _Place(module, name)
        for prefix, module in model.named_modules(prefix=path)
        for name, _ in module.named_parameters(recurse=False)
    }


class _RandomBlocks:
    """Numbers drawn once and repeated; one block per kind of parameter, made as it is first needed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(_DUMMY_BLOCK, generator=self._generator)
        self._made: dict[Any, torch.Tensor] = {}

    def of(self, place: _Place, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        scheme: Scheme | None = getattr(place.module, "scheme", None)
        if scheme is not None and place.attribute == "weight":
            return self._make(scheme.name, lambda: self._integers(scheme), device)
        shift = 1.0 if len(place.shape) == 1 and place.attribute == "weight" else 0.0
        size = place.shape[1:].numel() ** -0.5 if len(place.shape) > 1 else 0.1
        if scheme is not None and place.attribute == "weight_scale":
            size, shift = 0.0, place.module.in_size**-0.5 / _SPREAD[scheme.name]
        own = place.dtype(dtype)
        return self._make((size, shift, own), lambda: (self._normal * size + shift).to(own), device)

    def _make(self, kind: Any, make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        if kind not in self._made:
            self._made[kind] = make().to(device)
        return self._made[kind]

    def _integers(self, scheme: Scheme) -> torch.Tensor:
        if scheme.weight_dtype is torch.int8:
            return (self._normal * _SPREAD[scheme.name]).round().clamp(-127, 127).to(torch.int8)
        return torch.randint(0, 256, (_DUMMY_BLOCK,), dtype=torch.uint8, generator=self._generator)


# Standard deviation of the random integers.
_SPREAD = {"int8": 32.0, "int4": (16**2 / 12) ** 0.5}


def _repeat(block: torch.Tensor, target: torch.Tensor, offset: int) -> None:
    head = target[:offset]
    head.copy_(block[-offset:][: head.numel()] if offset else head)
    for piece in target[offset:].split(_DUMMY_BLOCK):
        piece.copy_(block[: piece.numel()])
