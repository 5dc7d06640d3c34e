"""Decode steps written down once and replayed, where the device can: no Python between its kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from wemm.engine.forward_pass import Forwarded, output_layer
from wemm.kernels import Recorder
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel

logger = logging.getLogger(__name__)

_Rows = tuple[torch.Tensor, ...]
"""Tensors with a row per sequence."""


class _Part(Protocol):
    """The part of a step that is recorded, and those before and behind it."""

    def before(self, batch: Batch) -> _Rows:
        """What changes from step to step beside the batch's slots, blocks and lengths."""

    def recorded(self, rows: _Rows, batch: Batch, kv_cache: torch.Tensor) -> _Rows:
        """The same computation at the same addresses each time."""

    def behind(self, rows: _Rows) -> Forwarded:
        """The end, of the rows whose logits are wanted."""


@dataclass(frozen=True)
class _WholeStep:
    """From token ids to logits."""

    model: WemmModel

    def before(self, batch: Batch) -> _Rows:
        return batch.input_ids, batch.positions

    def recorded(self, rows: _Rows, batch: Batch, kv_cache: torch.Tensor) -> _Rows:
        (input_ids, positions), language_model = rows, self.model.language_model
        angles = language_model.angles(positions)
        x = language_model.run_layers(self.model.embed(input_ids), *angles, batch, kv_cache)
        forwarded = output_layer(self.model, language_model.norm(x))
        return forwarded.logits, forwarded.is_finite

    def behind(self, rows: _Rows) -> Forwarded:
        return Forwarded(*rows)


@dataclass(frozen=True)
class _Layers:
    """What our own kernels compute alone."""

    model: WemmModel

    def before(self, batch: Batch) -> _Rows:
        return self.model.embed(batch.input_ids), *self.model.language_model.angles(batch.positions)

    def recorded(self, rows: _Rows, batch: Batch, kv_cache: torch.Tensor) -> _Rows:
        x, cos, sin = rows
        return (self.model.language_model.run_layers(x, cos, sin, batch, kv_cache),)

    def behind(self, rows: _Rows) -> Forwarded:
        (x,) = rows
        return output_layer(self.model, self.model.language_model.norm(x))


@dataclass(frozen=True)
class _Inputs:
    """Of what is recorded, for a fixed number of sequences; overwritten before each replay."""

    rows: _Rows
    batch: Batch
    spare_block: int
    block_size: int

    def write(self, rows: _Rows, batch: Batch) -> None:
        """Of a step; rows behind its own become sequences of one token in the spare block."""
        num_seqs, num_blocks = batch.block_tables.shape
        slots, seq_lens, tables = self.batch.slot_mapping, self.batch.seq_lens, self.batch.block_tables
        for fixed, values in zip(self.rows, rows, strict=True):
            fixed[:num_seqs] = values
        slots[:num_seqs] = batch.slot_mapping
        seq_lens[:num_seqs] = batch.seq_lens
        tables[:num_seqs, :num_blocks] = batch.block_tables
        if num_seqs < len(seq_lens):
            slots[num_seqs:] = self.spare_block * self.block_size
            seq_lens[num_seqs:] = 1
            tables[num_seqs:, 0] = self.spare_block


@dataclass(frozen=True)
class _Graph:
    """A recording, and what it leaves behind."""

    inputs: _Inputs
    out: _Rows
    replay: Callable[[], None]


def num_spare_blocks(sizes: Sequence[int]) -> int:
    """Of the cache, beyond those of sequences: where rows that fill a step up write. 0 if no size is missing."""
    return int(len(sizes) < max(sizes, default=0))


class DecodeGraphs:
    """One recording per size, a number of sequences, made when it is first met."""

    def __init__(self, model: WemmModel, kv_cache: torch.Tensor, recorder: Recorder, sizes: Sequence[int]) -> None:
        """Steps of fewer sequences than one of `sizes` are filled up to it; `kv_cache` has their spare block."""
        self._part: _Part = _WholeStep(model) if recorder.holds_torch else _Layers(model)
        self._kv_cache = kv_cache
        self._record = recorder.record
        self._sizes = sizes
        self._graphs: dict[int, _Graph | None] = {}

    def forward(self, batch: Batch) -> Forwarded | None:
        """A step; None where one of this kind cannot be replayed."""
        num_seqs = len(batch.seq_lens)
        size = next((size for size in self._sizes if size >= num_seqs), None)
        if size is None or batch.cu_seqlens_q is not None or self._graphs.get(size, True) is None:
            return None
        rows = self._part.before(batch)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size, rows, batch)
        graph = self._graphs[size]
        if graph is None:
            return None
        graph.inputs.write(rows, batch)
        graph.replay()
        # A sequence whose prompt goes on has a row, but no logits.
        wanted = batch.logits_rows if len(batch.logits_rows) < num_seqs else slice(num_seqs)
        return self._part.behind(tuple(out[wanted] for out in graph.out))

    def _capture(self, size: int, rows: _Rows, batch: Batch) -> _Graph | None:
        num_blocks, block_size = self._kv_cache.shape[2:4]
        fixed = replace(
            batch,
            slot_mapping=batch.slot_mapping.new_empty(size),
            seq_lens=batch.seq_lens.new_empty(size),
            block_tables=batch.block_tables.new_zeros(size, num_blocks),
        )
        fixed_rows = tuple(values.new_zeros(size, *values.shape[1:]) for values in rows)
        inputs = _Inputs(fixed_rows, fixed, num_blocks - 1, block_size)
        inputs.write(rows, batch)
        recorded = self._record(lambda: self._part.recorded(inputs.rows, fixed, self._kv_cache))
        if recorded is None:
            logger.info("decode of %d sequences is not replayed", size)
            return None
        return _Graph(inputs, *recorded)
