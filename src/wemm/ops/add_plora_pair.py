"""PLoRA of two linears that are given the same: w1 and w3 of the feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.add_plora import add_plora
from wemm.ops.registry import Inputs, LazyCases, ModelShapes, looser, op, tensor_bytes


def _case(
    inputs: Inputs, tokens: int, width: int, out: int, rank: int, scalings: tuple[float, float], rows: torch.Tensor
) -> tuple[Any, ...]:
    factors = (
        (inputs.normal(rank, width, scale=width**-0.5), inputs.normal(out, rank, scale=rank**-0.5))
        for _ in scalings
    )
    (gate_a, gate_b), (up_a, up_b) = factors
    gate, up, x = inputs.normal(tokens, out), inputs.normal(tokens, out), inputs.normal(tokens, width)
    return gate, up, x, gate_a, gate_b, scalings[0], up_a, up_b, scalings[1], rows


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    case = partial(_case, inputs, 96, 512, 384, 64)
    rows = inputs.permutation(96)[:50].sort().values
    return {
        "image and text": case((2.0, 2.0), rows),
        "one image": case((1.0, 0.5), torch.arange(3, 80, device=inputs.device)),
        "text only": case((1.0, 1.0), rows[:0]),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    plora, text = shapes.plora, shapes.config.text
    if plora is None:
        return {}
    tokens, images = shapes.num_prompt_tokens, shapes.num_image_tokens
    names = "feed_forward.w1", "feed_forward.w3"
    ranks = {plora.rank(name) for name in names}
    if len(ranks) > 1:
        return {}

    def case() -> tuple[Any, ...]:
        [rank], [gate_scaling, up_scaling] = ranks, map(plora.scaling, names)
        rows = torch.arange(images, device=inputs.device)
        sizes = tokens, text.hidden_size, text.intermediate_size, rank
        return _case(inputs, *sizes, (gate_scaling, up_scaling), rows)

    return {f"prefill {tokens}, {images} image": case}


def _flops(
    gate: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    gate_a: torch.Tensor,
    gate_b: torch.Tensor,
    gate_scaling: float,
    up_a: torch.Tensor,
    up_b: torch.Tensor,
    up_scaling: float,
    image_rows: torch.Tensor,
) -> int:
    return 2 * len(image_rows) * sum(factor.numel() for factor in (gate_a, gate_b, up_a, up_b))


def _moved_bytes(
    gate: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    gate_a: torch.Tensor,
    gate_b: torch.Tensor,
    gate_scaling: float,
    up_a: torch.Tensor,
    up_b: torch.Tensor,
    up_scaling: float,
    image_rows: torch.Tensor,
) -> int:
    touched = len(image_rows) * (2 * gate.shape[1] + 2 * up.shape[1] + x.shape[1]) * x.element_size()
    return touched + tensor_bytes((gate_a, gate_b, up_a, up_b, image_rows))


# As add_plora.
@op(_cases, looser(2), model_cases=_model_cases, flops=_flops, moved_bytes=_moved_bytes)
def add_plora_pair(
    gate: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    gate_a: torch.Tensor,
    gate_b: torch.Tensor,
    gate_scaling: float,
    up_a: torch.Tensor,
    up_b: torch.Tensor,
    up_scaling: float,
    image_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """add_plora of two products of x, in place: returns gate and up.

    gate and up: [num_tokens, out], x: [num_tokens, in], A: [r, in], B: [out, r],
    image_rows: int64 [num_image_tokens], distinct.
    """
    return (
        add_plora(gate, x, gate_a, gate_b, gate_scaling, image_rows),
        add_plora(up, x, up_a, up_b, up_scaling, image_rows),
    )
