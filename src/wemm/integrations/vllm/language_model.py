"""InternLM2 from vLLM's layers, PLoRA beside each linear."""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention as VllmAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import make_layers
from vllm.sequence import IntermediateTensors

from wemm.checkpoint.weight_map import plora_linear_name
from wemm.config import PLORA_LINEARS, PloraConfig, TextConfig
from wemm.integrations.vllm.hub_config import cache_head_dim, rope_parameters
from wemm.integrations.vllm.plora import PloraFactors, tensor_parallel
from wemm.layers.plora import PloraSpec

LayerPlora = dict[str, PloraSpec]
"""PLoRA of one layer's linears, by the names of PLORA_LINEARS."""


class Attention(nn.Module):
    """Grouped-query attention over vLLM's cache."""

    def __init__(
        self,
        config: TextConfig,
        plora: LayerPlora,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks = tensor_parallel()
        num_heads, num_kv_heads = (
            ranks.length(config.num_attention_heads),
            ranks.length(config.num_key_value_heads),
        )
        head_dim, hidden = config.head_dim, config.hidden_size
        self._head_dim, self._padding = head_dim, cache_head_dim(config) - head_dim
        self._sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.wqkv = QKVParallelLinear(
            hidden, head_dim, config.num_attention_heads, config.num_key_value_heads,
            bias=False, quant_config=quant_config, prefix=f"{prefix}.wqkv", return_bias=False,
        )  # fmt: skip
        self.wqkv_plora = PloraFactors(hidden, [(sum(self._sizes), plora["attention.wqkv"])])
        self.wo = RowParallelLinear(
            hidden, hidden, bias=False, reduce_results=False,
            quant_config=quant_config, prefix=f"{prefix}.wo", return_bias=False,
        )  # fmt: skip
        self.wo_plora = PloraFactors(self._sizes[0], [(hidden, plora["attention.wo"])])
        self.rotary = get_rope(head_dim, config.max_position_embeddings, rope_parameters=rope_parameters(config))
        self.attention = VllmAttention(
            num_heads, cache_head_dim(config), head_dim**-0.5, num_kv_heads=num_kv_heads,
            cache_config=cache_config, quant_config=quant_config, prefix=f"{prefix}.attention",
        )  # fmt: skip

    def forward(self, positions: torch.Tensor, x: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] → same."""
        qkv = self.wqkv_plora(self.wqkv(x), x, is_image)
        query, key, value = qkv.split(self._sizes, -1)
        query, key = self.rotary(positions, query, key)
        heads = self._attend(query, key, value)
        # Both are partial sums over ranks: one reduction completes base and update together.
        return tensor_model_parallel_all_reduce(self.wo_plora(self.wo(heads), heads, is_image))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not self._padding:
            return self.attention(query, key, value)
        # Zeros change neither a score nor, cut off again, a result.
        wide = (F.pad(x.unflatten(-1, (-1, self._head_dim)), (0, self._padding)) for x in (query, key, value))
        heads = self.attention(*(x.flatten(1) for x in wide))
        return heads.unflatten(-1, (-1, self._head_dim + self._padding))[..., : self._head_dim].flatten(1)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(
        self, config: TextConfig, plora: LayerPlora, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        share = tensor_parallel().length(intermediate)
        self.w13 = MergedColumnParallelLinear(
            hidden, [intermediate] * 2, bias=False,
            quant_config=quant_config, prefix=f"{prefix}.w13", return_bias=False,
        )  # fmt: skip
        self.w13_plora = PloraFactors(
            hidden, [(share, plora["feed_forward.w1"]), (share, plora["feed_forward.w3"])]
        )
        self.w2 = RowParallelLinear(
            intermediate, hidden, bias=False, reduce_results=False,
            quant_config=quant_config, prefix=f"{prefix}.w2", return_bias=False,
        )  # fmt: skip
        self.w2_plora = PloraFactors(share, [(hidden, plora["feed_forward.w2"])])
        self.activation = SiluAndMul()

    def forward(self, x: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] → same."""
        inner = self.activation(self.w13_plora(self.w13(x), x, is_image))
        return tensor_model_parallel_all_reduce(self.w2_plora(self.w2(inner), inner, is_image))


class DecoderLayer(nn.Module):
    """Pre-norm block; norms add the residual, as vLLM's do."""

    def __init__(
        self,
        config: TextConfig,
        plora: LayerPlora,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config, plora, cache_config, quant_config, f"{prefix}.attention")
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = FeedForward(config, plora, quant_config, f"{prefix}.feed_forward")

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, is_image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, hidden_size] and what is still to be added to it → the same two."""
        if residual is None:
            residual = x
            x = self.attention_norm(x)
        else:
            x, residual = self.attention_norm(x, residual)
        x = self.attention(positions, x, is_image)
        x, residual = self.ffn_norm(x, residual)
        return self.feed_forward(x, is_image), residual


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class InternLM2(nn.Module):
    """Token ids and embeddings → normed hidden states of one pipeline stage."""

    def __init__(
        self, *, vllm_config: VllmConfig, config: TextConfig, plora: PloraConfig, image_token_id: int, prefix: str
    ) -> None:
        super().__init__()
        self._image_token_id = image_token_id
        self.hidden_size = config.hidden_size
        # One row more than the checkpoint has: the image token's, of zeros.
        self.tok_embeddings = VocabParallelEmbedding(image_token_id + 1, config.hidden_size)

        def layer(prefix: str) -> DecoderLayer:
            index = int(prefix.rsplit(".", 1)[1])
            names = {linear: plora_linear_name(index, linear) for linear in PLORA_LINEARS}
            specs = {linear: PloraSpec(plora.rank(name), plora.scaling(name)) for linear, name in names.items()}
            return DecoderLayer(config, specs, vllm_config.cache_config, vllm_config.quant_config, prefix)

        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, layer, prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = ParallelLMHead(image_token_id + 1, config.hidden_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] → [num_tokens, hidden_size], zeros for image tokens."""
        return self.tok_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """→ [num_tokens, hidden_size], or what the next stage needs: which rows are images' travels along."""
        if get_pp_group().is_first_rank:
            assert input_ids is not None
            is_image = input_ids == self._image_token_id
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            is_image = intermediate_tensors["is_image"] != 0
            x, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = layer(positions, x, residual, is_image)
        if not get_pp_group().is_last_rank:
            stage = {"hidden_states": x, "residual": residual, "is_image": is_image.to(torch.uint8)}
            return IntermediateTensors(stage)
        x, _ = self.norm(x, residual)
        return x

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a stage sends, for vLLM to receive into."""
        wide = (batch_size, self.hidden_size)
        return IntermediateTensors(
            {
                "hidden_states": torch.zeros(wide, dtype=dtype, device=device),
                "residual": torch.zeros(wide, dtype=dtype, device=device),
                "is_image": torch.zeros(batch_size, dtype=torch.uint8, device=device),
            }
        )
