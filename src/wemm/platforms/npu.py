"""Ascend NPUs, through torch_npu. Not yet run on one: docs/ascend.md."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch

from wemm.errors import DeviceError
from wemm.platforms.base import Platform

logger = logging.getLogger(__name__)


def load_torch_npu() -> None:
    """Make "npu" a device type of torch. Raises DeviceError."""
    if importlib.util.find_spec("torch_npu") is None:
        raise DeviceError(
            "device 'npu' needs torch_npu, which is not installed; "
            "pip install 'wemm[npu]', of the version of torch (docs/ascend.md), or try --device cpu"
        )
    try:
        import torch_npu  # noqa: F401 - registers the device
    except (ImportError, OSError, RuntimeError) as error:  # without CANN, or made for another torch
        reason = str(error).splitlines()[0]
        raise DeviceError(
            f"device 'npu' cannot be used, torch_npu does not load: {reason}; "
            "install CANN and source its set_env.sh (docs/ascend.md), or try --device cpu"
        ) from None


def is_npu_present() -> bool:
    """True if there is a card, and what it takes to use it."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        load_torch_npu()
    except DeviceError as error:
        logger.info("%s", error)
        return False
    import torch_npu

    return bool(torch_npu.npu.is_available())


class NpuPlatform(Platform):
    """One NPU."""

    collective_backend = "hccl"

    def __init__(self, device: torch.device) -> None:
        import torch_npu

        super().__init__(device)
        # Shapes change from step to step, and rotation of any width is documented for ready-made kernels only.
        torch_npu.npu.set_compile_mode(jit_compile=False)

    def available_memory(self) -> int | None:
        """Bytes the driver has free, when torch_npu has given back what it holds unused."""
        import torch_npu

        torch_npu.npu.empty_cache()
        return int(torch_npu.npu.mem_get_info(self.device)[0])

    def peak_memory(self, work: Callable[[], None]) -> int | None:
        """Of what torch_npu allocates, as for CUDA."""
        import torch_npu

        torch_npu.npu.synchronize(self.device)
        before = int(torch_npu.npu.memory_allocated(self.device))
        torch_npu.npu.reset_peak_memory_stats(self.device)
        work()
        torch_npu.npu.synchronize(self.device)
        return int(torch_npu.npu.max_memory_allocated(self.device)) - before

    def preferred_dtype(self, checkpoint_dtype: str) -> str:
        """float16 where bfloat16 is not supported, and for float32, which the fused attention does not take."""
        import torch_npu

        if checkpoint_dtype == "bfloat16" and torch_npu.npu.is_bf16_supported():
            return "bfloat16"
        return "float16"

    def select(self) -> None:
        """HCCL and workspaces ask for the current card of the thread."""
        import torch_npu

        if self.device.index is not None:
            torch_npu.npu.set_device(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch_npu

        torch_npu.npu.synchronize(self.device)
