"""The tensor-parallel group as layers and loader see it: my slice, and the sums over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed

from wemm.errors import IntegrityError


@dataclass(frozen=True)
class TensorParallel:
    """Rank of this process and number of ranks that share every sharded weight.

    More than one rank needs an initialised `torch.distributed` default group.
    """

    rank: int = 0
    size: int = 1

    def length(self, full: int) -> int:
        """How many of `full` entries one rank holds."""
        if full % self.size:
            raise IntegrityError(f"{full} entries must be divisible by {self.size} ranks")
        return full // self.size

    def if_divides(self, full: int) -> TensorParallel:
        """This group, or one rank that holds everything if `full` entries cannot be shared evenly."""
        return self if full % self.size == 0 else SINGLE

    def slice(self, full: int) -> slice:
        """The entries of this rank in a dimension of `full` entries."""
        length = self.length(full)
        return slice(self.rank * length, (self.rank + 1) * length)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """What rank 0 has, into the tensors of all ranks."""
        if self.size > 1:
            torch.distributed.broadcast(x, src=0)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The last dimensions of all ranks, side by side."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)


SINGLE = TensorParallel()
"""One process holds everything."""
