"""Every kernel for NPUs against the definition of its op, over the strict stub of torch_npu."""

from __future__ import annotations

import importlib

import pytest
import torch

from wemm.ops.registry import OPS, Inputs

KERNELS = [
    "decode_attention", "linear_int8", "linear_int8_gelu", "prefill_attention", "rms_norm", "rope_and_store_kv",
    "silu_and_mul", "vision_attention",
]  # fmt: skip
ALSO_FLOAT32 = {"rms_norm", "rope_and_store_kv", "silu_and_mul"}
LEFT_TO_DEFINITION = {("decode_attention", "int8"), ("prefill_attention", "int8"), ("linear_int8", "none")}
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_parity(on_stub, parity, name, dtype):
    op = OPS[name]
    left = {case for kernel, case in LEFT_TO_DEFINITION if kernel == name}
    expected = len(op.cases(Inputs(dtype, CPU)).keys() - left)
    if dtype is torch.float32 and name not in ALSO_FLOAT32:
        expected = 0
    assert parity(op, "torch_npu", dtype, CPU) == expected
    assert bool(on_stub.calls) == (expected > 0)


def test_these_are_all_kernels(on_stub):
    assert sorted(name for name, op in OPS.items() if op.implementations) == KERNELS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention"])
def test_parity_with_blocks_of_128_tokens(on_stub, parity, monkeypatch, name, dtype):
    """Keys and values are then read where they lie in prefill, too."""
    monkeypatch.setattr(importlib.import_module(f"wemm.ops.{name}"), "_BLOCK_SIZE", 128)
    assert parity(OPS[name], "torch_npu", dtype, CPU) == len(OPS[name].cases(Inputs(dtype, CPU))) - 1
    paged = [kwargs for _, _, kwargs in on_stub.calls if kwargs["block_table"] is not None]
    assert len(paged) == len(on_stub.calls)
