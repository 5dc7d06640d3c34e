// ops/prefill_attention.py: each new token attends to its sequence up to itself, over the paged cache.

#include <cstring>
#include <vector>

#include "flash_attention.h"
#include "kernels.h"

namespace wemm {
namespace {

// Keys or values, of bfloat16 or int8 (quantization.py: quantize_kv).
struct Cache {
  const Tensor& tensor;
  std::int64_t block_size, num_kv_heads, width;

  // The row of one position and head; `wide`: where one of int8 becomes bfloat16.
  const bfloat16* row(const std::vector<std::int64_t>& blocks, std::int64_t position, std::int64_t head,
                      std::int64_t head_dim, bfloat16* wide) const {
    const std::int64_t slot = blocks[position / block_size] * block_size + position % block_size;
    const std::int64_t at = (slot * num_kv_heads + head) * width;
    if (tensor.dtype == DType::bfloat16) return tensor.data<bfloat16>() + at;
    const std::int8_t* integers = tensor.data<std::int8_t>() + at;
    float scale;
    std::memcpy(&scale, integers + head_dim, sizeof scale);
    for (std::int64_t d = 0; d < head_dim; ++d) wide[d] = from_float<bfloat16>(integers[d] * scale);
    return wide;
  }
};

}  // namespace

void prefill_attention(const TensorArgument& query_argument, const TensorArgument& key_argument,
                       const TensorArgument& value_argument, const std::vector<std::vector<std::int64_t>>& tables,
                       const std::vector<std::int64_t>& bounds, const std::vector<std::int64_t>& seq_lens, float scale,
                       const TensorArgument& out_argument) {
  const Tensor query(query_argument), key(key_argument), value(value_argument), out(out_argument);
  const bool quantized = key.dtype == DType::int8;
  const DType stored = quantized ? DType::int8 : query.dtype;
  Contract contract("prefill_attention");
  contract.expect("query", query, {"num_tokens", "num_heads", "head_dim"})
      .expect("key_cache", key, {"num_blocks", "block_size", "num_kv_heads", "width"}, stored)
      .expect("value_cache", value, {"num_blocks", "block_size", "num_kv_heads", "width"}, stored)
      .expect("out", out, {"num_tokens", "num_heads", "head_dim"}, query.dtype);
  const std::int64_t num_heads = contract["num_heads"], num_kv_heads = contract["num_kv_heads"];
  const int head_dim = static_cast<int>(contract["head_dim"]);
  contract.require(query.dtype == DType::bfloat16, "takes bfloat16");
  contract.require(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "takes an even head_dim up to 256");
  const std::int64_t width = head_dim + (quantized ? static_cast<std::int64_t>(sizeof(float)) : 0);
  contract.require(contract["width"] == width, "needs heads of the cache as wide as those of the queries");
  contract.require(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "needs query heads in whole groups");
  contract.require(scale >= 0, "takes no negative scale");
  contract.require_bounds("cu_seqlens_q", bounds, contract["num_tokens"]);
  contract.require_blocks(tables, seq_lens, static_cast<std::int64_t>(bounds.size()) - 1, contract["block_size"],
                          contract["num_blocks"]);
  const Cache keys{key, contract["block_size"], num_kv_heads, width};
  const Cache values{value, contract["block_size"], num_kv_heads, width};
  const std::int64_t packed_at_once = flash_family().key_block;
  const std::int64_t group = num_heads / num_kv_heads;

  for (std::size_t s = 0; s < tables.size(); ++s) {
    const std::int64_t first = bounds[s], num_new = bounds[s + 1] - first, seq_len = seq_lens[s];
    contract.require(num_new <= seq_len, "needs at most seq_lens new tokens");
    // The query heads of a group attend to the same keys: token by token they are the queries of one KV head.
    flash_attention(
        {seq_len, head_dim}, num_kv_heads, num_new * group, scale,
        [&](std::int64_t h, std::int64_t i) {
          // As many as are packed at once have a place of their own.
          thread_local std::vector<bfloat16> wide;
          if (quantized) wide.resize(2 * packed_at_once * head_dim);
          bfloat16* place = wide.data() + 2 * (i % packed_at_once) * head_dim;
          return KeyValue{keys.row(tables[s], i, h, head_dim, place),
                          values.row(tables[s], i, h, head_dim, place + head_dim)};
        },
        [&](std::int64_t h, std::int64_t i) {
          const std::int64_t token = i / group;
          const std::int64_t at = ((first + token) * num_heads + h * group + i % group) * head_dim;
          return Query{query.data<bfloat16>() + at, out.data<bfloat16>() + at, seq_len - num_new + token + 1};
        });
  }
}

}  // namespace wemm
