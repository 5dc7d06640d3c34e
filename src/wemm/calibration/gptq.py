"""GPTQ: int4 that keeps a linear's outputs rather than its weights.

Frantar et al., https://arxiv.org/abs/2210.17323. Column by column the weights are rounded, and those to the right
take over what that changed in the outputs, as far as the inputs are correlated. What is stored is `Int4` as ever.
"""

from __future__ import annotations

import torch

from wemm.quantization import INT4_GROUP, SCHEMES, pack_int4, round_int4

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
_MOST_DAMPING = 1.0
_BLOCK = 32


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, damping: float = DAMPING, block: int = _BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """W [out, in] → integers and scales as `Int4.quantize` returns them, for inputs whose X^T X is `hessian`.

    hessian: float32 [in, in], finite. Inputs that were never other than 0 are rounded to the nearest, as are rows
    that hold NaN or Inf. Columns beyond a `block`, which divides 128, are updated once per block.
    """
    int4 = SCHEMES["int4"]
    factor = _inverse_factor(hessian, damping)
    finite = weight.isfinite().all(-1)
    if factor is None or not finite.any():
        return int4.quantize(weight)
    packed, scale = int4.quantize(weight) if not finite.all() else (None, None)
    integers, scales = _round_columns(weight[finite].to(torch.float32).T.contiguous(), factor, block)
    if packed is None or scale is None:
        return integers, scales
    packed[finite], scale[finite] = integers, scales
    return packed, scale


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Upper triangular U, U^T U the inverse of the damped Hessian; None where even much damping leaves none."""
    mean = hessian.diagonal().mean()
    while mean > 0 and damping <= _MOST_DAMPING:
        # The factor L L^T of the matrix read backwards is that of its inverse, read backwards and inverted.
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info:
            del damped
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        damping *= 10
    return None


def _round_columns(columns: torch.Tensor, factor: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W^T float32 [in, out], which is used up → packed integers and scales."""
    int4 = SCHEMES["int4"]
    in_size, out_size = columns.shape
    padded = -(-in_size // INT4_GROUP) * INT4_GROUP
    integers = columns.new_zeros(padded, out_size)
    scales = columns.new_empty(int4.scale_shape(out_size, in_size), dtype=int4.scale_dtype)
    for start in range(0, in_size, block):
        stop = min(start + block, in_size)
        if start % INT4_GROUP == 0:
            scales[:, [start // INT4_GROUP]] = int4.quantize(columns[start : start + INT4_GROUP].T)[1]
        scale = scales[:, start // INT4_GROUP].to(torch.float32)
        errors = columns.new_empty(stop - start, out_size)
        for i, error in zip(range(start, stop), errors, strict=True):
            round_int4(columns[i], scale, out=integers[i])
            torch.sub(columns[i], integers[i] * scale, out=error).div_(factor[i, i])
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return pack_int4(integers.T.unflatten(-1, (-1, INT4_GROUP))), scales
