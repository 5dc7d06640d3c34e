"""Nucleus sampling: what remains of a distribution."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, Tolerance, op

ONE = 2.0**60
"""Probabilities are summed as integers, in units of 2**-60. No order of summation changes such a sum, and so none
decides what is kept. A row may sum to 4 before it overflows."""


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    def probs(rows: int, vocab_size: int, scale: float) -> torch.Tensor:
        return inputs.normal(rows, vocab_size, scale=scale).to(torch.float32).softmax(dim=-1)

    shares = inputs.float32(4).abs().clamp(min=0.01)
    peaked, one_hot = probs(4, 1000, 8), torch.eye(4, 1000, device=inputs.device)
    levels = peaked.new_tensor([0.5, 0.25, 0.25, 0.0])
    return {
        "random": (probs(4, 20_001, 2), shares),
        "flat": (probs(4, 9000, 0), shares),
        "flat but for rounding": (probs(4, 9000, 1e-3), shares),
        "peaked": (peaked, shares),
        "colder than float32 is fine": (probs(4, 9000, 100), shares),
        "tied": ((4 * probs(4, 300, 1)).round() / 300 + levels.repeat(75) / 300, shares),
        "half at the border": (levels.expand(4, 4).contiguous(), shares.new_tensor([0.25, 0.5, 0.75, 1.0])),
        "zeros": (peaked.where(peaked >= peaked.topk(50).values[:, -1:], 0.0), shares),
        "one-hot": (one_hot, shares),
        "one token": (torch.ones(4, 1, device=inputs.device), shares),
        "nothing and everything": (peaked, shares.new_tensor([0.0, 1e-6, 1.0, 2.0])),
        "no rows": (probs(0, 100, 1), shares[:0]),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    def case(rows: int) -> tuple[Any, ...]:
        logits = inputs.normal(rows, shapes.config.text.vocab_size, scale=4)
        probs = logits.to(torch.float32).softmax(dim=-1)
        return probs, torch.full((rows,), 0.9, device=probs.device)

    return {f"decode {n}": partial(case, n) for n in shapes.decode_batches}


def _flops(probs: torch.Tensor, top_p: torch.Tensor) -> int:
    return 2 * probs.numel()


# Probabilities are copied or zeroed, never computed; most are smaller than the table's tolerance.
_EXACT = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), Tolerance(rtol=0, atol=0))


@op(_cases, _EXACT, model_cases=_model_cases, flops=_flops)
def keep_top_p(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Probabilities with those zeroed that are outside the nucleus.

    A token is kept if the mass of the tokens strictly more probable than it is less than top_p times the mass of
    the row: the most probable always, and of equals all or none. top_p >= 1 keeps every token.
    probs: float32 [num_rows, vocab_size], of which other filters may have zeroed some, not renormalised;
    top_p: float32 [num_rows] → like probs.
    """
    ordered = probs.sort(dim=-1, descending=True).values
    masses = (ordered * ONE).to(torch.int64)
    sums = masses.cumsum(dim=-1)
    wanted = torch.where(top_p < 1, top_p.to(torch.float64) * sums[:, -1], torch.inf).clamp(min=1)
    # Before the first of several equals comes what is strictly more probable; that one decides for them all.
    is_kept = sums - masses < wanted.unsqueeze(1)
    least = ordered.where(is_kept, torch.inf).amin(dim=-1, keepdim=True)
    return probs.where(probs >= least, 0.0)
