"""PLoRA: the low-rank update of a linear, on image tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, looser, op, tensor_bytes


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    plora_a, plora_b = inputs.normal(64, 512, scale=512**-0.5), inputs.normal(768, 64, scale=64**-0.5)
    x, y = inputs.normal(96, 512), inputs.normal(96, 768)
    rows = inputs.permutation(96)[:50].sort().values
    return {
        "image and text": (y, x, plora_a, plora_b, 2.0, rows),
        "one image": (y, x, plora_a, plora_b, 1.0, torch.arange(3, 80, device=inputs.device)),
        "image only": (y, x, plora_a, plora_b, 0.5, torch.arange(96, device=inputs.device)),
        "text only": (y, x, plora_a, plora_b, 1.0, rows[:0]),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    plora, text = shapes.plora, shapes.config.text
    if plora is None:
        return {}
    hidden, wide, tokens = text.hidden_size, text.intermediate_size, shapes.num_prompt_tokens
    sizes = {"attention.wqkv": (text.wqkv_out, hidden), "attention.wo": (hidden, hidden),
             "feed_forward.w1": (wide, hidden), "feed_forward.w2": (hidden, wide)}  # fmt: skip

    def case(name: str) -> tuple[Any, ...]:
        (out, width), rank = sizes[name], plora.rank(name)
        plora_a = inputs.normal(rank, width, scale=width**-0.5)
        plora_b = inputs.normal(out, rank, scale=rank**-0.5)
        image_rows = torch.arange(shapes.num_image_tokens, device=inputs.device)
        y, x = inputs.normal(tokens, out), inputs.normal(tokens, width)
        return y, x, plora_a, plora_b, plora.scaling(name), image_rows

    label = f"prefill {tokens}, {shapes.num_image_tokens} image"
    return {f"{name.split('.')[1]}, {label}": partial(case, name) for name in sizes}


def _flops(
    y: torch.Tensor,
    x: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> int:
    return 2 * len(image_rows) * (plora_a.numel() + plora_b.numel())


def _moved_bytes(
    y: torch.Tensor,
    x: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> int:
    touched = len(image_rows) * (2 * y.shape[1] + x.shape[1]) * y.element_size()
    return touched + tensor_bytes((plora_a, plora_b, image_rows))


# Rounded on the way: A x, the update, and the sum, into which y comes rounded.
@op(_cases, looser(2), model_cases=_model_cases, flops=_flops, moved_bytes=_moved_bytes)
def add_plora(
    y: torch.Tensor,
    x: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> torch.Tensor:
    """y += scaling * B(A x) in place, on `image_rows` only; returns y.

    y: [num_tokens, out], x: [num_tokens, in], plora_a: [r, in], plora_b: [out, r],
    image_rows: int64 [num_image_tokens], distinct.
    """
    update = F.linear(F.linear(x[image_rows], plora_a) * scaling, plora_b)
    return y.index_add_(0, image_rows, update)
