"""Which images have visual embeddings, who needs them, and which go when room is short.

The tensors belong to the model runner of every rank; it is told what to drop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from wemm.errors import IntegrityError


@dataclass
class EncoderCacheStats:
    """How often a sequence asked for an image, and how often one was encoded: the others were hits."""

    num_queries: int = 0
    num_encoded: int = 0


class EncoderCache:
    """Sizes of stored embeddings by SHA-256 of the image, and the sequences that hold them.

    An image that somebody holds stays; of the others, those used last stay while all together take no
    more than `capacity` bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.stats = EncoderCacheStats()
        self._sizes: dict[str, int] = {}
        self._unheld: OrderedDict[str, None] = OrderedDict()  # unused for longest first
        self._holders: dict[str, set[str]] = {}
        self._held: dict[str, set[str]] = {}
        self._dropped: list[str] = []
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored embeddings."""
        return self._num_bytes

    @property
    def num_held_bytes(self) -> int:
        """Bytes of those that cannot be dropped now."""
        return sum(self._sizes.get(sha256, 0) for sha256 in self._holders)

    def hold(self, seq_id: str, hashes: Iterable[str]) -> None:
        """Keep these images, now or once they are stored, until the sequence releases them."""
        held = self._held.setdefault(seq_id, set())
        for sha256 in hashes:
            if sha256 in held:
                continue
            held.add(sha256)
            self._holders.setdefault(sha256, set()).add(seq_id)
            self._unheld.pop(sha256, None)
            self.stats.num_queries += 1

    def release(self, seq_id: str, hashes: Iterable[str] | None = None) -> None:
        """The sequence needs these images no more; None: any image."""
        held = self._held.get(seq_id, set())
        for sha256 in held.intersection(held if hashes is None else hashes):
            held.discard(sha256)
            self._holders[sha256].discard(seq_id)
            if not self._holders[sha256]:
                del self._holders[sha256]
                if sha256 in self._sizes:
                    self._unheld[sha256] = None
        if not held:
            self._held.pop(seq_id, None)
        self._shrink()

    def store(self, sha256: str, num_bytes: int) -> None:
        """An image was encoded."""
        self.stats.num_encoded += 1
        self._num_bytes += num_bytes - self._sizes.get(sha256, 0)
        self._sizes[sha256] = num_bytes
        if sha256 not in self._holders:
            self._unheld[sha256] = None
        self._shrink()

    def take_dropped(self) -> list[str]:
        """Images dropped since the last call: their tensors can go."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def holders(self, sha256: str) -> frozenset[str]:
        """Sequences that need the image."""
        return frozenset(self._holders.get(sha256, ()))

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._sizes

    def check_integrity(self) -> None:
        """Holders and held correspond, and only what is held exceeds the capacity. Raises IntegrityError."""
        by_sequence = {(seq_id, sha256) for seq_id, images in self._held.items() for sha256 in images}
        by_image = {(seq_id, sha256) for sha256, seq_ids in self._holders.items() for seq_id in seq_ids}
        if by_sequence != by_image or set() in self._holders.values():
            raise IntegrityError("holders of images and images held do not correspond")
        if set(self._unheld) != self._sizes.keys() - self._holders.keys():
            raise IntegrityError("an image that nobody holds cannot be dropped, or one that is held can")
        if self._num_bytes != sum(self._sizes.values()):
            raise IntegrityError(f"images take {sum(self._sizes.values())} bytes, {self._num_bytes} were counted")
        if self._num_bytes > max(self.capacity, self.num_held_bytes):
            raise IntegrityError(f"images take {self._num_bytes} bytes of {self.capacity}")

    def check_idle(self) -> None:
        """Nothing is held. Raises IntegrityError."""
        self.check_integrity()
        if self._holders:
            raise IntegrityError(f"{len(self._holders)} images are still held")

    def _shrink(self) -> None:
        while self._num_bytes > self.capacity and self._unheld:
            sha256, _ = self._unheld.popitem(last=False)
            self._num_bytes -= self._sizes.pop(sha256)
            self._dropped.append(sha256)
