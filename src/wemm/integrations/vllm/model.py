"""WeMM as a model of vLLM: our tower and downsampler, vLLM's decoder layers, our weight map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from wemm.engine.vision_encode import image_batch
from wemm.integrations.vllm.checkpoint import find_files
from wemm.integrations.vllm.language_model import InternLM2
from wemm.integrations.vllm.plora import tensor_parallel
from wemm.integrations.vllm.processor import WemmDummyInputs, WemmProcessingInfo, WemmProcessor
from wemm.integrations.vllm.tokenizer import IMAGE
from wemm.integrations.vllm.weights import load
from wemm.kernels import load_kernels
from wemm.layers.embedding import Embedding
from wemm.model.downsampler import Downsampler
from wemm.model.vision_tower import VisionTower
from wemm.processing.image_processor import ProcessedImage
from wemm.processing.resize import plan_resized
from wemm.quantization import scheme_of


@MULTIMODAL_REGISTRY.register_processor(WemmProcessor, info=WemmProcessingInfo, dummy_inputs=WemmDummyInputs)
class WemmForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """The architecture. Every rank holds the vision tower whole.

    Each computes all images for itself, or with `--mm-encoder-tp-mode data` its share of them.
    """

    requires_raw_input_tokens = True
    supports_encoder_tp_data = True
    packed_modules_mapping = {"wqkv": ["wqkv"], "w13": ["w1", "w3"]}  # noqa: RUF012 - as vLLM declares it

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Raises CheckpointError where the files do not fit together."""
        super().__init__()
        load_kernels(current_platform.device_type)
        self._files = files = find_files(vllm_config)
        self._config = config = files.config
        self._image_token_id = config.text.vocab_size
        mode = vllm_config.model_config.get_multimodal_config().mm_encoder_tp_mode
        self._shares_images = mode == "data" and tensor_parallel().size > 1
        self.vision_tower = VisionTower(config.vision, scheme=scheme_of(config.quantization.vision))
        self.downsampler = Downsampler(config.downsampler)
        self.separator_embedding = Embedding(config.num_separators, config.text.hidden_size)
        self.language_model = InternLM2(
            vllm_config=vllm_config,
            config=config.text,
            plora=files.plora,
            image_token_id=self._image_token_id,
            prefix=f"{prefix}.language_model" if prefix else "language_model",
        )
        self.logits_processor = LogitsProcessor(self._image_token_id + 1)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """For display: prompts hold an id that no text becomes."""
        return IMAGE

    def get_language_model(self) -> nn.Module:
        """The decoder."""
        return self.language_model

    def embed_multimodal(self, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Resized pixels, uint8 [height, width, 3] each → per image [num_tokens, hidden_size]."""
        images = []
        for pixels in kwargs["pixels"]:
            height, width = pixels.shape[:2]
            images.append(ProcessedImage(pixels, plan_resized((width, height), self._config), ""))
        return tuple(self._encode_shared(images) if self._shares_images else self._encode(images))

    def _encode(self, images: Sequence[ProcessedImage]) -> list[torch.Tensor]:
        weight = self.separator_embedding.weight
        if not images:
            return []
        batch = image_batch(images, self._config.vision, weight.device)
        grids = self.downsampler(self.vision_tower(batch), batch.patch_grids)
        sizes = [image.plan.token_grid[0] * image.plan.token_grid[1] for image in images]
        return [torch.cat((weight[:1], grid, weight[1:2])) for grid in grids.split(sizes)]

    def _encode_shared(self, images: Sequence[ProcessedImage]) -> list[torch.Tensor]:
        # Rank r takes images r, r + size, …; what each computed is filled up to the same length to be gathered.
        ranks, weight = tensor_parallel(), self.separator_embedding.weight
        lengths = [[image.plan.num_tokens for image in images[r :: ranks.size]] for r in range(ranks.size)]
        longest = max(map(sum, lengths))
        mine = torch.cat([weight[:0], *self._encode(images[ranks.rank :: ranks.size])])
        padded = F.pad(mine, (0, 0, 0, longest - len(mine)))
        everyone = tensor_model_parallel_all_gather(padded, dim=0).split(longest)
        embeds: list[torch.Tensor] = [weight[:0]] * len(images)
        for rank, (packed, sizes) in enumerate(zip(everyone, lengths, strict=True)):
            embeds[rank :: ranks.size] = packed[: sum(sizes)].split(sizes) if sizes else []
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """→ hidden states [num_tokens, hidden_size], or what the next stage needs."""
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[n, hidden_size] → [n, vocabulary and the image token, which is never drawn]."""
        logits = self.logits_processor(self.language_model.output, hidden_states)
        if logits is not None:
            logits[..., self._image_token_id] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Both spellings of a checkpoint. Raises CheckpointError."""
        return load(self, self._files, weights)
