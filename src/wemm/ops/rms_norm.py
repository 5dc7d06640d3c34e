"""Root-mean-square norm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    return {
        "prefill": (inputs.normal(128, 4096), inputs.normal(4096), 1e-5),
        "decode": (inputs.normal(1, 4096), inputs.normal(4096), 1e-5),
        "odd width": (inputs.normal(3, 129, scale=30), inputs.normal(129), 1e-5),
        "zeros": (inputs.normal(2, 64, scale=0), inputs.normal(64), 1e-5),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text = shapes.config.text

    def case(rows: int) -> tuple[Any, ...]:
        return inputs.normal(rows, text.hidden_size), inputs.normal(text.hidden_size), text.rms_norm_eps

    prefill = {f"prefill {shapes.num_prompt_tokens}": partial(case, shapes.num_prompt_tokens)}
    return {**{f"decode {n}": partial(case, n) for n in shapes.decode_batches}, **prefill}


def _flops(x: torch.Tensor, weight: torch.Tensor, eps: float) -> int:
    return 4 * x.numel()


@op(_cases, model_cases=_model_cases, flops=_flops)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32.

    x: [..., hidden_size], weight: [hidden_size] → like x.
    """
    values = x.to(torch.float32)
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (values * weight.to(torch.float32)).to(x.dtype)
