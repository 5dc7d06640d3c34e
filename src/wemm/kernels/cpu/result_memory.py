"""Where large results lie: in memory of earlier ones, because fresh pages cost as much as a fast kernel.

What a step of the model leaves behind is kept, up to a limit, for the next one; `release` gives it back.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from wemm.checkpoint.weight_memory import HugePages, map_huge_pages

_SMALLEST = 2**20  # bytes; below, the heap is as good
_MOST_KEPT = 2**30
_GENEROUS = 1.25  # a result may lie in memory this many times as large


class ResultMemory:
    """Blocks of memory that were results and may become results again."""

    def __init__(self, most_kept: int = _MOST_KEPT) -> None:
        self._most_kept = most_kept
        self._free: list[HugePages] = []  # the longest unused first
        self._lock = threading.RLock()  # a result may die wherever Python collects it, even in here

    @property
    def kept_bytes(self) -> int:
        """What is held for later."""
        return sum(block.num_bytes for block in self._free)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; when the last reference to its storage goes, its memory comes back here."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _SMALLEST:
            return torch.empty(shape, dtype=dtype)
        block = self._take(num_bytes) or map_huge_pages(num_bytes)
        if block is None:
            return torch.empty(shape, dtype=dtype)
        lease = _lease_type(len(block.memory)).from_buffer(block.memory)
        weakref.finalize(lease, self._give_back, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=math.prod(shape), offset=block.start).view(*shape)

    def release(self) -> None:
        """Give back what is held for later."""
        with self._lock:
            self._free.clear()

    def _take(self, num_bytes: int) -> HugePages | None:
        with self._lock:
            fitting = [b for b in self._free if num_bytes <= b.num_bytes <= max(_GENEROUS * num_bytes, 2**21)]
            if not fitting:
                return None
            block = min(fitting, key=lambda b: b.num_bytes)
            self._free.remove(block)
            return block

    def _give_back(self, block: HugePages) -> None:
        with self._lock:
            self._free.append(block)
            while self.kept_bytes > self._most_kept:
                del self._free[0]


@functools.cache
def _lease_type(size: int) -> Any:
    # A type of its own, as plain arrays have no weak references.
    return type("Lease", (ctypes.c_char * size,), {})


_results = ResultMemory()
empty = _results.empty
release = _results.release
