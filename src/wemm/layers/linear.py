"""Linears, whole or cut over ranks by output rows (column-parallel) or input columns (row-parallel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from wemm.distributed import TensorParallel
from wemm.ops.linear import linear


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

    shard_dims: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __init__(self, in_size: int, out_size: int, tensor_parallel: TensorParallel, gather: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tensor_parallel.length(out_size), in_size))
        self._tensor_parallel = tensor_parallel
        self._gather = gather

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out / ranks], or [num_tokens, out] if gathered."""
        y = linear(x, self.weight)
        return self._tensor_parallel.all_gather(y) if self._gather else y
