"""Linears, whole or cut over ranks by output rows (column-parallel) or input columns (row-parallel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from wemm.distributed import TensorParallel
from wemm.ops.linear import linear
from wemm.ops.linear_gelu import linear_gelu


class Linear(nn.Module):
    """y = W x + b, the same on every rank."""

    def __init__(self, in_size: int, out_size: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out]."""
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(nn.Module):
    """Every rank computes its share of the outputs; `gather` puts them side by side."""

    shard_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}

    def __init__(
        self,
        in_size: int,
        out_size: int,
        tensor_parallel: TensorParallel,
        gather: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        length = tensor_parallel.length(out_size)
        self.weight = nn.Parameter(torch.empty(length, in_size))
        self.bias = nn.Parameter(torch.empty(length)) if bias else None
        self._tensor_parallel = tensor_parallel
        self._gather = gather

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out / ranks], or [num_tokens, out] if gathered."""
        y = linear(x, self.weight, self.bias)
        return self._tensor_parallel.all_gather(y) if self._gather else y


class ColumnParallelLinearGelu(ColumnParallelLinear):
    """With a bias, then GELU (tanh form): every rank activates its share."""

    def __init__(self, in_size: int, out_size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__(in_size, out_size, tensor_parallel, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out / ranks]."""
        assert self.bias is not None
        return linear_gelu(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Every rank takes its share of the inputs; the results are summed over ranks, then the bias is added."""

    shard_dims: ClassVar[Mapping[str, int]] = {"weight": 1}

    def __init__(self, in_size: int, out_size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, tensor_parallel.length(in_size)))
        self.bias = nn.Parameter(torch.empty(out_size))
        self._tensor_parallel = tensor_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in / ranks] → [num_tokens, out]."""
        if self._tensor_parallel.size == 1:
            return linear(x, self.weight, self.bias)
        return self._tensor_parallel.all_reduce(linear(x, self.weight)) + self.bias
