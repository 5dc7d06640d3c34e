"""The CPU."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from wemm.platforms.base import Platform
from wemm.platforms.topology import CpuShare, is_chosen, read_topology, share_out

logger = logging.getLogger(__name__)

_CGROUP = Path("/sys/fs/cgroup")


class CpuPlatform(Platform):
    """Main memory, bounded by the container if there is one."""

    ranks_share_memory = True
    decode_graph_sizes = tuple(range(1, 17))  # with more, the kernels' own time leaves little to win

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._before: tuple[set[int], int] | None = None
        self._occupied: set[int] = set()

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

    def cpu_shares(self, num_ranks: int) -> Sequence[CpuShare | None]:
        """By cores and NUMA nodes, unless the user has chosen."""
        if is_chosen(os.environ) or not hasattr(os, "sched_getaffinity"):
            return [None] * num_ranks
        topology = read_topology(Path("/"), os.sched_getaffinity(0))
        return (topology and share_out(topology, num_ranks)) or [None] * num_ranks

    def occupy(self, share: CpuShare | None) -> None:
        """This thread and those it starts, OpenMP's among them. Never more threads than torch has."""
        if share is None:
            return
        before = os.sched_getaffinity(0), torch.get_num_threads()
        try:
            os.sched_setaffinity(0, share.cpus)
        except OSError:  # forbidden here
            return
        self._before, self._occupied = before, set(share.cpus)
        torch.set_num_threads(min(share.threads, before[1]))
        logger.info("%d threads on CPUs %s", torch.get_num_threads(), ",".join(map(str, share.cpus)))

    def release(self) -> None:
        """To every thread that was started meanwhile, too."""
        if self._before is None:
            return
        (cpus, threads), self._before = self._before, None
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                if os.sched_getaffinity(int(task.name)) == self._occupied:
                    os.sched_setaffinity(int(task.name), cpus)
        torch.set_num_threads(threads)


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
