"""Gate of the language model's feed-forward with the two products that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.linear import linear
from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op
from wemm.ops.silu_and_mul import silu_and_mul


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    gate, up = (inputs.normal(330, 515, scale=515**-0.5) for _ in range(2))
    x = inputs.normal(20, 515)
    return {
        "prefill": (x, gate, up),
        "decode": (x[:1], gate, up),
        "four": (x[:4], gate, up),
        "far from zero": (inputs.normal(5, 515, scale=10), gate, up),
        "none": (x[:0], gate, up),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    hidden, wide = shapes.config.text.hidden_size, shapes.config.text.intermediate_size

    def case(rows: int) -> tuple[Any, ...]:
        gate, up = (inputs.normal(wide, hidden, scale=hidden**-0.5) for _ in range(2))
        return inputs.normal(rows, hidden), gate, up

    return {f"decode {n}": partial(case, n) for n in shapes.decode_batches}


def _flops(x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor) -> int:
    return 2 * x.shape[0] * (gate_weight.numel() + up_weight.numel())


@op(_cases, model_cases=_model_cases, flops=_flops)
def linear_silu_and_mul(x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate_weight.T) * (x @ up_weight.T), both products rounded to the dtype of x.

    x: [num_tokens, in], both weights: [out, in] → [num_tokens, out].
    """
    return silu_and_mul(linear(x, gate_weight), linear(x, up_weight))
