"""Triton kernels without a GPU: computed by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wemm.benchmark.ops import load_ops
from wemm.kernels import load_kernels
from wemm.ops.registry import OPS

load_ops()
load_kernels("cuda")
# What a program takes on, where that is little: the interpreter's time is by programs.
LARGER = {"silu_and_mul.BLOCK": 2**15}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the kernels for CUDA are those of the CPU, and the interpreter computes them."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    from wemm.kernels.cuda.flash_attention import find_block

    for op in OPS.values():
        attached = [replace(i, device="cpu") for i in op.implementations if i.device == "cuda"]
        monkeypatch.setattr(op, "implementations", attached)
    for name, size in LARGER.items():
        monkeypatch.setattr(f"wemm.kernels.cuda.{name}", size)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", _assembly)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", _rounding(InterpreterBuilder.cast_impl))
    for module in (tl, tl.standard, *_kernel_modules()):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))
    language = tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base
    with _restored(*language), np.errstate(all="ignore"):  # infinities come without a warning, as on a GPU
        # Of the language and of its own library; the interpreter would do so at every call, and not undo all.
        for function in (find_block.fn, tl.standard.sum.fn):
            interpreter._patch_lang(function)
        monkeypatch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        yield


def _kernel_modules() -> list[ModuleType]:
    import wemm.kernels.cuda as package

    return [getattr(package, m.name) for m in iter_modules(package.__path__) if hasattr(package, m.name)]


@contextmanager
def _restored(*owners: Any) -> Iterator[None]:
    before = [dict(vars(owner)) for owner in owners]
    yield
    for owner, attributes in zip(owners, before, strict=True):
        for name in set(vars(owner)) - set(attributes):
            delattr(owner, name)
        for name, value in attributes.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Products of bfloat16, whose bits the interpreter would multiply."""
    from triton.runtime.interpreter import TensorHandle

    product = np.matmul(_float32(a), _float32(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


PTX = {"shl.b32": np.left_shift, "and.b32": np.bitwise_and, "xor.b32": np.bitwise_xor}


def _assembly(self: Any, text: str, constraints: str, values: Any, *_: Any) -> Any:
    """What kernels spell out in PTX: four bytes of one operand to four of a result."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    registers = {"$1": np.ascontiguousarray(values[0].data).view(np.uint32)}
    for statement in text.strip("{} ").rstrip("; ").split(";"):
        name, target, *operands = statement.replace(",", " ").split()
        if name != ".reg":
            numbers = (registers[o] if o in registers else np.uint32(int(o, 0)) for o in operands)
            registers[target] = PTX[name](*numbers)
    handle = TensorHandle(registers["$0"].view(np.int8), tl.int8)
    return SimpleNamespace(get_result=lambda index: handle)


def _float32(handle: Any) -> np.ndarray:
    if handle.dtype.scalar.is_bf16():
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _rounding(cast: Any) -> Any:
    """To bfloat16 as a GPU rounds; the interpreter cuts off."""

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        from triton.runtime.interpreter import TensorHandle

        if not dst_type.scalar.is_bf16() or not src.dtype.scalar.is_fp32():
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(src.data.shape), dst_type.scalar)

    return cast_impl


@dataclass(frozen=True)
class Launch:
    """A kernel compiled for one target, and what it takes of a multiprocessor."""

    name: str
    grid: tuple[int, ...]
    shared_bytes: int
    registers: int
    stack_bytes: int
    """Of local memory, per thread: where registers are spilled."""
    ptx: str = field(repr=False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, Callable[[], Any]], list[Launch]]:
    """Calls a function for a compute capability (90 is 9.0), and compiles what it would launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(_measured(kernel, grid, tmp_path))

    def compile_launches(capability: int, function: Callable[[], Any]) -> list[Launch]:
        target = GPUTarget("cuda", capability, 32)
        driver = SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        launches.clear()
        function()
        return list(launches)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return compile_launches


def _measured(kernel: Any, grid: tuple[int, ...], directory: Path) -> Launch:
    import triton

    binary = directory / f"{kernel.hash}.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return Launch(kernel.metadata.name, grid, kernel.metadata.shared, registers, stack, kernel.asm["ptx"])
