"""NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wemm.platforms.base import Platform


class CudaPlatform(Platform):
    """One CUDA device."""

    collective_backend = "nccl"
    computes_beside_cpu = True
    decode_graph_sizes = (1, 2, 4, 8, 16, 32, 64)

    def available_memory(self) -> int | None:
        """Bytes the driver has free, when torch has given back what it holds unused."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak_memory(self, work: Callable[[], None]) -> int | None:
        """Of what torch allocates.

        Not of what it reserves: with room to spare that grows by pieces which it would use again, or give back,
        before it ran out. What libraries take besides lasts, and is missing in `available_memory` from then on.
        """
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def preferred_dtype(self, checkpoint_dtype: str) -> str:
        """float16 where bfloat16 is not native (before Ampere)."""
        if checkpoint_dtype == "bfloat16" and torch.cuda.get_device_capability(self.device) < (8, 0):
            return "float16"
        return checkpoint_dtype

    def max_num_batched_patches(self) -> int:
        """A large image at once: a tenth of a second on an H200."""
        return 16_384

    def select(self) -> None:
        """Triton asks for the current device of the thread, not for that of its arguments."""
        if self.device.index is not None:
            torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)
