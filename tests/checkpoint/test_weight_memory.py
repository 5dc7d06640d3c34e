"""Weights lie in huge pages where there are any, and behave like any other tensor."""

from __future__ import annotations

import mmap
import sys

import psutil
import pytest
import torch

from wemm.checkpoint.weight_memory import empty_weight

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3,), (0, 7), (4, 1024, 1024), (2049, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_tensor_of_that_shape_that_can_be_written(shape, dtype):
    weight = empty_weight(shape, dtype, CPU)
    assert (weight.shape, weight.dtype, weight.device, weight.is_contiguous()) == (
        torch.Size(shape),
        dtype,
        CPU,
        True,
    )
    weight.fill_(3)
    assert bool((weight == 3).all())


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
def test_a_large_one_begins_with_a_huge_page():
    assert empty_weight((2**21,), torch.float32, CPU).data_ptr() % 2**21 == 0


def test_memory_goes_back_with_the_tensor():
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(20):
        weight = empty_weight((2**24,), torch.float32, CPU).fill_(1)
        view = weight[:10]
        del weight
        assert bool((view == 1).all())
        del view
    assert process.memory_info().rss - before < 2**27


def test_without_huge_pages_it_is_plain_memory(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no huge pages")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert empty_weight((2**21,), torch.float32, CPU).fill_(1).sum() == 2**21


def test_other_devices_keep_their_own_memory():
    assert empty_weight((2**21,), torch.float32, torch.device("meta")).device.type == "meta"
