"""Batch → logits on one rank. Owns the model and the KV tensors; refuses NaN and Inf by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wemm.config import ModelConfig
from wemm.cost import largest_image
from wemm.engine.vision_encode import group_images, image_batch
from wemm.errors import NumericalError
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel
from wemm.platforms import Platform
from wemm.processing.image_processor import ProcessedImage


class ModelRunner:
    """Runs the model on its platform's device."""

    def __init__(
        self,
        model: WemmModel,
        config: ModelConfig,
        platform: Platform,
        dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
    ) -> None:
        text = config.text
        self._model = model
        self._config = config
        self._platform = platform
        self._dtype = dtype
        # Never read before it is written, so memory is taken only as it is used.
        self._kv_cache = torch.empty(
            (text.num_hidden_layers, 2, num_blocks, block_size, text.num_key_value_heads, text.head_dim),
            dtype=dtype,
            device=platform.device,
        )

    @property
    def device(self) -> torch.device:
        """Where batches must lie."""
        return self._platform.device

    @torch.inference_mode()
    def encode_images(self, images: Sequence[ProcessedImage]) -> list[torch.Tensor | NumericalError]:
        """Embeddings [num_tokens, hidden_size] of each image, or why it has none."""
        groups = group_images(images, largest_image(self._config).num_patches)
        results = [result for group in groups for result in self._encode_group(group)]
        self._platform.synchronize()
        return results

    def _encode_group(self, images: Sequence[ProcessedImage]) -> list[torch.Tensor | NumericalError]:
        packed = image_batch(images, self._config.vision, self._dtype, self.device)
        features = self._model.vision_tower(packed)
        embeds = self._model.visual_embeds(features, packed.patch_grids)
        per_image = features.split([image.plan.num_patches for image in images])
        results: list[torch.Tensor | NumericalError] = []
        for image_features, image_embeds in zip(per_image, embeds, strict=True):
            if not _finite(image_features):
                results.append(self._numerical_error("vision_tower"))
            elif not _finite(image_embeds):
                results.append(self._numerical_error("downsampler"))
            else:
                results.append(image_embeds)
        return results

    @torch.inference_mode()
    def forward(self, batch: Batch) -> tuple[torch.Tensor, list[NumericalError | None]]:
        """Logits float32 [num_seqs, vocab_size], and per sequence what is wrong with its row."""
        hidden = self._model(batch, self._kv_cache)
        logits = self._model.compute_logits(hidden)
        finite = zip(hidden.isfinite().all(-1).tolist(), logits.isfinite().all(-1).tolist(), strict=True)
        return logits, [self._row_error(*row) for row in finite]

    def _row_error(self, hidden_finite: bool, logits_finite: bool) -> NumericalError | None:
        if hidden_finite and logits_finite:
            return None
        return self._numerical_error("logits" if hidden_finite else "language_model")

    def _numerical_error(self, stage: str) -> NumericalError:
        return NumericalError(stage, str(self._dtype).removeprefix("torch."))


def _finite(x: torch.Tensor) -> bool:
    return bool(x.isfinite().all())
