"""How a weight is stored in fewer bits: the two schemes, what they keep per weight, and the way there and back.

A quantised weight W [out, in] is integers times scales. Activations stay in the dtype of the model; the ops that
multiply them (ops/linear_int8.py, ops/linear_int4.py) round them to int8 token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F

INT4_GROUP = 128
"""Inputs that share a scale in int4."""
_INT4_ZERO = 8


class Scheme(Protocol):
    """One way to store a weight: `weight` holds the integers, `scale` what they are multiplied by."""

    name: str
    weight_dtype: torch.dtype
    scale_dtype: torch.dtype

    def weight_shape(self, out_size: int, in_size: int) -> tuple[int, ...]:
        """Of `weight`, for W [out, in]."""

    def scale_shape(self, out_size: int, in_size: int) -> tuple[int, ...]:
        """Of `scale`."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W [out, in], any float dtype → weight, scale."""

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor, in_size: int) -> torch.Tensor:
        """→ float32 [out, in]."""


class Int8:
    """A scale per row; integers in [-127, 127]."""

    name = "int8"
    weight_dtype = torch.int8
    scale_dtype = torch.float32

    def weight_shape(self, out_size: int, in_size: int) -> tuple[int, ...]:
        """int8 [out, in]."""
        return out_size, in_size

    def scale_shape(self, out_size: int, in_size: int) -> tuple[int, ...]:
        """float32 [out]."""
        return (out_size,)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest of a row becomes 127."""
        quantized, scale = quantize_rows(weight)
        return quantized.to(torch.int8), scale.squeeze(-1)

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor, in_size: int) -> torch.Tensor:
        """→ float32 [out, in]."""
        return weight.to(torch.float32) * scale.unsqueeze(-1)


class Int4:
    """A scale per row and group of 128 inputs; integers in [-8, 7], two to a byte.

    Byte j of a group holds element j in its low half and element 64 + j in its high half, each plus 8, so that one
    mask and one shift make two runs of 64. The last group is filled up with zeros.
    """

    name = "int4"
    weight_dtype = torch.uint8
    scale_dtype = torch.bfloat16

    def weight_shape(self, out_size: int, in_size: int) -> tuple[int, ...]:
        """uint8 [out, 64 * groups]."""
        return out_size, num_groups(in_size) * INT4_GROUP // 2

    def scale_shape(self, out_size: int, in_size: int) -> tuple[int, ...]:
        """bfloat16 [out, groups]."""
        return out_size, num_groups(in_size)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The integers and scales with the least squared error among a few candidates per group.

        A group that holds NaN or Inf gets the scale NaN.
        """
        out_size, in_size = weight.shape
        packed = weight.new_empty(self.weight_shape(out_size, in_size), dtype=self.weight_dtype)
        scale = weight.new_empty(self.scale_shape(out_size, in_size), dtype=self.scale_dtype)
        rows_at_once = max(1, _INT4_AT_ONCE // max(1, in_size))
        for first in range(0, out_size, rows_at_once):
            rows = slice(first, first + rows_at_once)
            wide = F.pad(weight[rows].to(torch.float32), (0, -in_size % INT4_GROUP))
            integers, scale[rows] = _quantize_groups(wide.unflatten(-1, (-1, INT4_GROUP)))
            packed[rows] = pack_int4(integers)
        return packed, scale

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor, in_size: int) -> torch.Tensor:
        """→ float32 [out, in]."""
        return (unpack_int4(weight) * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)[..., :in_size]


SCHEMES: Mapping[str, Scheme] = {"int8": Int8(), "int4": Int4()}


def scheme_of(name: str | None) -> Scheme | None:
    """By name; None: none."""
    return None if name is None else SCHEMES[name]


