"""WeMM: vision tower, downsampler and language model, and `embed`, the one seam where they meet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from wemm.config import UNQUANTIZED, ModelConfig, PloraConfig, QuantizationConfig
from wemm.distributed import SINGLE, TensorParallel
from wemm.layers.embedding import Embedding
from wemm.model.batch import Batch
from wemm.model.downsampler import Downsampler
from wemm.model.internlm2 import InternLM2
from wemm.model.vision_tower import VisionTower
from wemm.quantization import KV_SCALE_BYTES, scheme_of


class WemmModel(nn.Module):
    """The whole network. Build it under `torch.device("meta")` and let the loader fill it."""

    def __init__(
        self,
        config: ModelConfig,
        plora: PloraConfig | None,
        tensor_parallel: TensorParallel = SINGLE,
        quantization: QuantizationConfig = UNQUANTIZED,
    ) -> None:
        super().__init__()
        self._kernel_size = config.downsampler.kernel_size
        self._text = config.text
        self._tensor_parallel = tensor_parallel
        self.vision_tower = VisionTower(config.vision, tensor_parallel, scheme_of(quantization.vision))
        self.downsampler = Downsampler(config.downsampler)
        self.separator_embedding = Embedding(config.num_separators, config.text.hidden_size)
        self.language_model = InternLM2(config.text, plora, tensor_parallel, scheme_of(quantization.language))

    def visual_embeds(self, features: torch.Tensor, patch_grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Tower features [num_patches, vision hidden] → per image [num_tokens, hidden_size].

        Separator row 0, the grid tokens row-major, separator row 1.
        """
        k = self._kernel_size
        sizes = [-(-rows // k) * -(-columns // k) for rows, columns in patch_grids]
        grids = self.downsampler(features, patch_grids).split(sizes)
        before, after = self.separator_embedding.weight[:1], self.separator_embedding.weight[1:2]
        return [torch.cat((before, grid, after)) for grid in grids]

    def embed(
        self,
        input_ids: torch.Tensor,
        visual_embeds: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids [num_tokens] → [num_tokens, hidden_size], image rows taken from `visual_embeds`."""
        embeds: torch.Tensor = self.language_model.tok_embeddings(input_ids.clamp(min=0))
        if visual_embeds is None or image_rows is None:
            return embeds
        return embeds.index_copy(0, image_rows, visual_embeds)

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """→ hidden states [num_seqs, hidden_size] of batch.logits_rows."""
        embeds = self.embed(batch.input_ids, batch.visual_embeds, batch.image_rows)
        hidden: torch.Tensor = self.language_model(embeds, batch, kv_cache)
        return hidden

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32
    ) -> tuple[int, ...]:
        """Of the `kv_cache` that `forward` takes, on this rank; with int8 there are scales in it."""
        text = self._text
        num_kv_heads = self._tensor_parallel.length(text.num_key_value_heads)
        width = text.head_dim + (KV_SCALE_BYTES if dtype is torch.int8 else 0)
        return text.num_hidden_layers, 2, num_blocks, block_size, num_kv_heads, width

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_seqs, hidden_size] → float32 [num_seqs, vocab_size]."""
        logits: torch.Tensor = self.language_model.output(hidden)
        return logits.to(torch.float32)
