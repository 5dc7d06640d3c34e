"""Where weights lie: on a CPU in huge pages, so that reading them is not slowed down by looking pages up."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from wemm.quantization import Scheme

_HUGE_PAGE = 2**21
# Smaller ones would leave too much of their last page empty.
_SMALLEST = 2 * _HUGE_PAGE


def empty_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor that will be read over and over."""
    size = torch.Size(shape)
    num_bytes = size.numel() * dtype.itemsize
    if device.type != "cpu" or num_bytes < _SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages
        return torch.empty(size, dtype=dtype, device=device)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    # The tensor keeps the mapping, and is what ends it.
    return torch.frombuffer(memory, dtype=dtype, count=size.numel(), offset=start).view(size)


def empty_quantized(
    scheme: Scheme, out_size: int, in_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The uninitialised integers and scale of a weight [out, in]."""
    weight = empty_weight(scheme.weight_shape(out_size, in_size), scheme.weight_dtype, device)
    return weight, torch.empty(scheme.scale_shape(out_size, in_size), dtype=scheme.scale_dtype, device=device)
