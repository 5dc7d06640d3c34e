"""What is true of any torch device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from wemm.platforms.topology import CpuShare


class Platform:
    """A device without facts of its own: everything runs, by the definitions."""

    collective_backend = "gloo"
    """Of torch.distributed, for tensors of this device."""
    ranks_share_memory = False
    """True if what one tensor-parallel rank takes is missing for the others."""
    computes_beside_cpu = False
    """True if the device computes a step while the next one is prepared."""
    decode_graph_sizes: tuple[int, ...] = ()
    """Numbers of sequences for which decode steps are recorded, rising; with fewer, a step is filled up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available_memory(self) -> int | None:
        """Bytes that can be allocated now; None if the device does not tell."""
        return None

    def peak_memory(self, work: Callable[[], None]) -> int | None:
        """Do `work`; bytes it had allocated at its peak beyond what was allocated before.

        None, and nothing is done, where the device does not tell or shares its memory with other programs.
        """
        return None

    def preferred_dtype(self, checkpoint_dtype: str) -> str:
        """The dtype that "auto" means here."""
        return checkpoint_dtype

    def max_num_batched_patches(self) -> int:
        """Vision work of one step that running decodes can wait for."""
        return 4096

    def cpu_shares(self, num_ranks: int) -> Sequence[CpuShare | None]:
        """Where the threads of each tensor-parallel rank run; None: where the system puts them."""
        return [None] * num_ranks

    def occupy(self, share: CpuShare | None) -> None:
        """Compute there from now on."""

    def release(self) -> None:
        """Give the process back what `occupy` took."""

    def select(self) -> None:
        """Before a step: what this thread launches runs here."""

    def synchronize(self) -> None:
        """Wait until everything queued is done, so that clocks tell the truth."""
