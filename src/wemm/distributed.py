"""The tensor-parallel group as the layers and the loader see it: which slice is mine."""

from __future__ import annotations

from dataclasses import dataclass

from wemm.errors import IntegrityError


@dataclass(frozen=True)
class TensorParallel:
    """Rank of this process and number of ranks that share every sharded weight."""

    rank: int = 0
    size: int = 1

    def slice(self, full: int) -> slice:
        """The entries of this rank in a dimension of `full` entries."""
        length = self.length(full)
        return slice(self.rank * length, (self.rank + 1) * length)

    def length(self, full: int) -> int:
        """How many of `full` entries one rank holds."""
        if full % self.size:
            raise IntegrityError(f"{full} entries must be divisible by {self.size} ranks")
        return full // self.size


SINGLE = TensorParallel()
"""One process holds everything."""
