"""Decode steps written down once and replayed, where the device can: no Python between its kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from wemm.kernels import Record
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Inputs:
    """Of the layers, for a fixed number of sequences; overwritten before each replay."""

    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    batch: Batch
    spare_block: int
    block_size: int

    def write(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> None:
        """Of a step; rows behind its own become sequences of one token in the spare block."""
        num_seqs, num_blocks = batch.block_tables.shape
        slots, seq_lens, tables = self.batch.slot_mapping, self.batch.seq_lens, self.batch.block_tables
        self.x[:num_seqs] = x
        self.cos[:num_seqs] = cos
        self.sin[:num_seqs] = sin
        slots[:num_seqs] = batch.slot_mapping
        seq_lens[:num_seqs] = batch.seq_lens
        tables[:num_seqs, :num_blocks] = batch.block_tables
        if num_seqs < len(seq_lens):
            slots[num_seqs:] = self.spare_block * self.block_size
            seq_lens[num_seqs:] = 1
            tables[num_seqs:, 0] = self.spare_block


@dataclass(frozen=True)
class _Graph:
    """The layers, recorded, and what they leave behind."""

    inputs: _Inputs
    out: torch.Tensor
    replay: Callable[[], None]


def num_spare_blocks(sizes: Sequence[int]) -> int:
    """Of the cache, beyond those of sequences: where rows that fill a step up write. 0 if no size is missing."""
    return int(len(sizes) < max(sizes, default=0))


class DecodeGraphs:
    """One recording per size, a number of sequences, made when it is first met."""

    def __init__(self, model: WemmModel, kv_cache: torch.Tensor, record: Record, sizes: Sequence[int]) -> None:
        """Steps of fewer sequences than one of `sizes` are filled up to it; `kv_cache` has their spare block."""
        self._model = model
        self._kv_cache = kv_cache
        self._record = record
        self._sizes = sizes
        self._graphs: dict[int, _Graph | None] = {}

    def forward(self, batch: Batch) -> torch.Tensor | None:
        """As the model's forward; None where a step of this kind cannot be replayed."""
        num_seqs = len(batch.seq_lens)
        size = next((size for size in self._sizes if size >= num_seqs), None)
        if size is None or batch.cu_seqlens_q is not None or self._graphs.get(size, True) is None:
            return None
        model = self._model.language_model
        x, (cos, sin) = self._model.embed(batch.input_ids), model.angles(batch.positions)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size, x, cos, sin, batch)
        graph = self._graphs[size]
        if graph is None:
            return None
        graph.inputs.write(x, cos, sin, batch)
        graph.replay()
        hidden: torch.Tensor = model.norm(graph.out[batch.logits_rows])
        return hidden

    def _capture(
        self, size: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch
    ) -> _Graph | None:
        num_blocks, block_size = self._kv_cache.shape[2:4]
        fixed = replace(
            batch,
            slot_mapping=batch.slot_mapping.new_empty(size),
            seq_lens=batch.seq_lens.new_empty(size),
            block_tables=batch.block_tables.new_zeros(size, num_blocks),
        )
        fixed_x, fixed_cos, fixed_sin = (values.new_zeros(size, values.shape[1]) for values in (x, cos, sin))
        inputs = _Inputs(fixed_x, fixed_cos, fixed_sin, fixed, num_blocks - 1, block_size)
        inputs.write(x, cos, sin, batch)
        layers = self._model.language_model.run_layers
        recorded = self._record(lambda: layers(inputs.x, inputs.cos, inputs.sin, fixed, self._kv_cache))
        if recorded is None:
            logger.info("decode of %d sequences is not replayed", size)
            return None
        return _Graph(inputs, *recorded)
