"""Linears, whole or cut over ranks by output rows (column-parallel) or input columns (row-parallel).

Their weights are of the model's dtype, or quantised by a scheme; the product is that of the scheme's op.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from wemm.distributed import TensorParallel
from wemm.ops.linear import linear
from wemm.ops.linear_gelu import linear_gelu
from wemm.ops.linear_int4 import linear_int4
from wemm.ops.linear_int4_silu_and_mul import linear_int4_silu_and_mul
from wemm.ops.linear_int8 import linear_int8
from wemm.ops.linear_int8_gelu import linear_int8_gelu
from wemm.ops.linear_int8_silu_and_mul import linear_int8_silu_and_mul
from wemm.ops.linear_silu_and_mul import linear_silu_and_mul
from wemm.quantization import Scheme

_PRODUCTS = {"int8": linear_int8, "int4": linear_int4}
_GATES = {"int8": linear_int8_silu_and_mul, "int4": linear_int4_silu_and_mul}


class QuantizableLinear(nn.Module):
    """y = W x (+ b), W as its scheme stores it; None: in the model's dtype."""

    def __init__(self, in_size: int, out_size: int, bias: bool, scheme: Scheme | None) -> None:
        super().__init__()
        self.scheme = scheme
        self.in_size = in_size
        self.weight_scale: nn.Parameter | None = None
        if scheme is None:
            self.weight = nn.Parameter(torch.empty(out_size, in_size))
        else:
            self.weight = _stored(scheme.weight_shape(out_size, in_size), scheme.weight_dtype)
            self.weight_scale = _stored(scheme.scale_shape(out_size, in_size), scheme.scale_dtype)
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None

    @property
    def own_dtypes(self) -> Mapping[str, torch.dtype]:
        """Parameters that are not of the model's dtype."""
        if self.scheme is None:
            return {}
        return {"weight": self.scheme.weight_dtype, "weight_scale": self.scheme.scale_dtype}

    def store(self, scheme: Scheme, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """From now on W is what `scheme` made of it."""
        self.scheme = scheme
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out]."""
        if self.scheme is None or self.weight_scale is None:
            return linear(x, self.weight, bias)
        return _PRODUCTS[self.scheme.name](x, self.weight, self.weight_scale, bias)

    def silu_times(self, up: QuantizableLinear, x: torch.Tensor) -> torch.Tensor:
        """silu(W x) * (W_up x), `up` being of the same sizes and scheme: [num_tokens, in] → [num_tokens, out]."""
        if self.scheme is None or self.weight_scale is None or up.weight_scale is None:
            return linear_silu_and_mul(x, self.weight, up.weight)
        return _GATES[self.scheme.name](x, self.weight, self.weight_scale, up.weight, up.weight_scale)

    @property
    def is_watched(self) -> bool:
        """Whether somebody, such as calibration or the doctor, waits for it to be called."""
        return bool(self._forward_pre_hooks or self._forward_hooks)


def _stored(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Linear(QuantizableLinear):
    """The same on every rank."""

    def __init__(self, in_size: int, out_size: int, bias: bool = True) -> None:
        super().__init__(in_size, out_size, bias, scheme=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out]."""
        return self.product(x, self.bias)


class ColumnParallelLinear(QuantizableLinear):
    """Every rank computes its share of the outputs; `gather` puts them side by side."""

    shard_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "weight_scale": 0, "bias": 0}

    def __init__(
        self,
        in_size: int,
        out_size: int,
        tensor_parallel: TensorParallel,
        gather: bool = False,
        bias: bool = False,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__(in_size, tensor_parallel.length(out_size), bias, scheme)
        self._tensor_parallel = tensor_parallel
        self._gather = gather

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out / ranks], or [num_tokens, out] if gathered."""
        y = self.product(x, self.bias)
        return self._tensor_parallel.all_gather(y) if self._gather else y


class ColumnParallelLinearGelu(ColumnParallelLinear):
    """With a bias, then GELU (tanh form): every rank activates its share."""

    def __init__(
        self, in_size: int, out_size: int, tensor_parallel: TensorParallel, scheme: Scheme | None = None
    ) -> None:
        super().__init__(in_size, out_size, tensor_parallel, bias=True, scheme=scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out / ranks]."""
        assert self.bias is not None
        if self.scheme is None:
            return linear_gelu(x, self.weight, self.bias)
        assert self.weight_scale is not None
        return linear_int8_gelu(x, self.weight, self.weight_scale, self.bias)


class RowParallelLinear(QuantizableLinear):
    """Every rank takes its share of the inputs; the results are summed over ranks, then the bias is added."""

    shard_dims: ClassVar[Mapping[str, int]] = {"weight": 1, "weight_scale": 1}

    def __init__(
        self, in_size: int, out_size: int, tensor_parallel: TensorParallel, scheme: Scheme | None = None
    ) -> None:
        super().__init__(tensor_parallel.length(in_size), out_size, bias=True, scheme=scheme)
        self._tensor_parallel = tensor_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in / ranks] → [num_tokens, out]."""
        if self._tensor_parallel.size == 1:
            return self.product(x, self.bias)
        assert self.bias is not None
        return self._tensor_parallel.all_reduce(self.product(x)) + self.bias
