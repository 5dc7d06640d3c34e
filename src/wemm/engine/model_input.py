"""Scheduled sequences → what every rank needs to compute them: a few arrays, small enough to send each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.scheduler import ScheduledSequence


@dataclass(frozen=True)
class VisualSlice:
    """Rows [start, stop) of the embeddings of one image."""

    sha256: str
    start: int
    stop: int


@dataclass(frozen=True)
class ModelInput:
    """A `Batch` as numbers: tokens of the decoding sequences first, one each, then chunks.

    `cu_seqlens_q` is None without chunks; `visual_slices` fill `image_rows` in order. The ids of `pending_rows`
    are those that the last step has drawn, at `pending_draws` of its draws: only the device knows them.
    """

    input_ids: np.ndarray  # int64 [num_tokens]; 0 in pending_rows
    positions: np.ndarray  # int64 [num_tokens]
    slot_mapping: np.ndarray  # int64 [num_tokens]
    block_tables: np.ndarray  # int32 [num_seqs, max_blocks]
    seq_lens: np.ndarray  # int32 [num_seqs]
    logits_rows: np.ndarray  # int64 [num_logits]
    cu_seqlens_q: np.ndarray | None  # int32 [num_chunks + 1]
    image_rows: np.ndarray  # int64 [num_image_tokens]
    visual_slices: tuple[VisualSlice, ...]
    pending_rows: np.ndarray  # int64 [num_pending]
    pending_draws: np.ndarray  # int64 [num_pending]


def model_input(
    scheduled: Sequence[ScheduledSequence], kv_cache: KVCacheManager, draws: Mapping[str, int]
) -> ModelInput:
    """Sequences with one row must come first. An image may begin before a chunk or end after it.

    `draws` says of a sequence whose last token is not known yet which draw of the last step it is.
    Logits are wanted for the last token of a sequence that is computed to its end, and for every draft.
    """
    input_ids: list[int] = []
    image_rows: list[np.ndarray] = []
    logits_rows: list[int] = []
    visual_slices: list[VisualSlice] = []
    pending_rows: list[int] = []
    pending_draws: list[int] = []
    for entry in scheduled:
        sequence, first_row = entry.sequence, len(input_ids) - entry.start
        for span in sequence.images_needed(entry.start):
            begin, end = max(span.start, entry.start), min(span.stop, entry.stop)
            if begin < end:
                image_rows.append(np.arange(first_row + begin, first_row + end))
                visual_slices.append(VisualSlice(span.image.sha256, begin - span.start, end - span.start))
        input_ids += sequence.tokens(entry.start, entry.stop)
        if sequence.num_known_tokens < entry.stop:
            pending_rows.append(len(input_ids))
            pending_draws.append(draws[sequence.seq_id])
            input_ids.append(0)
        if entry.is_complete:
            logits_rows += range(len(input_ids) - 1, len(input_ids) + len(entry.draft_token_ids))
        input_ids += entry.draft_token_ids
    spans = [(entry.sequence.seq_id, entry.start, entry.start + entry.num_rows) for entry in scheduled]
    tables = [kv_cache.block_table(seq_id) for seq_id, _, _ in spans]
    width = max(len(table) for table in tables)
    chunks = [entry.num_rows for entry in scheduled if entry.num_rows > 1]
    return ModelInput(
        input_ids=np.array(input_ids, dtype=np.int64),
        positions=np.concatenate([np.arange(start, stop) for _, start, stop in spans]),
        slot_mapping=np.concatenate([kv_cache.slots(*span) for span in spans]),
        block_tables=np.array([table + [0] * (width - len(table)) for table in tables], dtype=np.int32),
        seq_lens=np.array([stop for _, _, stop in spans], dtype=np.int32),
        logits_rows=np.array(logits_rows, dtype=np.int64),
        cu_seqlens_q=np.array([0, *accumulate(chunks)], dtype=np.int32) if chunks else None,
        image_rows=np.concatenate(image_rows) if image_rows else np.empty(0, dtype=np.int64),
        visual_slices=tuple(visual_slices),
        pending_rows=np.array(pending_rows, dtype=np.int64),
        pending_draws=np.array(pending_draws, dtype=np.int64),
    )
