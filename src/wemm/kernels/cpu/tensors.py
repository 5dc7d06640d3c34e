"""torch tensors as the C++ side takes them: plain pointers and sizes, no libtorch."""

from __future__ import annotations

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""csrc/tensor.h: enum class DType. Those of activations."""
INTEGER_CODES = {torch.int8: 3, torch.uint8: 4}
"""Those of quantised weights."""
_CODES = {**DTYPE_CODES, **INTEGER_CODES}

TensorArgument = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def as_argument(x: torch.Tensor) -> TensorArgument:
    """(address, dtype code, shape, strides in elements). The tensor must outlive the call."""
    return x.data_ptr(), _CODES[x.dtype], tuple(x.shape), x.stride()
