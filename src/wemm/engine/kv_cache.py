"""Who owns which block of the paged KV cache. The tensors themselves belong to the model runner."""

from __future__ import annotations

from collections import deque

from wemm.errors import IntegrityError


class KVCacheManager:
    """Fixed-size blocks, handed out to sequences and taken back whole."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._block_tables: dict[str, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def can_allocate(self, seq_id: str, num_tokens: int) -> bool:
        """True if `allocate` with the same arguments would succeed."""
        return self._missing(seq_id, num_tokens) <= len(self._free)

    def allocate(self, seq_id: str, num_tokens: int) -> None:
        """Grow the block table of a sequence until it holds `num_tokens`."""
        missing = self._missing(seq_id, num_tokens)
        if missing > len(self._free):
            raise IntegrityError(f"{missing} blocks wanted for {seq_id}, {len(self._free)} free")
        table = self._block_tables.setdefault(seq_id, [])
        table.extend(self._free.popleft() for _ in range(missing))

    def free(self, seq_id: str) -> None:
        """Take back every block of a sequence."""
        self._free.extend(self._block_tables.pop(seq_id, ()))

    def block_table(self, seq_id: str) -> list[int]:
        """Blocks of a sequence in order of position."""
        return self._block_tables[seq_id]

    def slot(self, seq_id: str, position: int) -> int:
        """Where the token at `position` lies: block * block_size + offset."""
        block = self._block_tables[seq_id][position // self.block_size]
        return block * self.block_size + position % self.block_size

    def check_integrity(self) -> None:
        """Every block is owned exactly once or free. Raises IntegrityError."""
        owned = [block for table in self._block_tables.values() for block in table]
        if sorted([*owned, *self._free]) != list(range(self.num_blocks)):
            raise IntegrityError(f"{len(owned)} owned and {len(self._free)} free of {self.num_blocks} blocks")

    def check_idle(self) -> None:
        """Nothing is owned. Raises IntegrityError."""
        self.check_integrity()
        if self._block_tables:
            raise IntegrityError(f"blocks still owned by {', '.join(self._block_tables)}")

    def _missing(self, seq_id: str, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(self._block_tables.get(seq_id, ())))
