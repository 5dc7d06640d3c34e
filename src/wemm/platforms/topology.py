"""Where threads run: the cores that this process may use, and each tensor-parallel rank's share of them.

One hardware thread of each core: two of one core share its arithmetic, and a product waits for its slowest thread.
Whole NUMA nodes where that is fair: a rank then reads its weights from memory beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

_CHOSEN_BY = (
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
)
_FAIR = 0.75
"""Of an equal share: a rank with less would keep the others waiting for more than its near memory gains."""


@dataclass(frozen=True)
class Core:
    """One physical core."""

    node: int
    """NUMA node."""
    cpus: tuple[int, ...]
    """Its hardware threads that this process may use."""


@dataclass(frozen=True)
class Topology:
    """What a process may use of a machine."""

    cores: tuple[Core, ...]
    """By node, then by number."""
    is_whole: bool
    """False: somebody (taskset, a container) has chosen among the CPUs."""
    quota: float | None
    """CPUs' worth of time that the container may take."""


@dataclass(frozen=True)
class CpuShare:
    """Where the threads of one rank run."""

    cpus: tuple[int, ...]
    threads: int


def share_out(topology: Topology, num_ranks: int) -> tuple[CpuShare, ...] | None:
    """The share of each rank; None where there are more ranks than cores."""
    cores, quota = topology.cores, topology.quota
    if num_ranks > len(cores):
        return None
    parts = _by_nodes(cores, num_ranks)
    if parts is None or min(map(len, parts)) < _FAIR * len(cores) / num_ranks:
        parts = _equally(cores, num_ranks)
    threads = len(cores) if quota is None else max(1, int(quota / num_ranks))
    # Which of shared CPUs are idle, only the scheduler knows.
    is_ours = topology.is_whole and (quota is None or quota >= len(cores))
    return tuple(
        CpuShare(
            tuple(sorted(chain.from_iterable(core.cpus[:1] if is_ours else core.cpus for core in part))),
            min(threads, len(part)),
        )
        for part in parts
    )


def _by_nodes(cores: Sequence[Core], num_ranks: int) -> list[Sequence[Core]] | None:
    """Several nodes to a rank, or several ranks to a node."""
    nodes = [tuple(group) for _, group in groupby(cores, lambda core: core.node)]
    if len(nodes) % num_ranks == 0:
        together = len(nodes) // num_ranks
        return [tuple(chain(*nodes[i : i + together])) for i in range(0, len(nodes), together)]
    if num_ranks % len(nodes) == 0:
        return [part for node in nodes for part in _equally(node, num_ranks // len(nodes))]
    return None


def _equally(cores: Sequence[Core], count: int) -> list[Sequence[Core]]:
    size = len(cores) // count
    return [cores[i * size : (i + 1) * size] for i in range(count)]


def is_chosen(environment: Mapping[str, str]) -> bool:
    """True if the user has said how many threads there are, or where they run."""
    return any(name in environment for name in _CHOSEN_BY)


def read_topology(root: Path, allowed: set[int]) -> Topology | None:
    """Of the machine whose /sys and /proc lie under `root`, for a process that may use CPUs `allowed`.

    None where it cannot be told, and where cores differ in speed: which of them suits whom, the scheduler knows.
    """
    system = root / "sys/devices/system"
    try:
        online = parse_cpus((system / "cpu/online").read_text())
        usable = sorted(online & allowed)
        nodes = _nodes(system / "node")
        cores = {
            Core(nodes.get(cpu, 0), tuple(sorted(_siblings(system / f"cpu/cpu{cpu}/topology") & set(usable))))
            for cpu in usable
        }
        if not cores or _differ_in_speed(root, usable):
            return None
        quota = _quota(root)
    except (OSError, ValueError):
        return None
    by_node = tuple(sorted(cores, key=lambda core: (core.node, core.cpus)))
    return Topology(by_node, usable == sorted(online), quota)


def parse_cpus(text: str) -> set[int]:
    """A list as the kernel writes it, "0-3,8"."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _siblings(directory: Path) -> set[int]:
    name = "core_cpus_list" if (directory / "core_cpus_list").exists() else "thread_siblings_list"
    return parse_cpus((directory / name).read_text())


def _nodes(directory: Path) -> dict[int, int]:
    """CPU → NUMA node; empty for a kernel that knows of no nodes."""
    files = directory.glob("node[0-9]*/cpulist")
    return {cpu: int(file.parent.name[4:]) for file in files for cpu in parse_cpus(file.read_text())}


def _differ_in_speed(root: Path, cpus: Sequence[int]) -> bool:
    if (root / "sys/devices/cpu_atom").exists():  # Intel's efficient cores
        return True
    files = [root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity" for cpu in cpus]
    return len({file.read_text().strip() for file in files if file.exists()}) > 1


def _quota(root: Path) -> float | None:
    """The tightest cpu.max of this process's control groups (version 2), in CPUs."""
    cgroups, process = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    lines = process.read_text().splitlines() if process.exists() else []
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    directories = [cgroups / own, *(cgroups / own).parents]
    quotas = []
    for directory in directories[: directories.index(cgroups) + 1]:
        file = directory / "cpu.max"
        limit, period = file.read_text().split() if file.exists() else ("max", "")
        if limit != "max":
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)
