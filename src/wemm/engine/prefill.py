"""Scheduled prompts → a prefill Batch. An image may begin before or end after the chunk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.scheduler import ScheduledSequence
from wemm.model.batch import Batch


def prefill_batch(
    scheduled: Sequence[ScheduledSequence],
    kv_cache: KVCacheManager,
    encoder_cache: EncoderCache,
    device: torch.device,
) -> Batch:
    """Tokens of all sequences packed one after another."""
    input_ids: list[int] = []
    positions: list[int] = []
    slot_mapping: list[int] = []
    image_rows: list[int] = []
    visual_embeds: list[torch.Tensor] = []
    for entry in scheduled:
        sequence, start, stop = entry.sequence, entry.sequence.num_computed_tokens, entry.stop
        first_row = len(input_ids) - start
        for span in sequence.image_spans:
            begin, end = max(span.start, start), min(span.stop, stop)
            if begin < end:
                image_rows += range(first_row + begin, first_row + end)
                embeds = encoder_cache.get(span.image.sha256)
                visual_embeds.append(embeds[begin - span.start : end - span.start])
        input_ids += sequence.tokens(start, stop)
        positions += range(start, stop)
        slot_mapping += [kv_cache.slot(sequence.seq_id, position) for position in range(start, stop)]
    bounds = [0, *accumulate(entry.num_new_tokens for entry in scheduled)]
    return Batch(
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.tensor(slot_mapping, device=device),
        block_tables=block_tables(scheduled, kv_cache, device),
        seq_lens=torch.tensor([entry.stop for entry in scheduled], dtype=torch.int32, device=device),
        logits_rows=torch.tensor([bound - 1 for bound in bounds[1:]], device=device),
        cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32, device=device),
        image_rows=torch.tensor(image_rows, device=device) if image_rows else None,
        visual_embeds=torch.cat(visual_embeds) if visual_embeds else None,
    )


def block_tables(
    scheduled: Sequence[ScheduledSequence], kv_cache: KVCacheManager, device: torch.device
) -> torch.Tensor:
    """int32 [num_seqs, max_blocks], padded with 0."""
    tables = [kv_cache.block_table(entry.sequence.seq_id) for entry in scheduled]
    width = max(len(table) for table in tables)
    return torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32, device=device)
