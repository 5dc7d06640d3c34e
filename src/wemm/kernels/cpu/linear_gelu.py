"""oneDNN applies the activation to its sums: the wide result is written once, not read and written again."""

from __future__ import annotations

import torch

from wemm.ops.linear_gelu import linear_gelu


def _supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    return (
        x.dtype is torch.bfloat16 and x.dim() == 2 and len(x) > 0 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @linear_gelu.impl("onednn", device="cpu", supports=_supports)
    def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return result
