"""NaViT (Idefics2/SigLIP) encoder over packed patches of images of any size."""

from __future__ import annotations

import torch
from torch import nn

from wemm.config import VisionConfig
from wemm.distributed import SINGLE, TensorParallel
from wemm.layers.embedding import Embedding
from wemm.layers.linear import ColumnParallelLinear, ColumnParallelLinearGelu, RowParallelLinear
from wemm.layers.norm import LayerNorm
from wemm.model.batch import ImageBatch
from wemm.ops.add_residual import add_residual
from wemm.ops.embed_patches import embed_patches
from wemm.ops.vision_attention import vision_attention
from wemm.quantization import Scheme


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel: one product per patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, size, size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, patches: torch.Tensor, extents: torch.Tensor) -> torch.Tensor:
        """uint8 [num_patches, 3 * patch_size**2], int32 [num_patches, 2] → [num_patches, hidden_size]."""
        return embed_patches(patches, extents, self.weight, self.bias)


class VisionEmbeddings(nn.Module):
    """Patch plus learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding(config.position_grid**2, config.hidden_size)

    def forward(self, patches: torch.Tensor, extents: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """→ [num_patches, hidden_size]."""
        return self.patch_embedding(patches, extents) + self.position_embedding(position_ids)


class VisionAttention(nn.Module):
    """Full attention within each image, ranks sharing the heads."""

    def __init__(self, config: VisionConfig, tensor_parallel: TensorParallel, scheme: Scheme | None) -> None:
        super().__init__()
        self._num_heads = tensor_parallel.length(config.num_attention_heads)
        self._head_dim, hidden = config.head_dim, config.hidden_size
        self.q_proj = ColumnParallelLinear(hidden, hidden, tensor_parallel, bias=True, scheme=scheme)
        self.k_proj = ColumnParallelLinear(hidden, hidden, tensor_parallel, bias=True, scheme=scheme)
        self.v_proj = ColumnParallelLinear(hidden, hidden, tensor_parallel, bias=True, scheme=scheme)
        self.out_proj = RowParallelLinear(hidden, hidden, tensor_parallel, scheme)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[num_patches, hidden_size] → same."""
        q, k, v = (
            proj(x).view(-1, self._num_heads, self._head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(vision_attention(q, k, v, cu_seqlens, self._head_dim**-0.5).flatten(1))


class VisionMLP(nn.Module):
    """fc2(gelu_tanh(fc1 x))."""

    def __init__(self, config: VisionConfig, tensor_parallel: TensorParallel, scheme: Scheme | None) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.fc1 = ColumnParallelLinearGelu(hidden, intermediate, tensor_parallel, scheme)
        self.fc2 = RowParallelLinear(intermediate, hidden, tensor_parallel, scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_patches, hidden_size] → same."""
        return self.fc2(self.fc1(x))


class VisionLayer(nn.Module):
    """Pre-norm transformer block. Where ranks cannot share it evenly, each computes it whole."""

    def __init__(self, config: VisionConfig, tensor_parallel: TensorParallel, scheme: Scheme | None) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config, tensor_parallel.if_divides(config.num_attention_heads), scheme)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config, tensor_parallel.if_divides(config.intermediate_size), scheme)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[num_patches, hidden_size] → same."""
        x = add_residual(self.self_attn(self.layer_norm1(x), cu_seqlens), x)
        return add_residual(self.mlp(self.layer_norm2(x)), x)


class VisionEncoder(nn.Module):
    """All layers."""

    def __init__(self, config: VisionConfig, tensor_parallel: TensorParallel, scheme: Scheme | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            VisionLayer(config, tensor_parallel, scheme) for _ in range(config.num_hidden_layers)
        )

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, layers: slice = slice(None)) -> torch.Tensor:
        """[num_patches, hidden_size] → same, through some of the layers."""
        for layer in self.layers[layers]:
            x = layer(x, cu_seqlens)
        return x


class VisionTower(nn.Module):
    """Patches → features; every patch of every layer's end is used, nothing is pooled."""

    def __init__(
        self, config: VisionConfig, tensor_parallel: TensorParallel = SINGLE, scheme: Scheme | None = None
    ) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config, tensor_parallel, scheme)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, images: ImageBatch) -> torch.Tensor:
        """→ [num_patches, hidden_size], packed as the patches are.

        The engine runs the three parts itself, the encoder a few layers per step.
        """
        x = self.embeddings(images.patches, images.extents, images.position_ids)
        return self.post_layernorm(self.encoder(x, images.cu_seqlens))
