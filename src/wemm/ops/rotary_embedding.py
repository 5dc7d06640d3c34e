"""Rotary position embedding, rotate-half layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    angle = torch.pi * inputs.float32(64, 64)
    return {
        "query": (inputs.normal(64, 32, 128), angle.cos(), angle.sin()),
        "key, one token": (inputs.normal(1, 8, 128), angle.cos()[:1], angle.sin()[:1]),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text = shapes.config.text

    def case(rows: int, heads: int) -> tuple[Any, ...]:
        angle = torch.pi * inputs.float32(rows, text.head_dim // 2)
        return inputs.normal(rows, heads, text.head_dim), angle.cos(), angle.sin()

    rows = shapes.num_prompt_tokens
    return {
        **{f"query, decode {n}": partial(case, n, text.num_attention_heads) for n in shapes.decode_batches},
        f"query, prefill {rows}": partial(case, rows, text.num_attention_heads),
        f"key, prefill {rows}": partial(case, rows, text.num_key_value_heads),
    }


def _flops(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> int:
    return 3 * x.numel()


@op(_cases, model_cases=_model_cases, flops=_flops)
def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim/2) of every head by the token's angles, in float32.

    x: [num_tokens, num_heads, head_dim], cos and sin: float32 [num_tokens, head_dim/2] → like x.
    """
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
