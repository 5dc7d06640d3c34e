"""InternLM2 decoder whose linears carry PLoRA."""

from __future__ import annotations

import torch
from torch import nn

from wemm.checkpoint.weight_map import plora_linear_name
from wemm.config import PLORA_LINEARS, PloraConfig, TextConfig
from wemm.distributed import TensorParallel
from wemm.layers.embedding import Embedding
from wemm.layers.linear import ColumnParallelLinear
from wemm.layers.norm import AddRMSNorm, RMSNorm
from wemm.layers.plora import ColumnParallelPloraLinear, PloraSpec, RowParallelPloraLinear, silu_and_mul_of
from wemm.layers.rotary_embedding import rotary_angles
from wemm.model.batch import Batch
from wemm.ops.add_residual import add_residual
from wemm.ops.decode_attention import decode_attention
from wemm.ops.prefill_attention import prefill_attention
from wemm.ops.rope_and_store_kv import rope_and_store_kv
from wemm.quantization import Scheme

LayerPlora = dict[str, PloraSpec | None]
"""PLoRA of one layer's linears, by the names of PLORA_LINEARS."""


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(
        self, config: TextConfig, plora: LayerPlora, tensor_parallel: TensorParallel, scheme: Scheme | None
    ) -> None:
        super().__init__()
        self._num_kv_heads = tensor_parallel.length(config.num_key_value_heads)
        self._group = config.num_attention_heads // config.num_key_value_heads
        self._head_dim = config.head_dim
        # Packed per KV head: its query heads, then its key, then its value; so equal row ranges
        # are whole groups and ranks cut it like any column-parallel weight.
        self.wqkv = ColumnParallelPloraLinear(
            config.hidden_size, config.wqkv_out, plora["attention.wqkv"], tensor_parallel, scheme
        )
        self.wo = RowParallelPloraLinear(
            config.hidden_size, config.hidden_size, plora["attention.wo"], tensor_parallel, scheme
        )

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """x: [num_tokens, hidden_size], kv_cache: one layer of WemmModel.kv_cache_shape."""
        qkv = self.wqkv(x, batch.image_rows).view(-1, self._num_kv_heads, self._group + 2, self._head_dim)
        query, _, _ = rope_and_store_kv(qkv, cos, sin, kv_cache[0], kv_cache[1], batch.slot_mapping)
        return self.wo(self._attend(query, batch, kv_cache).flatten(1), batch.image_rows)

    def _attend(self, query: torch.Tensor, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        keys, values, tables, seq_lens = kv_cache[0], kv_cache[1], batch.block_tables, batch.seq_lens
        n, scale, parts = batch.num_decodes, self._head_dim**-0.5, []
        if n:
            parts.append(decode_attention(query[:n], keys, values, tables[:n], seq_lens[:n], scale))
        if batch.cu_seqlens_q is not None:
            chunks = tables[n:], batch.cu_seqlens_q, seq_lens[n:]
            parts.append(prefill_attention(query[n:], keys, values, *chunks, scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(
        self, config: TextConfig, plora: LayerPlora, tensor_parallel: TensorParallel, scheme: Scheme | None
    ) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        shared = tensor_parallel, scheme
        self.w1 = ColumnParallelPloraLinear(hidden, intermediate, plora["feed_forward.w1"], *shared)
        self.w3 = ColumnParallelPloraLinear(hidden, intermediate, plora["feed_forward.w3"], *shared)
        self.w2 = RowParallelPloraLinear(intermediate, hidden, plora["feed_forward.w2"], *shared)

    def forward(self, x: torch.Tensor, image_rows: torch.Tensor | None) -> torch.Tensor:
        """[num_tokens, hidden_size] → same."""
        return self.w2(silu_and_mul_of(self.w1, self.w3, x, image_rows), image_rows)


class DecoderLayer(nn.Module):
    """Pre-norm block."""

    def __init__(
        self, config: TextConfig, plora: LayerPlora, tensor_parallel: TensorParallel, scheme: Scheme | None
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, plora, tensor_parallel, scheme)
        self.ffn_norm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config, plora, tensor_parallel, scheme)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] → same."""
        attended = self.attention(self.attention_norm(x), cos, sin, batch, kv_cache)
        normed, x = self.ffn_norm(attended, x)
        return add_residual(self.feed_forward(normed, batch.image_rows), x)


class InternLM2(nn.Module):
    """Embeddings → hidden states → logits."""

    def __init__(
        self,
        config: TextConfig,
        plora: PloraConfig | None,
        tensor_parallel: TensorParallel,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, _layer_plora(plora, i), tensor_parallel, scheme)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = ColumnParallelLinear(config.hidden_size, config.vocab_size, tensor_parallel, gather=True)

    def forward(self, x: torch.Tensor, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Embeddings [num_tokens, hidden_size] → normed hidden states of batch.logits_rows.

        kv_cache: WemmModel.kv_cache_shape, written in place.
        """
        x = self.run_layers(x, *self.angles(batch.positions), batch, kv_cache)
        return self.norm(x[batch.logits_rows])

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rotary embedding, float32 [num_tokens, head_dim/2]."""
        return rotary_angles(positions, self._config)

    def run_layers(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] → same, all of them."""
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, batch, kv_cache[i])
        return x


def _layer_plora(plora: PloraConfig | None, layer: int) -> LayerPlora:
    if plora is None:
        return dict.fromkeys(PLORA_LINEARS)
    names = {linear: plora_linear_name(layer, linear) for linear in PLORA_LINEARS}
    return {linear: PloraSpec(plora.rank(name), plora.scaling(name)) for linear, name in names.items()}
