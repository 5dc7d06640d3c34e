"""Which CPUs each rank computes on, on machines of all kinds; and that a caller gets its own back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemm.platforms.topology import Core, CpuShare, Topology, is_chosen, parse_cpus, read_topology, share_out


class Machine:
    """A tree of files as Linux shows one."""

    def __init__(self, root: Path, cores: dict[int, list[tuple[int, ...]]], offline: tuple[int, ...] = ()) -> None:
        """cores: NUMA node → hardware threads of each of its cores."""
        self.root = root
        self.cpus = {cpu for node in cores.values() for core in node for cpu in core} - set(offline)
        self.write("sys/devices/system/cpu/online", ",".join(map(str, sorted(self.cpus))))
        for node, of_node in cores.items():
            online = [cpu for core in of_node for cpu in core if cpu in self.cpus]
            self.write(f"sys/devices/system/node/node{node}/cpulist", ",".join(map(str, online)))
            for core in of_node:
                siblings = [cpu for cpu in core if cpu in self.cpus]
                for cpu in siblings:
                    self.write(self.topology(cpu), ",".join(map(str, siblings)))

    @staticmethod
    def topology(cpu: int) -> str:
        return f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def shares(self, num_ranks: int = 1, allowed: set[int] | None = None) -> list[tuple[list[int], int]] | None:
        """(CPUs, threads) of each rank."""
        topology = read_topology(self.root, self.cpus if allowed is None else allowed)
        shares = topology and share_out(topology, num_ranks)
        return shares and [(list(share.cpus), share.threads) for share in shares]


def _hyper_threaded(first: int, count: int, other: int) -> list[tuple[int, ...]]:
    """Cores whose second thread is numbered `other` higher."""
    return [(cpu, cpu + other) for cpu in range(first, first + count)]


def test_one_socket_with_two_threads_a_core(tmp_path):
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 4, 4)})
    assert machine.shares() == [([0, 1, 2, 3], 4)]
    assert machine.shares(2) == [([0, 1], 2), ([2, 3], 2)]
    assert machine.shares(3) == [([0], 1), ([1], 1), ([2], 1)]
    assert machine.shares(5) is None


def test_two_sockets(tmp_path):
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 4, 8), 1: _hyper_threaded(4, 4, 8)})
    assert machine.shares() == [([*range(8)], 8)]
    assert machine.shares(2) == [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4)]
    assert machine.shares(4) == [([0, 1], 2), ([2, 3], 2), ([4, 5], 2), ([6, 7], 2)]


def test_sockets_whose_cores_alternate(tmp_path):
    machine = Machine(tmp_path, {0: [(0,), (2,), (4,)], 1: [(1,), (3,), (5,)]})
    assert machine.shares(2) == [([0, 2, 4], 3), ([1, 3, 5], 3)]


def test_four_nodes_of_nearly_as_many_cores_stay_whole(tmp_path):
    sizes = [(0, 8), (8, 8), (16, 8), (24, 6)]
    machine = Machine(tmp_path, {node: _hyper_threaded(*size, 30) for node, size in enumerate(sizes)})
    assert machine.shares(4) == [([*range(first, first + count)], count) for first, count in sizes]
    assert machine.shares(2) == [([*range(16)], 16), ([*range(16, 30)], 14)]


def test_four_nodes_of_which_one_is_small_are_shared_equally(tmp_path):
    """Whole nodes would leave the others waiting for the last rank."""
    nodes = {0: _hyper_threaded(0, 8, 28), 1: _hyper_threaded(8, 8, 28), 2: _hyper_threaded(16, 8, 28),
             3: _hyper_threaded(24, 4, 28)}  # fmt: skip
    machine = Machine(tmp_path, nodes)
    assert machine.shares(4) == [([*range(7 * rank, 7 * rank + 7)], 7) for rank in range(4)]


def test_a_node_of_memory_alone_counts_for_nothing(tmp_path):
    machine = Machine(tmp_path, {0: [(0,), (1,)], 1: [], 2: [(2,), (3,)]})
    assert machine.shares(2) == [([0, 1], 2), ([2, 3], 2)]


def test_cpus_that_are_offline_are_not_used(tmp_path):
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 4, 4)}, offline=(1, 2, 6))
    assert machine.shares() == [([0, 3, 5], 3)]


def test_a_quota_of_two_and_a_half_cpus_is_two_threads(tmp_path):
    """Anywhere: the container shares its CPUs with others."""
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 4, 4)})
    machine.write("proc/self/cgroup", "0::/")
    machine.write("sys/fs/cgroup/cpu.max", "250000 100000")
    assert machine.shares() == [([*range(8)], 2)]
    assert machine.shares(2) == [([0, 1, 4, 5], 1), ([2, 3, 6, 7], 1)]


def test_the_tightest_quota_of_the_groups_above_counts(tmp_path):
    machine = Machine(tmp_path, {0: [(cpu,) for cpu in range(8)]})
    machine.write("proc/self/cgroup", "3:cpu:/old\n0::/pods/one")
    machine.write("sys/fs/cgroup/pods/one/cpu.max", "max 100000")
    assert machine.shares() == [([*range(8)], 8)]
    machine.write("sys/fs/cgroup/pods/cpu.max", "50000 100000")
    machine.write("sys/fs/cgroup/cpu.max", "600000 100000")
    assert machine.shares() == [([*range(8)], 1)]


def test_a_quota_above_all_cores_changes_nothing(tmp_path):
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 4, 4)})
    machine.write("proc/self/cgroup", "0::/")
    machine.write("sys/fs/cgroup/cpu.max", "400000 100000")
    assert machine.shares() == [([0, 1, 2, 3], 4)]


def test_what_taskset_left_is_used_whole(tmp_path):
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 4, 4)})
    assert machine.shares(allowed={0, 4, 1}) == [([0, 1, 4], 2)]
    assert machine.shares(2, allowed={0, 4, 1, 99}) == [([0, 4], 1), ([1], 1)]


def test_cores_of_different_speeds_are_left_to_the_scheduler(tmp_path):
    machine = Machine(tmp_path / "arm", {0: [(cpu,) for cpu in range(4)]})
    for cpu, capacity in enumerate((1024, 1024, 446, 446)):
        machine.write(f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", str(capacity))
    assert machine.shares() is None
    assert machine.shares(allowed={0, 1}) == [([0, 1], 2)]
    hybrid = Machine(tmp_path / "intel", {0: [(0, 1), (2, 3), (4,), (5,)]})
    hybrid.write("sys/devices/cpu_atom/cpus", "4-5")
    assert hybrid.shares() is None


def test_a_kernel_without_numa_is_one_node(tmp_path):
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 4, 4)})
    (tmp_path / "sys/devices/system/node/node0/cpulist").unlink()
    assert machine.shares(2) == [([0, 1], 2), ([2, 3], 2)]


def test_the_older_name_of_siblings(tmp_path):
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 2, 2)})
    for cpu in range(4):
        file = tmp_path / machine.topology(cpu)
        file.rename(file.with_name("thread_siblings_list"))
    assert machine.shares() == [([0, 1], 2)]


@pytest.mark.parametrize("missing", ["sys/devices/system/cpu/online", Machine.topology(1)])
@pytest.mark.parametrize("content", [None, "nonsense"])
def test_files_that_are_missing_or_nonsense_change_nothing(tmp_path, missing, content):
    machine = Machine(tmp_path, {0: _hyper_threaded(0, 2, 2)})
    (tmp_path / missing).unlink()
    if content is not None:
        machine.write(missing, content)
    assert machine.shares() is None


def test_without_sysfs_nothing_is_known(tmp_path):
    assert read_topology(tmp_path, {0, 1}) is None


def test_this_machine_is_read_or_left_alone():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("CPUs cannot be chosen on this system")
    allowed = os.sched_getaffinity(0)
    topology = read_topology(Path("/"), allowed)
    assert topology is None or {cpu for core in topology.cores for cpu in core.cpus} == allowed


@given(
    nodes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    threads=st.integers(1, 2),
    num_ranks=st.integers(1, 12),
    is_whole=st.booleans(),
    quota=st.none() | st.floats(0.1, 100),
)
def test_shares_are_never_empty_overlap_nowhere_and_are_fair(nodes, threads, num_ranks, is_whole, quota):
    count, cores = 0, []
    for node, size in enumerate(nodes):
        for _ in range(size):
            cores.append(Core(node, tuple(range(count, count + threads))))
            count += threads
    shares = share_out(Topology(tuple(cores), is_whole, quota), num_ranks)
    if num_ranks > len(cores):
        assert shares is None
        return
    assert len(shares) == num_ranks
    taken = [cpu for share in shares for cpu in share.cpus]
    assert len(taken) == len(set(taken))
    assert all(1 <= share.threads <= len(share.cpus) for share in shares)
    assert quota is None or sum(share.threads for share in shares) <= max(quota, num_ranks)
    if quota is None:
        assert min(share.threads for share in shares) >= min(
            0.75 * len(cores) / num_ranks, len(cores) // num_ranks
        )


def test_lists_of_the_kernel():
    assert parse_cpus("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpus("\n") == set()


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY"])
def test_who_has_chosen_is_obeyed(name):
    assert is_chosen({name: "3"})
    assert not is_chosen({"PATH": "/bin"})


_IN_A_NOTEBOOK = """
import os, threading, torch
from wemm import LLM
from wemm.platforms.cpu import CpuPlatform
from wemm.platforms.topology import CpuShare
CpuPlatform.cpu_shares = lambda self, num_ranks: [CpuShare((0,), 1)] * num_ranks
before, threads = os.sched_getaffinity(0), torch.get_num_threads()
with LLM("tiny", dtype="float32", device="cpu") as llm:
    print(os.sched_getaffinity(0) == {0}, torch.get_num_threads())
    stop = threading.Event()
    threading.Thread(target=stop.wait).start()
