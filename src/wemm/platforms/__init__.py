"""Facts about a device: which there are, how much memory is free, which dtype suits it."""

from __future__ import annotations

import torch

from wemm.errors import DeviceError
from wemm.platforms.base import Platform
from wemm.platforms.cpu import CpuPlatform
from wemm.platforms.cuda import CudaPlatform

_PLATFORMS: dict[str, type[Platform]] = {"cpu": CpuPlatform, "cuda": CudaPlatform}


def resolve_platform(device: str) -> Platform:
    """The platform of a device name; "auto" is CUDA if present, else the CPU. Raises DeviceError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {device!r} cannot be used: {reason}; try --device cpu") from None
    if resolved.type == "meta":
        raise DeviceError("device 'meta' holds no data; try --device cpu")
    return _PLATFORMS.get(resolved.type, Platform)(resolved)


__all__ = ["Platform", "resolve_platform"]
