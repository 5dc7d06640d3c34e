"""PLoRA beside a linear of vLLM: two low-rank factors of its own dtype, whatever the base is stored in.

Which rows are an image's is read off the token ids of the step, so nothing is kept between steps: chunks,
prefix hits and mixed batches need no bookkeeping. The update is one custom op, opaque to torch.compile, and
leaves text rows as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from wemm.distributed import TensorParallel
from wemm.layers.plora import PloraSpec
from wemm.ops.add_plora import add_plora

MAX_TOKENS_IN_TILES = 512
"""On GPUs, for steps beyond, a product of the library is worth its work on text rows."""


@torch.library.custom_op("wemm::add_plora_to_images", mutates_args=("y",))
def add_plora_to_images(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: list[torch.Tensor], is_image: torch.Tensor
) -> None:
    """y += B(A x) in place, on the rows of images only; several linears of one input lie side by side in y.

    y: [num_tokens, out], x: [num_tokens, in], a: [sum of ranks, in], b: [out_i, rank_i] each,
    is_image: bool [num_tokens].
    """
    rows = is_image.nonzero().squeeze(-1)
    if not len(rows):
        return
    ranks, sizes = [factor.shape[1] for factor in b], [factor.shape[0] for factor in b]
    for part, a_part, b_part in zip(y.split(sizes, 1), a.split(ranks), b, strict=True):
        add_plora(part, x, a_part, b_part, 1.0, rows)


@add_plora_to_images.register_kernel("cuda")
def _add_plora_on_cuda(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: list[torch.Tensor], is_image: torch.Tensor
) -> None:
    # Shapes must not depend on the mask here, or graphs could not hold it.
    if len(x) <= MAX_TOKENS_IN_TILES:
        from wemm.integrations.vllm.plora_triton import add_plora_in_tiles

        add_plora_in_tiles(y, x, a, b, is_image)
        return
    reduced = F.linear(x, a).masked_fill_(~is_image.unsqueeze(-1), 0)
    first = rank_first = 0
    for factor in b:
        size, rank = factor.shape
        y[:, first : first + size].addmm_(reduced[:, rank_first : rank_first + rank], factor.T)
        first, rank_first = first + size, rank_first + rank


def tensor_parallel() -> TensorParallel:
    """The rank of this process, to cut weights by. Sums over ranks are vLLM's."""
    return TensorParallel(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())


class PloraFactors(nn.Module):
    """The factors of one or several linears that share their input; scaling is multiplied into B on loading."""

    def __init__(self, in_size: int, outs: Sequence[tuple[int, PloraSpec]]) -> None:
        """Sizes are those of this rank."""
        super().__init__()
        self._ranks = [spec.rank for _, spec in outs]
        self._scalings = [spec.scaling for _, spec in outs]
        self.a = nn.Parameter(torch.empty(sum(self._ranks), in_size), requires_grad=False)
        self.b = nn.ParameterList(
            nn.Parameter(torch.empty(out, spec.rank), requires_grad=False) for out, spec in outs
        )

    def load_a(self, value: torch.Tensor, part: int = 0) -> None:
        """This rank's columns of one linear's A."""
        self.a.data.split(self._ranks)[part].copy_(value)

    def load_b(self, value: torch.Tensor, part: int = 0) -> None:
        """This rank's rows of one linear's B."""
        scaled = value.to(torch.float32) * self._scalings[part]
        self.b[part].data.copy_(scaled)

    def forward(self, y: torch.Tensor, x: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
        """y, completed in place."""
        torch.ops.wemm.add_plora_to_images(y, x, self.a, list(self.b), is_image)
        return y
