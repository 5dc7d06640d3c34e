"""NVIDIA GPUs."""

from __future__ import annotations

import torch

from wemm.platforms.base import Platform


class CudaPlatform(Platform):
    """One CUDA device."""

    collective_backend = "nccl"
    computes_beside_cpu = True
    decode_graph_sizes = (1, 2, 4, 8, 16, 32, 64)

    def available_memory(self) -> int | None:
        """Bytes the driver has free."""
        return torch.cuda.mem_get_info(self.device)[0]

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
