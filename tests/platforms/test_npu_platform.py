"""Facts about NPUs, as torch_npu would tell them; which device a name means; what is said where it is missing."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from wemm.engine.worker import Group
from wemm.errors import DeviceError
from wemm.platforms import npu, resolve_platform
from wemm.platforms.npu import NpuPlatform


class Device(SimpleNamespace):
    """Of torch, where it knows "npu"."""

    def __init__(self, name, index=None):
        kind, _, number = str(name).partition(":")
        super().__init__(type=kind, index=int(number) if number else index)


@pytest.fixture
def card(monkeypatch):
    """A torch_npu with one card of bfloat16, and what was asked of it."""
    module = ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    module.waited, module.current, module.compile_modes, module.emptied = [], [], [], []
    memory = module.memory = SimpleNamespace(allocated=0, peak=0)

    def reset(device):
        memory.peak = memory.allocated

    module.npu = SimpleNamespace(
        is_available=lambda: True,
        is_bf16_supported=lambda: True,
        mem_get_info=lambda device: (40 << 30, 64 << 30),
        empty_cache=lambda: module.emptied.append(True),
        memory_allocated=lambda device: memory.allocated,
        max_memory_allocated=lambda device: memory.peak,
        reset_peak_memory_stats=reset,
        synchronize=module.waited.append,
        set_device=module.current.append,
        set_compile_mode=lambda jit_compile: module.compile_modes.append(jit_compile),
    )
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    torch_with_npu = SimpleNamespace(device=Device, empty=lambda *a, **k: None, cuda=torch.cuda)
    monkeypatch.setattr("wemm.platforms.torch", torch_with_npu)
    return module


@pytest.mark.parametrize(
    ("name", "rank", "index"), [("npu", None, None), ("npu", 3, 3), ("npu:2", 0, 2), ("auto", 1, 1)]
)
def test_names(card, monkeypatch, name, rank, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    platform = resolve_platform(name, rank)
    assert isinstance(platform, NpuPlatform)
    assert (platform.device.type, platform.device.index) == ("npu", index)
    platform.select()
    assert card.current == ([] if index is None else [platform.device])


def test_auto_is_the_cpu_without_a_card(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    card.npu.is_available = lambda: False
    assert resolve_platform("auto").device.type == "cpu"


def test_facts(card):
    platform = NpuPlatform(Device("npu"))
    assert platform.available_memory() == 40 << 30
    assert card.emptied, "what torch_npu holds unused is free"
    assert platform.ranks_share_memory is False
    wanted = [platform.preferred_dtype(dtype) for dtype in ("float16", "bfloat16", "float32")]
    assert wanted == ["float16", "bfloat16", "float16"]
    card.npu.is_bf16_supported = lambda: False
    assert platform.preferred_dtype("bfloat16") == "float16"
    assert card.compile_modes == [False]
    platform.synchronize()
    assert card.waited == [platform.device]


def test_the_peak_is_counted_from_what_was_allocated_before(card):
    memory = card.memory
    memory.allocated, memory.peak = 100, 900  # loading took more

    def work():
        memory.peak = 350

    assert NpuPlatform(Device("npu")).peak_memory(work) == 250
    assert len(card.waited) == 2


def test_ranks_meet_by_hccl(card, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **k: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, **k: asked.append(backend))
    Group(NpuPlatform(Device("npu")).collective_backend, 0, 2, store=None)
    assert asked == ["hccl", "gloo"]  # tensors of the device; calls in main memory


def test_without_torch_npu(monkeypatch):
    monkeypatch.setattr(npu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"needs torch_npu.*pip install 'wemm\[npu\]'.*--device cpu"):
        resolve_platform("npu:1")
    assert resolve_platform("auto").device.type in ("cpu", "cuda")


def test_torch_npu_without_cann(monkeypatch, tmp_path):
    """As it is after pip install on a machine without CANN."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    with pytest.raises(DeviceError, match=r"libhccl\.so.*set_env\.sh.*--device cpu"):
        resolve_platform("npu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_platform("auto").device.type == "cpu"
