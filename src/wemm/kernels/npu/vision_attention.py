"""A call per run of images of one length. A head_dim of 72 is filled up with zeros to 80, which adds nothing."""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F

from wemm.kernels.npu.fused_attention import ALIGNMENT, attend, takes
from wemm.kernels.npu.once_per_step import as_list
from wemm.ops.vision_attention import vision_attention


def _supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> bool:
    head_dim = query.shape[2]
    return key.dtype == value.dtype == query.dtype and takes(query, key.shape[1], head_dim + -head_dim % ALIGNMENT)


@vision_attention.impl("torch_npu", device="npu", supports=_supports)
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    head_dim = query.shape[2]
    padded = [F.pad(x, (0, -head_dim % ALIGNMENT)).contiguous() for x in (query, key, value)]
    bounds, outputs, start = as_list(cu_seqlens), [], 0
    lengths = [stop - first for first, stop in pairwise(bounds)]
    for length, run in groupby(lengths):
        num_images = len(list(run))
        stop = start + num_images * length
        q, k, v = (x[start:stop].unflatten(0, (num_images, length)) for x in padded)
        outputs.append(attend(q, k, v, scale).flatten(0, 1))
        start = stop
    return torch.cat(outputs)[..., :head_dim].contiguous()
