"""Where weights lie: on a CPU in huge pages, so that reading them is not slowed down by looking pages up."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wemm.quantization import Scheme

_HUGE_PAGE = 2**21
# Smaller ones would leave too much of their last page empty.
_SMALLEST = 2 * _HUGE_PAGE


@dataclass(frozen=True)
class HugePages:
    """Whole huge pages, as long as the object that maps them lives."""

    memory: mmap.mmap
    start: int
    """Offset in `memory` at which the first page begins."""
    num_bytes: int


def map_huge_pages(num_bytes: int) -> HugePages | None:
    """As many as hold `num_bytes`; None where the system has none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    size = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return None
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return HugePages(memory, -address % _HUGE_PAGE, size)


def empty_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor that will be read over and over."""
    size = torch.Size(shape)
    num_bytes = size.numel() * dtype.itemsize
    is_large = device.type == "cpu" and num_bytes >= _SMALLEST
    pages = map_huge_pages(num_bytes) if is_large else None
    if pages is None:
        return torch.empty(size, dtype=dtype, device=device)
    # The tensor keeps the mapping, and is what ends it.
    return torch.frombuffer(pages.memory, dtype=dtype, count=size.numel(), offset=pages.start).view(size)


def empty_quantized(
    scheme: Scheme, out_size: int, in_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The uninitialised integers and scale of a weight [out, in]."""
    weight = empty_weight(scheme.weight_shape(out_size, in_size), scheme.weight_dtype, device)
    return weight, torch.empty(scheme.scale_shape(out_size, in_size), dtype=scheme.scale_dtype, device=device)
