"""In which pieces a product x @ weight.T is computed, by its number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Tiles:
    """One program's share of the result, how much it reads at a time, and what computes it."""

    tokens: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int

    def grid(self, num_tokens: int, outputs: int) -> tuple[int, int]:
        """Programs. Those of one block of the weight follow each other: they share it in the L2 cache."""
        return triton.cdiv(num_tokens, self.tokens), triton.cdiv(outputs, self.outputs)


def tiles_for(num_tokens: int, choices: Sequence[Tiles]) -> Tiles:
    """The smallest that holds all tokens, else the largest; choices are in order of their tokens."""
    return next((tiles for tiles in choices if num_tokens <= tiles.tokens), choices[-1])
