"""Visual embeddings by image hash, kept while a sequence needs them: equal images are encoded once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from wemm.errors import IntegrityError


class EncoderCache:
    """Embeddings [num_tokens, hidden_size] by SHA-256, with the sequences that hold them."""

    def __init__(self) -> None:
        self._embeds: dict[str, torch.Tensor] = {}
        self._holders: dict[str, set[str]] = defaultdict(set)

    def acquire(self, seq_id: str, hashes: Iterable[str]) -> None:
        """Keep these images' embeddings, once stored, until the sequence releases them."""
        for sha256 in hashes:
            self._holders[sha256].add(seq_id)

    def release(self, seq_id: str) -> None:
        """The sequence needs no image any more; what nobody holds is dropped."""
        for sha256 in [s for s, holders in self._holders.items() if seq_id in holders]:
            self._holders[sha256].discard(seq_id)
            if not self._holders[sha256]:
                del self._holders[sha256]
                self._embeds.pop(sha256, None)

    def store(self, sha256: str, embeds: torch.Tensor) -> None:
        """Keep the embeddings of a held image."""
        if not self._holders.get(sha256):
            raise IntegrityError(f"image {sha256[:12]} is stored but held by no sequence")
        self._embeds[sha256] = embeds

    def get(self, sha256: str) -> torch.Tensor:
        """Embeddings of an image that was encoded."""
        return self._embeds[sha256]

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._embeds

    def check_integrity(self) -> None:
        """Every stored image is held. Raises IntegrityError."""
        orphans = [s for s in self._embeds if not self._holders.get(s)]
        if orphans:
            raise IntegrityError(f"{len(orphans)} images are kept for nobody")

    def check_idle(self) -> None:
        """Nothing is held. Raises IntegrityError."""
        self.check_integrity()
        if self._holders:
            raise IntegrityError(f"{len(self._holders)} images are still held")
