"""What is asked of torch about a GPU's memory; the GPU itself is asked by tests/device."""

from __future__ import annotations

import pytest
import torch

from wemm.platforms.base import Platform
from wemm.platforms.cuda import CudaPlatform


@pytest.fixture
def calls(monkeypatch):
    """Calls of torch.cuda in their order; 100 bytes are allocated, 350 at the peak, 1000 free."""
    made = []
    answers = dict(
        synchronize=None,
        empty_cache=None,
        reset_peak_memory_stats=None,
        memory_allocated=100,
        max_memory_allocated=350,
        mem_get_info=(1000, 2000),
    )
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name, a=answer: made.append(name) or a)
    return made


def test_the_peak_is_counted_from_what_was_allocated_before(calls):
    assert CudaPlatform(torch.device("cuda")).peak_memory(lambda: calls.append("work")) == 250
    assert calls == [
        "synchronize",
        "memory_allocated",
        "reset_peak_memory_stats",
        "work",
        "synchronize",
        "max_memory_allocated",
    ]


def test_what_torch_holds_unused_is_free(calls):
    assert CudaPlatform(torch.device("cuda")).available_memory() == 1000
    assert calls == ["empty_cache", "mem_get_info"]


def test_a_device_that_does_not_tell_is_not_set_to_work():
    def work():
        raise AssertionError("nobody would read the result")

    assert Platform(torch.device("cpu")).peak_memory(work) is None
