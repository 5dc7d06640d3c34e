"""The sum that ends every half of a transformer layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op, tensor_bytes


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    return {
        "prefill": (inputs.normal(70, 515), inputs.normal(70, 515)),
        "decode": (inputs.normal(1, 128), inputs.normal(1, 128)),
        "none": (inputs.normal(0, 8), inputs.normal(0, 8)),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text, vision = shapes.config.text.hidden_size, shapes.config.vision.hidden_size

    def case(rows: int, width: int) -> tuple[Any, ...]:
        return inputs.normal(rows, width), inputs.normal(rows, width)

    prompt, patches = shapes.num_prompt_tokens, shapes.num_patches
    return {
        **{f"decode {n}": partial(case, n, text) for n in shapes.decode_batches},
        f"prefill {prompt}": partial(case, prompt, text),
        f"tower {patches}": partial(case, patches, vision),
    }


def _flops(y: torch.Tensor, x: torch.Tensor) -> int:
    return y.numel()


def _moved_bytes(y: torch.Tensor, x: torch.Tensor) -> int:
    return tensor_bytes((y, y, x))


@op(_cases, model_cases=_model_cases, flops=_flops, moved_bytes=_moved_bytes)
def add_residual(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y + x, both [rows, hidden_size]. y is given away: a kernel may return the sum in its place."""
    return y + x
