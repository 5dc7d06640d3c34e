"""Tensor parallelism: one process per rank. Rank 0 leads; the others repeat every call it makes on its runner.

The leader starts the followers itself, or finds them started by torchrun. A call is sent to all ranks as a few
arrays before rank 0 makes it, so that every rank enters the same collectives in the same order.

A follower ends when its leader does, however that happens: the pipe to it closes. The leader notices the death
of a follower by its exit and by the broken collective; it ends the others and raises RankError. So it does when
a call fails on any rank: the ranks may no longer agree where they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from wemm.config import EngineConfig
from wemm.distributed import TensorParallel
from wemm.engine.forward_pass import Forwarded
from wemm.engine.model_input import ModelInput
from wemm.engine.model_runner import ModelRunner
from wemm.engine.scheduler import VisionSlice
from wemm.errors import NumericalError, ParameterError, RankError
from wemm.model.wemm import WemmModel
from wemm.platforms.topology import CpuShare

T = TypeVar("T")

_HOST = "127.0.0.1"
_STOP = "stop"
_START_SECONDS = 120
_EXIT_SECONDS = 5
_FOREVER = timedelta(days=365)  # an idle engine is no failure


def torchrun_rank(config: EngineConfig) -> int | None:
    """Rank of this process if torchrun started it. Raises ParameterError if it started another number."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    started = int(os.environ["WORLD_SIZE"])
    if config.tensor_parallel_size == 1:
        return None
    if started != config.tensor_parallel_size:
        raise ParameterError(
            f"torchrun started {started} processes, but tensor_parallel_size is {config.tensor_parallel_size}; "
            f"give torchrun --nproc-per-node {config.tensor_parallel_size}"
        )
    return int(os.environ["RANK"])


class Group:
    """The processes of one tensor-parallel engine, as one of them sees them."""

    def __init__(self, backend: str, rank: int, size: int, store: TCPStore | None) -> None:
        """Meet the others in the store, or where torchrun says."""
        if store is not None and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_FOREVER)
        self.tensor_parallel = TensorParallel(rank, size)
        # Calls travel beside the tensors, through main memory on every device.
        self._calls: Any = dist.new_group(backend="gloo", timeout=_FOREVER)

    def send(self, name: str, *arguments: Any) -> None:
        """Leader: a call to every rank."""
        dist.broadcast_object_list([(name, arguments)], src=0, group=self._calls)

    def receive(self) -> tuple[str, tuple[Any, ...]]:
        """Follower: the next call."""
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self._calls)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank: what each of them gives, by rank."""
        values: list[Any] = [None] * self.tensor_parallel.size
        dist.all_gather_object(values, value, group=self._calls)
        return values


class Followers:
    """The processes that the leader started, and the first that failed."""

    def __init__(self, config: EngineConfig, shares: Sequence[CpuShare | None]) -> None:
        """Start them, each on its share of the CPUs. They wait in `store`. Raises RankError."""
        self.failure: str | None = None
        self._stopping = False
        size = config.tensor_parallel_size
        self.store = TCPStore(_HOST, 0, size, is_master=True, wait_for_workers=False)
        threads = max(1, torch.get_num_threads() // size)
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "wemm.engine.follower"],
                stdin=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": str(share.threads if share else threads)},
                text=True,
            )
            for share in shares
        ]
        for rank, (process, share) in enumerate(zip(self._processes, shares, strict=True), 1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once; the watch says so
                process.stdin.write(
                    json.dumps([rank, self.store.port, asdict(config), share and astuple(share)]) + "\n"
                )
                process.stdin.flush()
        self._wait_until_all_joined(size)

    def _wait_until_all_joined(self, size: int) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self.store.add("joined", 0) < size - 1:
            if self.failure is None and time.monotonic() > deadline:
                self.failure = f"not all of {size} ranks started within {_START_SECONDS} s"
            if self.failure is not None:
                self.stop()
                raise RankError(self.failure)
            time.sleep(0.02)

    def _watch(self, rank: int, process: subprocess.Popen[str]) -> None:
        status = process.wait()
        if not self._stopping and self.failure is None:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self.failure = f"rank {rank} of the tensor-parallel group {how}; load the model again"

    def blame(self, error: Exception) -> str:
        """What went wrong when a call raised: a follower's death if there is one, else the error itself."""
        deadline = time.monotonic() + 1.0  # the broken connection is often seen before the exit
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self.failure = self.failure or f"rank 0 of the tensor-parallel group failed: {error!r}"
        return self.failure

    def stop(self) -> None:
        """End them all."""
        self._stopping = True
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class LeaderRunner:
    """Rank 0's runner, with all others behind it."""

    def __init__(self, runner: ModelRunner, group: Group, followers: Followers | None) -> None:
        self._runner = runner
        self._group = group
        self._followers = followers
        self._failure: str | None = None

    @property
    def model(self) -> WemmModel:
        """Rank 0's."""
        return self._runner.model

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self._runner.dtype

    def encode(self, vision: VisionSlice) -> list[NumericalError | None]:
        """As `ModelRunner.encode`; pixels are sent once per call of the tower."""
        sent = vision
        if vision.first_layer > 0:
            sent = replace(vision, images=tuple(replace(image, pixels=None) for image in vision.images))
        return self._together("encode", lambda: self._runner.encode(vision), sent)

    def forward(self, model_input: ModelInput, last_token_ids: torch.Tensor | None) -> Forwarded:
        """As `ModelRunner.forward`."""
        forwarded: Forwarded = self._together(
            "forward", lambda: self._runner.forward(model_input, last_token_ids), model_input
        )
        return forwarded

    def drop_images(self, hashes: Sequence[str]) -> None:
        """As `ModelRunner.drop_images`."""
        if hashes:
            self._together("drop_images", lambda: self._runner.drop_images(hashes), list(hashes))

    def close(self) -> None:
        """Let the other ranks end."""
        if self._failure is None and (self._followers is None or self._followers.failure is None):
            with contextlib.suppress(RuntimeError):  # one of them has just gone
                self._group.send(_STOP)
        if self._followers is not None:
            self._followers.stop()
        leave_group()
        self._runner.close()

    def _together(self, name: str, call: Callable[[], Any], *arguments: Any) -> Any:
        if self._failure is None and self._followers is not None:
            self._failure = self._followers.failure
        if self._failure is None:
            try:
                self._group.send(name, *arguments)
                return call()
            except Exception as error:  # noqa: BLE001 - after any failure the ranks may be out of step
                self._failure = self._followers.blame(error) if self._followers else f"rank 0 failed: {error!r}"
            except BaseException:
                self._failure = "rank 0 was interrupted in the middle of a call; load the model again"
                raise
        if self._followers is not None:
            self._followers.stop()
        raise RankError(self._failure)


def follow(runner: ModelRunner, group: Group) -> None:
    """Repeat the leader's calls until it closes."""
    while True:
        name, arguments = group.receive()
        if name == _STOP:
            break
        getattr(runner, name)(*arguments)
    leave_group()


def leave_group() -> None:
    """This process is no rank any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join(port: int, rank: int, config: EngineConfig, backend: str) -> Group:
    """Follower: meet the leader that started this process."""
    store = TCPStore(_HOST, port, config.tensor_parallel_size, is_master=False)
    store.add("joined", 1)
    return Group(backend, rank, config.tensor_parallel_size, store)
