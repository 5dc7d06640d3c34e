"""Rows of a table: token embedding, position embedding, separator rows."""

from __future__ import annotations

import torch
from torch import nn


class Embedding(nn.Module):
    """The same on every rank."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [n] → [n, hidden_size]."""
        return self.weight[ids]
