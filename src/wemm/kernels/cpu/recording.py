"""Kernel calls written down as they are made, to be made again without Python between them.

In a decode step of one sequence the weights stream through the caches and push Python's own code out, which then
costs more than many a kernel. Addresses and sizes are those of the recording: new values are written to the same
tensors before each replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wemm.kernels import Recorder
from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.tensors import keeping

_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)


class _ComputedByTorchError(Exception):
    """What no recording holds."""


class Replay:
    """Makes the recorded calls again."""

    def __init__(self, recording: Any, tensors: list[torch.Tensor]) -> None:
        self._recording = recording
        self._tensors = tensors  # what the calls read and write stays where it is

    def __len__(self) -> int:
        return len(self._recording)

    def __call__(self) -> None:
        """On what the tensors hold now."""
        self._recording.replay()


def record(function: Callable[[], Any]) -> tuple[Any, Replay] | None:
    """Call it, and write down the kernels it calls. None, half-way, if it computes anything else."""
    recording = _kernels.Recording()
    with keeping() as tensors, _OnlyKernelsCompute():  # type: ignore[no-untyped-call]
        recording.open()
        try:
            result = function()
        except _ComputedByTorchError:
            return None
        finally:
            recording.close()
    return result, Replay(recording, tensors)


class _OnlyKernelsCompute(TorchDispatchMode):
    """Lets torch make tensors and views of them, and nothing more."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to be passed over by it: seconds, and a directory in /tmp

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ALLOCATIONS and not func.is_view:
            raise _ComputedByTorchError(str(func))
        return func(*args, **(kwargs or {}))


RECORDER = Recorder(record, holds_torch=False)
