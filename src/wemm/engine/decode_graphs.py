"""Decode steps written down once and replayed, where the device can: no Python between its kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from wemm.kernels import Record
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel

_MOST_SEQUENCES = 16  # with more, the kernels' own time leaves little to win

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    """The layers over a fixed number of sequences: its inputs, to be overwritten, and its output."""

    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    batch: Batch
    out: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """One recording per number of sequences, made when it is first met."""

    def __init__(self, model: WemmModel, kv_cache: torch.Tensor, record: Record) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._record = record
        self._graphs: dict[int, _Graph | None] = {}

    def forward(self, batch: Batch) -> torch.Tensor | None:
        """As the model's forward; None where a step of this kind cannot be replayed."""
        num_seqs = len(batch.seq_lens)
        is_refused = self._graphs.get(num_seqs, True) is None
        if batch.cu_seqlens_q is not None or num_seqs > _MOST_SEQUENCES or is_refused:
            return None
        model = self._model.language_model
        x, (cos, sin) = self._model.embed(batch.input_ids), model.angles(batch.positions)
        if num_seqs not in self._graphs:
            self._graphs[num_seqs] = self._capture(x, cos, sin, batch)
        graph = self._graphs[num_seqs]
        if graph is None:
            return None
        graph.x.copy_(x)
        graph.cos.copy_(cos)
        graph.sin.copy_(sin)
        graph.batch.slot_mapping.copy_(batch.slot_mapping)
        graph.batch.seq_lens.copy_(batch.seq_lens)
        graph.batch.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        graph.replay()
        hidden: torch.Tensor = model.norm(graph.out[batch.logits_rows])
        return hidden

    def _capture(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> _Graph | None:
        num_blocks = self._kv_cache.shape[2]
        tables = batch.block_tables.new_zeros(len(batch.seq_lens), num_blocks)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        fixed = replace(
            batch,
            slot_mapping=batch.slot_mapping.clone(),
            seq_lens=batch.seq_lens.clone(),
            block_tables=tables,
        )
        x, cos, sin = x.clone(), cos.clone(), sin.clone()
        layers = self._model.language_model.run_layers
        recorded = self._record(lambda: layers(x, cos, sin, fixed, self._kv_cache))
        if recorded is None:
            logger.info("decode of %d sequences is not replayed", len(batch.seq_lens))
            return None
        return _Graph(x, cos, sin, fixed, *recorded)
