"""Norms with their weights; the arithmetic is in `ops`."""

from __future__ import annotations

import torch
from torch import nn

from wemm.ops.add_rms_norm import add_rms_norm
from wemm.ops.layer_norm import layer_norm
from wemm.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Of the language model."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] → same."""
        return rms_norm(x, self.weight, self._eps)


class AddRMSNorm(RMSNorm):
    """Of a sum."""

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """The norm of y + x, and y + x; all [..., hidden_size], y given away."""
        return add_rms_norm(y, x, self.weight, self._eps)


class LayerNorm(nn.Module):
    """Of the vision tower."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] → same."""
        return layer_norm(x, self.weight, self.bias, self._eps)