def num_groups(in_size: int) -> int:
    """Groups of an int4 row."""
    return -(-in_size // INT4_GROUP)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, size] → integers in [-127, 127] as float32 [n, size], and their scale float32 [n, 1].

    The largest of a row becomes 127, halves go to the even neighbour. A row of zeros has scale 0; one that holds
    NaN or Inf becomes NaN as a whole.
    """
    x = x.to(torch.float32)
    largest = x.abs().amax(-1, keepdim=True)
    integers = torch.round(x * (127.0 / largest))
    # By a tensor: CUDA divides by a number as it multiplies by its reciprocal, which may be the neighbour.
    scale = largest / torch.full_like(largest, 127.0)
    return torch.where(largest == 0, torch.zeros_like(x), integers), scale


KV_SCALE_BYTES = 4
"""Behind the integers of a key or value in a cache of int8: their scale, float32."""


def quantize_kv(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., head_dim] → int8 [..., head_dim + 4], a scale per token and head."""
    integers, scale = quantize_rows(x)
    scale = scale.clone(memory_format=torch.contiguous_format)
    return torch.cat((integers.to(torch.int8), scale.view(torch.int8)), -1)


def dequantize_kv(rows: torch.Tensor) -> torch.Tensor:
    """The way back, float32 [..., head_dim]."""
    integers, scale = rows.split((rows.shape[-1] - KV_SCALE_BYTES, KV_SCALE_BYTES), -1)
    return integers.to(torch.float32) * scale.clone(memory_format=torch.contiguous_format).view(torch.float32)


def pack_int4(integers: torch.Tensor) -> torch.Tensor:
    """[out, groups, 128] in [-8, 7] → uint8 [out, 64 * groups]."""
    low, high = (integers + _INT4_ZERO).to(torch.uint8).chunk(2, -1)
    return (low | high << 4).flatten(-2)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The way back, as float32."""
    groups = packed.unflatten(-1, (-1, INT4_GROUP // 2))
    return torch.cat((groups & 15, groups >> 4), -1).to(torch.float32) - _INT4_ZERO


def round_int4(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The nearest integers in [-8, 7], as float32; with scale 0: 0."""
    inverse = (1 / scale.to(torch.float32)).nan_to_num_(0, 0, 0)
    return torch.mul(weight, inverse, out=out).round_().clamp_(-8, 7)


_INT4_AT_ONCE = 2**17
"""Weights quantised at a time: with what is made of them on the way they stay in a cache."""

# What the element furthest from zero is divided by. Its sign goes into the scale, so that it may become -8; to
# clip it (below 8) or to leave it between two integers often costs less than it saves for the others.
_INT4_RANGES = (-8.0, -7.6, -7.2, -6.8, -8.4, 7.0)


def _quantize_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, groups, 128] → integers as float32, and their scale bfloat16 [out, groups]."""
    furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    finite = furthest.isfinite()
    # A power of two changes no digit, and keeps squares of huge and tiny numbers within float32.
    power = torch.exp2(torch.where(finite, furthest, 0).frexp().exponent.clamp(-126, 126).to(torch.float32))
    groups = torch.where(finite, groups / power, 0)
    scale = _least_error_scale(groups, torch.where(finite, furthest / power, 0))
    integers = round_int4(groups, scale, torch.empty_like(groups))
    return integers, torch.where(finite, scale.to(torch.float32) * power, torch.nan).squeeze(-1).to(torch.bfloat16)


def _least_error_scale(groups: torch.Tensor, furthest: torch.Tensor) -> torch.Tensor:
    """[out, groups, 128], [out, groups, 1] → bfloat16 [out, groups, 1]."""
    best = torch.zeros_like(furthest, dtype=torch.bfloat16)
    least = torch.full_like(furthest, torch.inf)
    integers, scratch = torch.empty_like(groups), torch.empty_like(groups)

    def try_scale(scale: torch.Tensor) -> None:
        round_int4(groups, scale, integers)
        torch.mul(integers, scale.to(torch.float32), out=scratch)
        error = scratch.sub_(groups).square_().sum(-1, keepdim=True)
        better = error < least
        torch.where(better, scale, best, out=best)
        torch.where(better, error, least, out=least)

    for extent in _INT4_RANGES:
        try_scale((furthest / extent).to(torch.bfloat16))
        # Once more with the scale that suits these integers best.
        products = torch.mul(groups, integers, out=scratch).sum(-1, keepdim=True)
        squares = torch.mul(integers, integers, out=scratch).sum(-1, keepdim=True)
        try_scale((products / squares).nan_to_num_(0, 0, 0).to(torch.bfloat16))
    return best