try:
    LLM("tiny", dtype="float32", device="cpu", load_format="nonsense")
except Exception:
    pass
print(all(os.sched_getaffinity(int(t)) == before for t in os.listdir("/proc/self/task")))
print(torch.get_num_threads() == threads)
stop.set()
"""
needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or not {0, 1} <= os.sched_getaffinity(0), reason="needs CPUs 0 and 1"
)


@needs_affinity
def test_a_caller_gets_its_cpus_back():
    """So do the threads that were started while it had fewer."""
    result = subprocess.run(
        [sys.executable, "-c", _IN_A_NOTEBOOK],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["True", "1", "True", "True"]


_RANKS = """
import os, torch
from wemm import LLM
with LLM("tiny", dtype="float32", device="cpu", tensor_parallel_size=2) as llm:
    followers = llm._built.engine._runner._followers._processes
    print(sorted(os.sched_getaffinity(0)), *(sorted(os.sched_getaffinity(p.pid)) for p in followers))
"""


@needs_affinity
@pytest.mark.parametrize("chosen", [False, True])
def test_ranks_compute_apart_unless_the_user_has_chosen(chosen):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": "1"} if chosen else {}
    result = subprocess.run(
        [sys.executable, "-c", _RANKS], env=environment, capture_output=True, text=True, check=True
    )
    everything = sorted(os.sched_getaffinity(0))
    topology = read_topology(Path("/"), set(everything))
    shares = None if chosen or topology is None else share_out(topology, 2)
    expected = [list(share.cpus) for share in shares] if shares else [everything] * 2
    assert result.stdout.strip() == " ".join(map(str, expected))


def test_a_share_crosses_to_another_process_as_plain_values():
    from dataclasses import astuple

    share = CpuShare((0, 1), 2)
    assert CpuShare(*astuple(share)) == share
