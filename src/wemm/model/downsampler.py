"""Patch features → visual tokens in the language model's width: k x k patches become one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from wemm.config import DownsamplerConfig
from wemm.layers.linear import Linear
from wemm.ops.linear import linear


class GroupConv(nn.Module):
    """A convolution whose stride is its kernel, over features already grouped k x k."""

    def __init__(self, config: DownsamplerConfig) -> None:
        super().__init__()
        k = config.kernel_size
        self.weight = nn.Parameter(torch.empty(config.llm_hidden_size, config.visual_hidden_size, k, k))
        self.bias = nn.Parameter(torch.empty(config.llm_hidden_size)) if config.bias else None

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        """[num_tokens, visual_hidden_size * k * k] → [num_tokens, llm_hidden_size]."""
        return linear(groups, self.weight.flatten(1), self.bias)


class Downsampler(nn.Module):
    """Group convolution, then depth-1 x [GELU (erf), Linear]."""

    def __init__(self, config: DownsamplerConfig) -> None:
        super().__init__()
        self._kernel_size = config.kernel_size
        self.conv = GroupConv(config)
        self.linears = nn.ModuleList(
            Linear(config.llm_hidden_size, config.llm_hidden_size, config.bias) for _ in range(config.depth - 1)
        )

    def forward(self, features: torch.Tensor, patch_grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Packed features [num_patches, visual_hidden_size] → packed tokens [num_tokens, llm_hidden_size]."""
        sizes = [rows * columns for rows, columns in patch_grids]
        images = zip(features.split(sizes), patch_grids, strict=True)
        x = self.conv(torch.cat([group_patches(image, grid, self._kernel_size) for image, grid in images]))
        for layer in self.linears:
            x = layer(F.gelu(x))
        return x


def group_patches(features: torch.Tensor, patch_grid: tuple[int, int], k: int) -> torch.Tensor:
    """[rows * columns, hidden] → [ceil(rows/k) * ceil(columns/k), hidden * k * k], row-major.

    The last row and column are repeated to fill whole groups.
    """
    rows, columns = patch_grid
    grid = features.view(rows, columns, -1)
    grid = torch.cat([grid, *[grid[-1:]] * (-rows % k)], dim=0)
    grid = torch.cat([grid, *[grid[:, -1:]] * (-columns % k)], dim=1)
    groups = grid.view(grid.shape[0] // k, k, grid.shape[1] // k, k, -1)
    return groups.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)
