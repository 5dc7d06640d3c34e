// ops/prefill_attention.py: each new token attends to its sequence up to itself, over the paged cache.

#include <vector>

#include "flash_attention.h"
#include "kernels.h"

namespace wemm {
namespace {

struct Cache {
  const bfloat16* keys;
  const bfloat16* values;
  std::int64_t block_size, num_kv_heads, head_dim;

  std::int64_t at(const std::vector<std::int64_t>& blocks, std::int64_t position, std::int64_t head) const {
    return ((blocks[position / block_size] * block_size + position % block_size) * num_kv_heads + head) * head_dim;
  }
};

}  // namespace

void prefill_attention(const TensorArgument& query_argument, const TensorArgument& key_argument,
                       const TensorArgument& value_argument, const std::vector<std::vector<std::int64_t>>& tables,
                       const std::vector<std::int64_t>& bounds, const std::vector<std::int64_t>& seq_lens, float scale,
                       const TensorArgument& out_argument) {
  const Tensor query(query_argument), key(key_argument), value(value_argument), out(out_argument);
  Contract contract("prefill_attention");
  contract.expect("query", query, {"num_tokens", "num_heads", "head_dim"})
      .expect("key_cache", key, {"num_blocks", "block_size", "num_kv_heads", "head_dim"})
      .expect("value_cache", value, {"num_blocks", "block_size", "num_kv_heads", "head_dim"})
      .expect("out", out, {"num_tokens", "num_heads", "head_dim"})
      .same_dtype({&query, &key, &value, &out});
  const std::int64_t num_heads = contract["num_heads"], num_kv_heads = contract["num_kv_heads"];
  const int head_dim = static_cast<int>(contract["head_dim"]);
  contract.require(query.dtype == DType::bfloat16, "takes bfloat16");
  contract.require(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "takes an even head_dim up to 256");
  contract.require(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "needs query heads in whole groups");
  contract.require(scale >= 0, "takes no negative scale");
  contract.require_bounds("cu_seqlens_q", bounds, contract["num_tokens"]);
  contract.require_blocks(tables, seq_lens, static_cast<std::int64_t>(bounds.size()) - 1, contract["block_size"],
                          contract["num_blocks"]);
  const Cache cache{key.data<bfloat16>(), value.data<bfloat16>(), contract["block_size"], num_kv_heads, head_dim};
  const std::int64_t group = num_heads / num_kv_heads;

  for (std::size_t s = 0; s < tables.size(); ++s) {
    const std::int64_t first = bounds[s], num_new = bounds[s + 1] - first, seq_len = seq_lens[s];
    contract.require(num_new <= seq_len, "needs at most seq_lens new tokens");
    // The query heads of a group attend to the same keys: token by token they are the queries of one KV head.
    flash_attention(
        {seq_len, head_dim}, num_kv_heads, num_new * group, scale,
        [&](std::int64_t h, std::int64_t i) {
          const std::int64_t at = cache.at(tables[s], i, h);
          return KeyValue{cache.keys + at, cache.values + at};
        },
        [&](std::int64_t h, std::int64_t i) {
          const std::int64_t token = i / group;
          const std::int64_t at = ((first + token) * num_heads + h * group + i % group) * head_dim;
          return Query{query.data<bfloat16>() + at, out.data<bfloat16>() + at, seq_len - num_new + token + 1};
        });
  }
}

}  // namespace wemm
