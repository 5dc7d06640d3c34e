"""PLoRA: a linear whose low-rank update acts on image tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, looser, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    weight = inputs.normal(768, 512, scale=512**-0.5)
    plora_a, plora_b = inputs.normal(64, 512, scale=512**-0.5), inputs.normal(768, 64, scale=64**-0.5)
    x = inputs.normal(96, 512)
    rows = inputs.permutation(96)[:50].sort().values
    return {
        "image and text": (x, weight, plora_a, plora_b, 2.0, rows),
        "image only": (x, weight, plora_a, plora_b, 1.0, torch.arange(96, device=inputs.device)),
        "text only": (x, weight, plora_a, plora_b, 1.0, rows[:0]),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    plora, text = shapes.plora, shapes.config.text
    if plora is None:
        return {}
    hidden, wide, rows = text.hidden_size, text.intermediate_size, shapes.num_prompt_tokens
    sizes = {"attention.wqkv": (text.wqkv_out, hidden), "attention.wo": (hidden, hidden),
             "feed_forward.w1": (wide, hidden), "feed_forward.w2": (hidden, wide)}  # fmt: skip

    def case(name: str) -> tuple[Any, ...]:
        (out, width), rank = sizes[name], plora.rank(name)
        weight = inputs.normal(out, width, scale=width**-0.5)
        plora_a, plora_b = (
            inputs.normal(rank, width, scale=width**-0.5),
            inputs.normal(out, rank, scale=rank**-0.5),
        )
        image_rows = torch.arange(shapes.num_image_tokens, device=inputs.device)
        return inputs.normal(rows, width), weight, plora_a, plora_b, plora.scaling(name), image_rows

    label = f"prefill {rows}, {shapes.num_image_tokens} image"
    return {f"{name.split('.')[1]}, {label}": partial(case, name) for name in sizes}


def _flops(
    x: torch.Tensor,
    weight: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> int:
    return 2 * (x.shape[0] * weight.numel() + len(image_rows) * (plora_a.numel() + plora_b.numel()))


# The base product and the update are each rounded before they are added: two more roundings.
@op(_cases, looser(2), model_cases=_model_cases, flops=_flops)
def plora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> torch.Tensor:
    """weight x + scaling * B(A x), the second term on `image_rows` only.

    x: [num_tokens, in], weight: [out, in], plora_a: [r, in], plora_b: [out, r],
    image_rows: int64 [num_image_tokens], distinct → [num_tokens, out].
    """
    y = F.linear(x, weight)
    update = F.linear(F.linear(x[image_rows], plora_a) * scaling, plora_b)
    return y.index_add(0, image_rows, update)
