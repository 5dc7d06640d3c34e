"""Facts about a device: which there are, how much memory is free, which dtype suits it."""

from __future__ import annotations

import torch

from wemm.errors import DeviceError
from wemm.platforms.base import Platform
from wemm.platforms.cpu import CpuPlatform
from wemm.platforms.cuda import CudaPlatform
from wemm.platforms.npu import NpuPlatform, is_npu_present, load_torch_npu

_PLATFORMS: dict[str, type[Platform]] = {"cpu": CpuPlatform, "cuda": CudaPlatform, "npu": NpuPlatform}


def resolve_platform(device: str, rank: int | None = None) -> Platform:
    """The platform of a device name; "auto" is CUDA if present, else an NPU, else the CPU. Raises DeviceError.

    With a tensor-parallel rank, a device type without a number means the device of that number.
    """
    if device == "auto":
        device = _best()
    if device.partition(":")[0] == "npu":
        load_torch_npu()
    try:
        resolved = torch.device(device)
        if rank is not None and resolved.type != "cpu" and resolved.index is None:
            resolved = torch.device(resolved.type, rank)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {device!r} cannot be used: {reason}; try --device cpu") from None
    if resolved.type == "meta":
        raise DeviceError("device 'meta' holds no data; try --device cpu")
    return _PLATFORMS.get(resolved.type, Platform)(resolved)


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "npu" if is_npu_present() else "cpu"


__all__ = ["Platform", "resolve_platform"]
