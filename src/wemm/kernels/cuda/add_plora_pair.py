"""Both in the two launches of one: of rank 512 and one image 240 programs in the first. Unmeasured."""

from __future__ import annotations

import torch

from wemm.kernels.cuda.add_plora import add_updates, takes
from wemm.ops.add_plora_pair import add_plora_pair


def _supports(
    gate: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    gate_a: torch.Tensor,
    gate_b: torch.Tensor,
    gate_scaling: float,
    up_a: torch.Tensor,
    up_b: torch.Tensor,
    up_scaling: float,
    image_rows: torch.Tensor,
) -> bool:
    is_pair = gate.shape == up.shape and gate_a.shape == up_a.shape
    is_gate_taken = takes(gate, x, gate_a, gate_b, gate_scaling, image_rows)
    return is_pair and is_gate_taken and takes(up, x, up_a, up_b, up_scaling, image_rows)


@add_plora_pair.impl("triton", "cuda", _supports)
def _(
    gate: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    gate_a: torch.Tensor,
    gate_b: torch.Tensor,
    gate_scaling: float,
    up_a: torch.Tensor,
    up_b: torch.Tensor,
    up_scaling: float,
    image_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    add_updates(x, image_rows, (gate, gate_a, gate_b, gate_scaling), (up, up_a, up_b, up_scaling))
    return gate, up
