"""Between main memory and a device; on CUDA without waiting for what the device computes."""

from __future__ import annotations

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor → the same on the device, behind what that was asked for before; if it lies there, itself."""
    # From memory that may be swapped the driver copies when it has caught up.
    if device.type == "cuda" and x.is_cpu:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to main memory, behind what its device was asked for before."""

    def __init__(self, x: torch.Tensor) -> None:
        self._copy = x
        self._arrived: torch.cuda.Event | None = None
        if x.is_cuda:
            self._copy = x.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> torch.Tensor:
        """Once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.to("cpu")
