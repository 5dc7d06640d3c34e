"""What is true of any torch device."""

from __future__ import annotations

import torch


class Platform:
    """A device without facts of its own: everything runs, by the definitions."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available_memory(self) -> int | None:
        """Bytes that can be allocated now; None if the device does not tell."""
        return None

    def preferred_dtype(self, checkpoint_dtype: str) -> str:
        """The dtype that "auto" means here."""
        return checkpoint_dtype

    def synchronize(self) -> None:
        """Wait until everything queued is done, so that clocks tell the truth."""
