"""Matrix product with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    weight = inputs.normal(1024, 512, scale=512**-0.5)
    return {
        "prefill": (inputs.normal(128, 512), weight, None),
        "decode": (inputs.normal(1, 512), weight, None),
        "bias": (inputs.normal(7, 512), weight, inputs.normal(1024)),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text, vision, down = shapes.config.text, shapes.config.vision, shapes.config.downsampler
    hidden, wide = text.hidden_size, text.intermediate_size
    decoder = {"wqkv": (text.wqkv_out, hidden), "wo": (hidden, hidden), "w1": (wide, hidden), "w2": (hidden, wide)}
    group = down.kernel_size**2 * down.visual_hidden_size

    def case(rows: int, out: int, width: int, bias: bool = False) -> tuple[Any, ...]:
        weight = inputs.normal(out, width, scale=width**-0.5)
        return inputs.normal(rows, width), weight, inputs.normal(out) if bias else None

    cases = {f"{name}, decode 1": partial(case, 1, *shape) for name, shape in decoder.items()}
    cases["output, decode 1"] = partial(case, 1, text.vocab_size, hidden)
    cases |= {f"w1, decode {n}": partial(case, n, wide, hidden) for n in shapes.decode_batches if n > 1}
    prompt = shapes.num_prompt_tokens
    cases |= {f"{name}, prefill {prompt}": partial(case, prompt, *shape) for name, shape in decoder.items()}
    patches, width, mlp = shapes.num_patches, vision.hidden_size, vision.intermediate_size
    cases[f"q_proj, tower {patches}"] = partial(case, patches, width, width, bias=True)
    cases[f"fc1, tower {patches}"] = partial(case, patches, mlp, width, bias=True)
    cases[f"fc2, tower {patches}"] = partial(case, patches, width, mlp, bias=True)
    cases[f"downsampler {shapes.num_image_tokens}"] = partial(case, shapes.num_image_tokens, hidden, group)
    return cases


def _flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> int:
    return 2 * x.shape[0] * weight.numel()


@op(_cases, model_cases=_model_cases, flops=_flops)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. x: [num_tokens, in], weight: [out, in], bias: [out] → [num_tokens, out]."""
    return F.linear(x, weight, bias)
