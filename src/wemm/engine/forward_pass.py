"""What a step leaves on the device: logits, and whether they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wemm.model.wemm import WemmModel


@dataclass(frozen=True)
class Forwarded:
    """Of the rows whose logits were wanted."""

    logits: torch.Tensor  # float32 [num_logits, vocab_size]
    is_finite: torch.Tensor  # bool [num_logits, 2]: hidden states, logits


def output_layer(model: WemmModel, hidden: torch.Tensor) -> Forwarded:
    """Normed hidden states [num_logits, hidden_size] → their logits."""
    logits = model.compute_logits(hidden)
    return Forwarded(logits, torch.stack((_are_finite(hidden), _are_finite(logits)), dim=1))


def _are_finite(x: torch.Tensor) -> torch.Tensor:
    """bool [num_rows]: NaN and infinities of a row show in its smallest or its largest value."""
    return torch.stack((x.amin(dim=-1), x.amax(dim=-1))).isfinite().all(dim=0)
