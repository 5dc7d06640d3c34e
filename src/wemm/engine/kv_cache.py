"""Who owns which block of the paged KV cache, and what each block holds. The tensors belong to the model runner.

A full block whose tokens are computed is known by the hash of everything that led to it: all token ids
up to its end and, where a position belongs to an image, which image and which of its rows. A later
sequence that begins with the same tokens and the same pictures shares the block. A block that nobody
owns keeps its content until it is handed out again, the one unused for longest first.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from wemm.engine.sequence import Sequence
from wemm.errors import IntegrityError


@dataclass
class PrefixCacheStats:
    """Tokens of admitted sequences, and how many of them were found in the cache."""

    num_tokens: int = 0
    num_cached_tokens: int = 0


class KVCacheManager:
    """Fixed-size blocks, shared by sequences with equal prefixes."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        """Without prefix caching, only the answers of one request share their prompt's blocks."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.stats = PrefixCacheStats()
        self._enable_prefix_caching = enable_prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # longest unused first
        self._num_owners = [0] * num_blocks
        self._tables: dict[str, list[int]] = {}
        self._num_published: dict[str, int] = {}
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody owns, those with reusable content included."""
        return len(self._free)

    def block_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the full blocks of a sequence, in order; the last known token never belongs to one.

        It must be computed even if all before it is cached: its logits are wanted.
        """
        hashes, size = sequence.block_hashes, self.block_size
        for index in range(len(hashes), (sequence.num_known_tokens - 1) // size):
            start, stop = index * size, (index + 1) * size
            digest = hashlib.sha256(hashes[-1] if hashes else self._root(sequence))
            digest.update(np.array(sequence.tokens(start, stop), dtype=np.int64).tobytes())
            for span in sequence.image_spans:
                begin, end = max(span.start, start), min(span.stop, stop)
                if begin < end:
                    digest.update(f"{span.image.sha256}:{begin - span.start}:{end - span.start}".encode())
            hashes.append(digest.digest())
        return hashes

    def _root(self, sequence: Sequence) -> bytes:
        request = sequence.request
        salt = request.prompt.cache_salt
        return salt.encode() if self._enable_prefix_caching else f"request {request.request_id}".encode()

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Tokens at the beginning of a sequence that `admit` would find in the cache."""
        return len(self._cached_blocks(sequence)) * self.block_size

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        blocks = []
        for block_hash in self.block_hashes(sequence):
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_admit(self, sequence: Sequence) -> bool:
        """True if `admit` would succeed."""
        cached = self._cached_blocks(sequence)
        unowned = sum(not self._num_owners[block] for block in cached)
        return self._num_blocks(sequence.num_tokens) - len(cached) <= len(self._free) - unowned

    def admit(self, sequence: Sequence) -> int:
        """Give a sequence blocks for all its tokens; returns how many tokens the shared ones hold."""
        if not self.can_admit(sequence):
            raise IntegrityError(f"{sequence.seq_id} is admitted but does not fit")
        shared = self._cached_blocks(sequence)
        for block in shared:
            self._own(block)
        table = [*shared, *(self._take() for _ in range(self._num_blocks(sequence.num_tokens) - len(shared)))]
        self._tables[sequence.seq_id] = table
        self._num_published[sequence.seq_id] = len(shared)
        num_cached = len(shared) * self.block_size
        self.stats.num_tokens += sequence.num_tokens
        self.stats.num_cached_tokens += num_cached
        return num_cached

    def can_grow(self, seq_id: str, num_tokens: int) -> bool:
        """True if `grow` with the same arguments would succeed."""
        return self._num_blocks(num_tokens) - len(self._tables[seq_id]) <= len(self._free)

    def grow(self, seq_id: str, num_tokens: int) -> None:
        """Extend the block table of an admitted sequence until it holds `num_tokens`."""
        if not self.can_grow(seq_id, num_tokens):
            raise IntegrityError(f"{seq_id} grows to {num_tokens} tokens, but {len(self._free)} blocks are free")
        table = self._tables[seq_id]
        table.extend(self._take() for _ in range(self._num_blocks(num_tokens) - len(table)))

    def publish(self, sequence: Sequence) -> None:
        """Let others share the full blocks of a sequence whose tokens are computed."""
        table, first = self._tables[sequence.seq_id], self._num_published[sequence.seq_id]
        full = sequence.num_computed_tokens // self.block_size
        if full <= first:
            return
        for block, block_hash in zip(table[first:full], self.block_hashes(sequence)[first:full], strict=False):
            if block_hash not in self._block_of_hash:
                self._block_of_hash[block_hash] = block
                self._hash_of_block[block] = block_hash
            self._num_published[sequence.seq_id] += 1

    def free(self, seq_id: str) -> None:
        """Take back the blocks of a sequence; what others share stays theirs. Unknown ids are ignored."""
        self._num_published.pop(seq_id, None)
        # The end of a prefix is of no use without its beginning: it is given away first.
        for block in reversed(self._tables.pop(seq_id, ())):
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                self._free[block] = None

    def unpublish(self, seq_id: str) -> None:
        """Let nobody else share the blocks of a sequence that went wrong."""
        for block in self._tables.get(seq_id, ()):
            block_hash = self._hash_of_block.pop(block, None)
            if block_hash is not None:
                del self._block_of_hash[block_hash]

    def block_table(self, seq_id: str) -> list[int]:
        """Blocks of a sequence in order of position."""
        return self._tables[seq_id]

    def slots(self, seq_id: str, start: int, stop: int) -> np.ndarray:
        """Where the tokens at [start, stop) lie: block * block_size + offset. int64."""
        positions = np.arange(start, stop)
        blocks = np.array(self._tables[seq_id], dtype=np.int64)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def check_integrity(self) -> None:
        """Every block is owned as often as tables hold it, or free; hashes and blocks correspond.

        Raises IntegrityError.
        """
        owners = Counter(block for table in self._tables.values() for block in table)
        if any(self._num_owners[block] != owners[block] for block in range(self.num_blocks)):
            raise IntegrityError("a block's number of owners is not the number of tables that hold it")
        free = {block for block in range(self.num_blocks) if not owners[block]}
        if free != set(self._free):
            raise IntegrityError(
                f"{len(owners)} owned and {len(self._free)} free of {self.num_blocks} blocks: some are lost"
            )
        if {block: block_hash for block_hash, block in self._block_of_hash.items()} != self._hash_of_block:
            raise IntegrityError("hashes and blocks do not correspond")
        if self._tables.keys() != self._num_published.keys():
            raise IntegrityError("published blocks of a sequence without a table")

    def check_idle(self) -> None:
        """Nothing is owned. Raises IntegrityError."""
        self.check_integrity()
        if self._tables:
            raise IntegrityError(f"blocks still owned by {', '.join(self._tables)}")

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _own(self, block: int) -> None:
        self._free.pop(block, None)
        self._num_owners[block] += 1

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        block_hash = self._hash_of_block.pop(block, None)
        if block_hash is not None:
            del self._block_of_hash[block_hash]
        self._num_owners[block] = 1
        return block


def next_block_hash(hashes: Items[bytes], num_computed_tokens: int, block_size: int) -> bytes | None:
    """Hash of the first full block that is not computed yet; None if there is none."""
    index = num_computed_tokens // block_size
    return hashes[index] if index < len(hashes) else None
