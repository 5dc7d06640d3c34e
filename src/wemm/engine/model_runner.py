"""What one rank computes. Owns model, KV tensors and visual embeddings; refuses NaN and Inf by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from wemm.config import ModelConfig
from wemm.distributed import SINGLE, TensorParallel
from wemm.engine.decode_graphs import DecodeGraphs, num_spare_blocks
from wemm.engine.forward_pass import Forwarded, output_layer
from wemm.engine.model_input import ModelInput
from wemm.engine.scheduler import VisionSlice
from wemm.engine.vision_encode import image_batch
from wemm.errors import NumericalError
from wemm.kernels import Recorder, release_memory
from wemm.model.batch import Batch, ImageBatch
from wemm.model.wemm import WemmModel
from wemm.platforms import Platform
from wemm.platforms.transfer import to_device
from wemm.processing.image_processor import ProcessedImage


class Runner(Protocol):
    """What the engine asks of one rank or of many."""

    @property
    def model(self) -> WemmModel:
        """Of the only rank, or of the first of many: what leaves a layer is whole on every rank."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""

    def encode(self, vision: VisionSlice) -> list[NumericalError | None]:
        """Part of a vision-tower call. At its end every image's embeddings are kept, or its error returned."""

    def forward(self, model_input: ModelInput, last_token_ids: torch.Tensor | None) -> Forwarded:
        """A step, launched. `last_token_ids`: int64, those the last one has drawn, for its pending rows."""

    def drop_images(self, hashes: Sequence[str]) -> None:
        """Forget the embeddings of these images."""

    def close(self) -> None:
        """Release what is shared with other ranks."""


class ModelRunner:
    """Runs the model on its platform's device."""

    def __init__(
        self,
        model: WemmModel,
        config: ModelConfig,
        platform: Platform,
        dtype: torch.dtype,
        kv_cache_dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        recorder: Recorder | None = None,
        tensor_parallel: TensorParallel = SINGLE,
    ) -> None:
        """With `recorder`, decode steps are replayed where they can be."""
        self._model = model
        self._tensor_parallel = tensor_parallel
        self._config = config
        self._platform = platform
        self.dtype = dtype
        """What the model computes in."""
        sizes = platform.decode_graph_sizes if recorder else ()
        # Never read before it is written, so memory is taken only as it is used.
        self._kv_cache = torch.empty(
            model.kv_cache_shape(num_blocks + num_spare_blocks(sizes), block_size, kv_cache_dtype),
            dtype=kv_cache_dtype,
            device=platform.device,
        )
        self._decode_graphs = DecodeGraphs(model, self._kv_cache, recorder, sizes) if recorder else None
        self._visual_embeds: dict[str, torch.Tensor] = {}
        self._encoding: tuple[ImageBatch, torch.Tensor] | None = None

    @property
    def model(self) -> WemmModel:
        """This rank's."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where logits lie."""
        return self._platform.device

    @torch.inference_mode()
    def encode(self, vision: VisionSlice) -> list[NumericalError | None]:
        """Some layers of the tower; behind the last one the downsampler, and embeddings to keep."""
        self._platform.select()
        tower = self._model.vision_tower
        if vision.first_layer == 0:
            packed = image_batch(vision.images, self._config.vision, self.device)
            self._encoding = packed, tower.embeddings(packed.patches, packed.extents, packed.position_ids)
        assert self._encoding is not None
        packed, x = self._encoding
        x = tower.encoder(x, packed.cu_seqlens, slice(vision.first_layer, vision.last_layer))
        self._encoding = packed, x
        if not vision.is_complete:
            self._platform.synchronize()
            return []
        self._encoding = None
        results = self._finish_encoding(vision.images, packed, tower.post_layernorm(x))
        self._platform.synchronize()
        return results

    def _finish_encoding(
        self, images: Sequence[ProcessedImage], packed: ImageBatch, features: torch.Tensor
    ) -> list[NumericalError | None]:
        embeds = self._model.visual_embeds(features, packed.patch_grids)
        per_image = features.split([image.plan.num_patches for image in images])
        results: list[NumericalError | None] = []
        for image, image_features, image_embeds in zip(images, per_image, embeds, strict=True):
            if not _finite(image_features):
                results.append(numerical_error("vision_tower", self.dtype))
            elif not _finite(image_embeds):
                results.append(numerical_error("downsampler", self.dtype))
            else:
                results.append(None)
                self._visual_embeds[image.sha256] = image_embeds
        return results

    @torch.inference_mode()
    def forward(self, model_input: ModelInput, last_token_ids: torch.Tensor | None = None) -> Forwarded:
        """A step, launched. Ranks other than the first are sent the ids of pending rows by that."""
        self._platform.select()
        batch = self._batch(model_input, last_token_ids)
        replayed = self._decode_graphs.forward(batch) if self._decode_graphs else None
        return replayed or output_layer(self._model, self._model(batch, self._kv_cache))

    def drop_images(self, hashes: Sequence[str]) -> None:
        """Forget the embeddings of these images."""
        for sha256 in hashes:
            self._visual_embeds.pop(sha256, None)

    def close(self) -> None:
        """Give CPUs and memory back."""
        self._platform.release()
        release_memory(self.device.type)

    def _batch(self, m: ModelInput, last_token_ids: torch.Tensor | None) -> Batch:
        visual = [self._visual_embeds[s.sha256][s.start : s.stop] for s in m.visual_slices]
        return Batch(
            input_ids=self._input_ids(m, last_token_ids),
            positions=self._tensor(m.positions),
            slot_mapping=self._tensor(m.slot_mapping),
            block_tables=self._tensor(m.block_tables),
            seq_lens=self._tensor(m.seq_lens),
            logits_rows=self._tensor(m.logits_rows),
            cu_seqlens_q=None if m.cu_seqlens_q is None else self._tensor(m.cu_seqlens_q),
            image_rows=self._tensor(m.image_rows) if visual else None,
            visual_embeds=torch.cat(visual) if visual else None,
        )

    def _input_ids(self, m: ModelInput, last_token_ids: torch.Tensor | None) -> torch.Tensor:
        input_ids = self._tensor(m.input_ids)
        if not len(m.pending_rows):
            return input_ids
        if last_token_ids is None:
            pending = torch.empty(len(m.pending_rows), dtype=torch.int64, device=self.device)
        else:
            pending = last_token_ids[self._tensor(m.pending_draws)]
        return input_ids.index_copy(0, self._tensor(m.pending_rows), self._tensor_parallel.broadcast(pending))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(values), self.device)


def numerical_error(stage: str, dtype: torch.dtype) -> NumericalError:
    """A stage has computed NaN or Inf in a dtype."""
    return NumericalError(stage, str(dtype).removeprefix("torch."))


def _finite(x: torch.Tensor) -> bool:
    return bool(x.isfinite().all())
