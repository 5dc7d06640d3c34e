"""The CPU."""

from __future__ import annotations

import os
from pathlib import Path

from wemm.platforms.base import Platform

_CGROUP = Path("/sys/fs/cgroup")


class CpuPlatform(Platform):
    """Main memory, bounded by the container if there is one."""

    ranks_share_memory = True

    def available_memory(self) -> int | None:
        """Bytes that can be allocated without swapping."""
        limits = [limit for limit in (_meminfo(), _cgroup()) if limit is not None]
        if not limits:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(limits)

    def preferred_dtype(self, checkpoint_dtype: str) -> str:
        """bfloat16 for float16: CPUs multiply it natively or convert it by a shift."""
        return "bfloat16" if checkpoint_dtype == "float16" else checkpoint_dtype

    def max_num_batched_patches(self) -> int:
        """A CPU is some ten times slower than what the base assumes."""
        return 512


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemAvailable")


def _cgroup() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # The page cache counts as used but is given back when asked for.
    return None if limit == "max" else int(limit) - used + int(cached.get("inactive_file", 0))
