"""oneDNN applies the activation to its sums: the wide result is written once, not read and written again."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wemm.kernels.cpu.linear import HAS_PRODUCT
from wemm.ops.linear import linear
from wemm.ops.linear_gelu import linear_gelu


def _supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    return x.dtype is torch.bfloat16 and x.dim() == 2 and len(x) > 0


if HAS_PRODUCT[torch.bfloat16] and hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @linear_gelu.impl("onednn", device="cpu", supports=_supports)
    def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return result


def _has_no_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    return not HAS_PRODUCT.get(x.dtype, True)


if not all(HAS_PRODUCT.values()):

    @linear_gelu.impl("after_linear", device="cpu", supports=_has_no_product)
    def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.gelu(linear(x, weight, bias), approximate="tanh")
