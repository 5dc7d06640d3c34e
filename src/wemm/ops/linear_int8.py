"""Matrix product with a weight of int8, a scale per row (quantization.py: Int8)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op
from wemm.quantization import SCHEMES, quantize_rows

ROWS_AT_ONCE = 1024
"""Rows of a weight that a definition widens to float32 at a time."""


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    weight, scale = SCHEMES["int8"].quantize(inputs.normal(330, 515, scale=515**-0.5))
    x = inputs.normal(70, 515)
    spiked = x[:3].clone()
    spiked[:, 7] = 60
    return {
        "prefill": (x, weight, scale, None),
        "decode": (x[:1], weight, scale, None),
        "four": (x[:4], weight, scale, None),
        "bias": (x[:7], weight, scale, inputs.normal(330)),
        "outliers": (spiked, weight, scale, None),
        "zeros": (torch.zeros_like(x[:2]), weight, scale, inputs.normal(330)),
        "none": (x[:0], weight, scale, None),
    }


def quantized_model_cases(scheme: str, inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    """The linears of the decoder; of int8 also those of the vision tower."""
    text, vision = shapes.config.text, shapes.config.vision
    hidden, wide = text.hidden_size, text.intermediate_size
    decoder = {"wqkv": (text.wqkv_out, hidden), "wo": (hidden, hidden), "w1": (wide, hidden), "w2": (hidden, wide)}

    def case(rows: int, out: int, width: int, bias: bool = False) -> tuple[Any, ...]:
        weight, scale = inputs.quantized(scheme, out, width)
        return inputs.normal(rows, width), weight, scale, inputs.normal(out) if bias else None

    cases = {f"{name}, decode 1": partial(case, 1, *shape) for name, shape in decoder.items()}
    cases |= {f"w1, decode {n}": partial(case, n, wide, hidden) for n in shapes.decode_batches if n > 1}
    prompt, patches = shapes.num_prompt_tokens, shapes.num_patches
    cases |= {f"{name}, prefill {prompt}": partial(case, prompt, *shape) for name, shape in decoder.items()}
    if scheme == "int8":
        width, mlp = vision.hidden_size, vision.intermediate_size
        cases[f"q_proj, tower {patches}"] = partial(case, patches, width, width, bias=True)
        cases[f"fc1, tower {patches}"] = partial(case, patches, mlp, width, bias=True)
        cases[f"fc2, tower {patches}"] = partial(case, patches, width, mlp, bias=True)
    return cases


def _flops(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> int:
    return 2 * x.shape[0] * weight.numel()


@op(_cases, model_cases=partial(quantized_model_cases, "int8"), flops=_flops, arithmetic=torch.int8)
def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ (weight * scale).T + bias, x rounded to int8 token by token.

    x: [num_tokens, in], weight: int8 [out, in], scale: float32 [out], bias: [out] → [num_tokens, out]. The sums of
    integers are exact, or those of float32; a token's result does not depend on the others beside it.
    """
    integers, x_scale = quantize_rows(x)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for first in range(0, weight.shape[0], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        product = F.linear(integers, weight[rows].to(torch.float32)) * x_scale * scale[rows]
        y[:, rows] = product if bias is None else product + bias[rows]
    return y
