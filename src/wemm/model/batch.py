"""What one forward pass needs, all of it: nothing is left on the model between prepare and forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ImageBatch:
    """Packed patches of the images of one vision-tower call. Built by engine/vision_encode.py."""

    patches: torch.Tensor  # uint8 [num_patches, 3 * patch_size**2], by channel, row and column
    extents: torch.Tensor  # int32 [num_patches, 2], rows and columns of a patch that are its image's, not padding
    position_ids: torch.Tensor  # int64 [num_patches], rows of the position table
    cu_seqlens: torch.Tensor  # int32 [num_images + 1]
    patch_grids: tuple[tuple[int, int], ...]  # (rows, columns) per image


@dataclass(frozen=True)
class Batch:
    """Tokens of one language-model call. Built by engine/model_input.py.

    First one token of every decoding sequence, then chunks of several tokens each.
    """

    input_ids: torch.Tensor  # int64 [num_tokens]; image positions hold IMAGE_TOKEN_ID
    positions: torch.Tensor  # int64 [num_tokens]
    slot_mapping: torch.Tensor  # int64 [num_tokens], where each token's K/V goes
    block_tables: torch.Tensor  # int32 [num_seqs, max_blocks], padded with 0
    seq_lens: torch.Tensor  # int32 [num_seqs], tokens after this call
    logits_rows: torch.Tensor  # int64 [num_logits], the rows whose logits are wanted
    cu_seqlens_q: torch.Tensor | None = None
    """int32 [num_chunks + 1], bounds of the chunks from the first row behind the decodes on; None: no chunks."""
    image_rows: torch.Tensor | None = None  # int64 [num_image_tokens], rows PLoRA acts on; None: none
    visual_embeds: torch.Tensor | None = None  # [num_image_tokens, hidden_size], in the order of image_rows

    @property
    def num_decodes(self) -> int:
        """Sequences, and rows, of one token each that come before the chunks."""
        num_chunks = 0 if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1
        return len(self.seq_lens) - num_chunks
