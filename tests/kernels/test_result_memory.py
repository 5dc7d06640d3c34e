"""Large results lie where earlier ones lay; nothing that is still referred to is ever overwritten."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from wemm import LLM, SamplingParams
from wemm.kernels.cpu import result_memory
from wemm.kernels.cpu.result_memory import ResultMemory

MIB = 2**20


@pytest.fixture
def memory():
    return ResultMemory(most_kept=64 * MIB)


def test_what_dies_is_used_again(memory):
    first = memory.empty((4, MIB), torch.float32)
    address = first.data_ptr()
    assert (first.shape, first.dtype, first.is_contiguous()) == (torch.Size((4, MIB)), torch.float32, True)
    del first
    assert memory.kept_bytes == 16 * MIB
    again = memory.empty((8, MIB), torch.bfloat16)
    assert again.data_ptr() == address
    assert memory.kept_bytes == 0


def test_a_view_keeps_the_whole_alive(memory):
    whole = memory.empty((8 * MIB,), torch.int8).fill_(7)
    row = whole.view(8, MIB)[3, :10]
    del whole
    others = [memory.empty((8 * MIB,), torch.int8).fill_(1) for _ in range(3)]
    assert bool((row == 7).all())
    del others, row
    assert memory.kept_bytes == 32 * MIB


def test_memory_much_too_large_is_left_for_others(memory):
    large = memory.empty((32 * MIB,), torch.int8)
    address = large.data_ptr()
    del large
    assert memory.empty((20 * MIB,), torch.int8).data_ptr() != address
    assert memory.empty((30 * MIB,), torch.int8).data_ptr() == address


def test_no_more_is_kept_than_the_limit(memory):
    """The longest unused goes first."""
    sizes = [10, 20, 30, 40]
    results = [memory.empty((size * MIB,), torch.int8) for size in sizes]
    while results:
        results.pop(0)
    assert memory.kept_bytes == 40 * MIB
    memory.release()
    assert memory.kept_bytes == 0


def test_small_results_and_empty_ones_are_the_heaps(memory):
    for shape in ((0, 5), (3,), (100, 100)):
        result = memory.empty(shape, torch.float32)
        assert result.shape == torch.Size(shape)
        del result
    assert memory.kept_bytes == 0


def test_results_of_many_threads_are_their_own(memory):
    failures = []

    def work(value):
        for _ in range(50):
            result = memory.empty((2 * MIB,), torch.int8).fill_(value)
            if not bool((result == value).all()):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_without_huge_pages_it_is_plain_memory(memory, monkeypatch):
    monkeypatch.setattr(result_memory, "map_huge_pages", lambda num_bytes: None)
    result = memory.empty((4 * MIB,), torch.int8).fill_(1)
    assert int(result.sum()) == 4 * MIB
    del result
    assert memory.kept_bytes == 0


def test_a_closed_engine_holds_nothing(ask, golden_images):
    question = ask("What is this?", golden_images / "300x200.png")
    with LLM("nano", device="cpu", max_num_batched_patches=4096) as llm:
        llm.chat([question] * 8, SamplingParams(max_tokens=2))
    gc.collect()
    assert result_memory._results.kept_bytes == 0
