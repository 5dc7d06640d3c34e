"""Running sequences → a decode Batch: one token each, no image rows, hence no PLoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.prefill import block_tables
from wemm.engine.scheduler import ScheduledSequence
from wemm.model.batch import Batch


def decode_batch(scheduled: Sequence[ScheduledSequence], kv_cache: KVCacheManager, device: torch.device) -> Batch:
    """The newest token of every sequence."""
    newest = [entry.sequence.num_computed_tokens for entry in scheduled]
    slots = [kv_cache.slot(e.sequence.seq_id, p) for e, p in zip(scheduled, newest, strict=True)]
    return Batch(
        input_ids=torch.tensor([entry.sequence.output_token_ids[-1] for entry in scheduled], device=device),
        positions=torch.tensor(newest, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        block_tables=block_tables(scheduled, kv_cache, device),
        seq_lens=torch.tensor([entry.stop for entry in scheduled], dtype=torch.int32, device=device),
        logits_rows=torch.arange(len(scheduled), device=device),
    )
