"""PLoRA linears of the decoder: a base weight and a low-rank update for image tokens.

The base is cut over ranks like any linear; of the two low-rank factors, the one that meets the cut
dimension is cut with it and the other is whole on every rank. The product with the uncut factor is
linear in the partial inputs, so one sum over ranks completes base and update together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from wemm.distributed import TensorParallel
from wemm.layers.linear import QuantizableLinear
from wemm.ops.add_plora import add_plora
from wemm.ops.add_plora_pair import add_plora_pair
from wemm.ops.silu_and_mul import silu_and_mul
from wemm.quantization import Scheme


@dataclass(frozen=True)
class PloraSpec:
    """Rank and scaling of one linear's update."""

    rank: int
    scaling: float


class _PloraLinear(QuantizableLinear):
    # The factors stay in the model's dtype whatever the base is stored in.
    def __init__(self, in_size: int, out_size: int, plora: PloraSpec | None, scheme: Scheme | None) -> None:
        super().__init__(in_size, out_size, bias=False, scheme=scheme)
        self.scaling = plora.scaling if plora else 0.0
        self.plora_a: nn.Parameter | None = None
        self.plora_b: nn.Parameter | None = None
        if plora is not None:
            self.plora_a = nn.Parameter(torch.empty(plora.rank, in_size))
            self.plora_b = nn.Parameter(torch.empty(out_size, plora.rank))

    @property
    def plora(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A, B and the scaling."""
        if self.plora_a is None or self.plora_b is None:
            return None
        return self.plora_a, self.plora_b, self.scaling

    def forward(self, x: torch.Tensor, image_rows: torch.Tensor | None) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out]; image_rows: int64 [num_image_tokens], None for none."""
        y = self.product(x)
        if image_rows is None or self.plora is None:
            return y
        return add_plora(y, x, *self.plora, image_rows)


class ColumnParallelPloraLinear(_PloraLinear):
    """Every rank computes its share of the outputs."""

    shard_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "weight_scale": 0, "plora_b": 0}

    def __init__(
        self,
        in_size: int,
        out_size: int,
        plora: PloraSpec | None,
        tensor_parallel: TensorParallel,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__(in_size, tensor_parallel.length(out_size), plora, scheme)


def silu_and_mul_of(
    gate: ColumnParallelPloraLinear,
    up: ColumnParallelPloraLinear,
    x: torch.Tensor,
    image_rows: torch.Tensor | None,
) -> torch.Tensor:
    """silu(gate(x, image_rows)) * up(x, image_rows), in ops that take both where there are such.

    x: [num_tokens, in] → [num_tokens, out]; with several ranks each computes its share of both.
    """
    if not (gate.is_watched or up.is_watched):
        if image_rows is None and gate.scheme == up.scheme:
            return gate.silu_times(up, x)
        if image_rows is not None and gate.plora is not None and up.plora is not None:
            gate_y, up_y = gate.product(x), up.product(x)
            return silu_and_mul(*add_plora_pair(gate_y, up_y, x, *gate.plora, *up.plora, image_rows))
    return silu_and_mul(gate(x, image_rows), up(x, image_rows))


class RowParallelPloraLinear(_PloraLinear):
    """Every rank takes its share of the inputs; the results are summed over ranks."""

    shard_dims: ClassVar[Mapping[str, int]] = {"weight": 1, "weight_scale": 1, "plora_a": 1}

    def __init__(
        self,
        in_size: int,
        out_size: int,
        plora: PloraSpec | None,
        tensor_parallel: TensorParallel,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__(tensor_parallel.length(in_size), out_size, plora, scheme)
        self._tensor_parallel = tensor_parallel

    def forward(self, x: torch.Tensor, image_rows: torch.Tensor | None) -> torch.Tensor:
        """[num_tokens, in / ranks] → [num_tokens, out]."""
        return self._tensor_parallel.all_reduce(super().forward(x, image_rows))
