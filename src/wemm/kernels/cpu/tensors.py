"""torch tensors as the C++ side takes them: plain pointers and sizes, no libtorch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""csrc/tensor.h: enum class DType. Those of activations."""
INTEGER_CODES = {torch.int8: 3, torch.uint8: 4, torch.int32: 5, torch.int64: 6}
"""Those of quantised weights and of indices."""
_CODES = {**DTYPE_CODES, **INTEGER_CODES}

TensorArgument = tuple[int, int, tuple[int, ...], tuple[int, ...]]

_here = threading.local()


def as_argument(x: torch.Tensor) -> TensorArgument:
    """(address, dtype code, shape, strides in elements). The tensor must outlive the call."""
    kept: list[torch.Tensor] | None = getattr(_here, "kept", None)
    if kept is not None:
        kept.append(x)
    return x.data_ptr(), _CODES[x.dtype], tuple(x.shape), x.stride()


@contextmanager
def keeping() -> Iterator[list[torch.Tensor]]:
    """Inside, every tensor that this thread gives to C++ is kept in the list."""
    _here.kept = []
    try:
        yield _here.kept
    finally:
        _here.kept = None
