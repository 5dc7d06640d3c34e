// Every kernel of the extension, as bound in module.cpp.
#pragma once

#include <optional>
#include <vector>

#include "tensor.h"

namespace wemm {

void rms_norm(const TensorArgument& x, const TensorArgument& weight, float eps, const TensorArgument& out);

void layer_norm(const TensorArgument& x, const TensorArgument& weight, const TensorArgument& bias, float eps,
                const TensorArgument& out);

void silu_and_mul(const TensorArgument& gate, const TensorArgument& up, const TensorArgument& out);

void rope_and_store_kv(const TensorArgument& qkv, const TensorArgument& cos, const TensorArgument& sin,
                       const TensorArgument& key_cache, const TensorArgument& value_cache,
                       const TensorArgument& slot_mapping, const TensorArgument& out);

// In place.
void add_residual(const TensorArgument& y, const TensorArgument& x);

// Tokens that share a pass over the weight.
constexpr std::int64_t kMaxGemvTokens = 4;

void linear(const TensorArgument& x, const TensorArgument& weight, const std::optional<TensorArgument>& bias,
            const TensorArgument& out);

// In place.
void add_bias_gelu(const TensorArgument& x, const TensorArgument& bias);

// Without AVX-512 VNNI at most 8 tokens.
void linear_int8(const TensorArgument& x, const TensorArgument& weight, const TensorArgument& scale,
                 const std::optional<TensorArgument>& bias, const TensorArgument& out);
void linear_int8_gelu(const TensorArgument& x, const TensorArgument& weight, const TensorArgument& scale,
                      const TensorArgument& bias, const TensorArgument& out);
// weight, scale: quantization.py, Int4.
void linear_int4(const TensorArgument& x, const TensorArgument& weight, const TensorArgument& scale,
                 const std::optional<TensorArgument>& bias, const TensorArgument& out);

// bounds: cu_seqlens.
void vision_attention(const TensorArgument& query, const TensorArgument& key, const TensorArgument& value,
                      const std::vector<std::int64_t>& bounds, float scale, const TensorArgument& out);

// Caches, here and below: of the dtype of the queries, or int8 (quantization.py: quantize_kv).
// tables, bounds, seq_lens: block_tables, cu_seqlens_q, seq_lens of the sequences.
void prefill_attention(const TensorArgument& query, const TensorArgument& key_cache, const TensorArgument& value_cache,
                       const std::vector<std::vector<std::int64_t>>& tables, const std::vector<std::int64_t>& bounds,
                       const std::vector<std::int64_t>& seq_lens, float scale, const TensorArgument& out);

void decode_attention(const TensorArgument& query, const TensorArgument& key_cache, const TensorArgument& value_cache,
                      const TensorArgument& block_tables, const TensorArgument& seq_lens, float scale,
                      const TensorArgument& out);

}  // namespace wemm
