"""The sum that ends one half of a decoder layer, and the norm that begins the other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.add_residual import add_residual
from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op, tensor_bytes
from wemm.ops.rms_norm import rms_norm


def _case(inputs: Inputs, rows: int, width: int, eps: float = 1e-5) -> tuple[Any, ...]:
    return inputs.normal(rows, width), inputs.normal(rows, width), inputs.normal(width), eps


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    return {
        "prefill": _case(inputs, 70, 4096),
        "decode": _case(inputs, 1, 4096),
        "odd width": _case(inputs, 3, 129),
        "none": _case(inputs, 0, 64),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text = shapes.config.text
    rows = {f"decode {n}": n for n in shapes.decode_batches}
    rows |= {f"prefill {shapes.num_prompt_tokens}": shapes.num_prompt_tokens}
    return {name: partial(_case, inputs, n, text.hidden_size, text.rms_norm_eps) for name, n in rows.items()}


def _flops(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> int:
    return 5 * y.numel()


def _moved_bytes(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> int:
    return tensor_bytes((y, y, y, x, weight))


@op(_cases, model_cases=_model_cases, flops=_flops, moved_bytes=_moved_bytes)
def add_rms_norm(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of y + x, and y + x. y and x: [rows, hidden_size], weight: [hidden_size] → both like y.

    y is given away: a kernel may return the sum in its place.
    """
    total = add_residual(y, x)
    return rms_norm(total, weight, eps), total
