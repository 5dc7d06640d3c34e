"""Gate of the language model's feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    return {
        "prefill": (inputs.normal(128, 14336), inputs.normal(128, 14336)),
        "decode": (inputs.normal(1, 14336, scale=10), inputs.normal(1, 14336)),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    def case(rows: int) -> tuple[Any, ...]:
        shape = rows, shapes.config.text.intermediate_size
        return inputs.normal(*shape), inputs.normal(*shape)

    prefill = {f"prefill {shapes.num_prompt_tokens}": partial(case, shapes.num_prompt_tokens)}
    return {**{f"decode {n}": partial(case, n) for n in shapes.decode_batches}, **prefill}


def _flops(gate: torch.Tensor, up: torch.Tensor) -> int:
    return 5 * gate.numel()  # exp, add, divide, two products


@op(_cases, model_cases=_model_cases, flops=_flops)
def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in float32. gate and up: [num_tokens, intermediate_size] → like gate."""
    return (F.silu(gate.to(torch.float32)) * up.to(torch.float32)).to(gate.dtype)
