"""Angles of the rotary embedding; the rotation itself is in `ops`."""

from __future__ import annotations

import functools

import torch

from wemm.config import TextConfig


def rotary_angles(positions: torch.Tensor, config: TextConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [num_tokens, head_dim/2], of int64 positions [num_tokens].

    Frequencies are computed in float64 and rounded, as in the original. Linear scaling divides the
    positions; dynamic scaling acts only beyond max_position_embeddings, which no request reaches.
    """
    frequencies = _frequencies(config.head_dim, config.rope_theta, positions.device)
    scaled = positions.to(torch.float32)
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        scaled = scaled / config.rope_scaling.factor
    angles = torch.outer(scaled, frequencies)
    return angles.cos(), angles.sin()


@functools.cache  # a copy from main memory would wait for the device in every step
def _frequencies(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (1.0 / theta**exponents).to(torch.float32).to(device)
