// ops/prefill_attention.py: each new token attends to its sequence up to itself, over the paged cache.

#include <algorithm>
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
  contract.require_bounds("cu_seqlens_q", bounds, contract["num_tokens"]);
  contract.require_blocks(tables, seq_lens, static_cast<std::int64_t>(bounds.size()) - 1, contract["block_size"],
                          contract["num_blocks"]);
  const Cache cache{key.data<bfloat16>(), value.data<bfloat16>(), contract["block_size"], num_kv_heads, head_dim};
  const std::int64_t group = num_heads / num_kv_heads;

  for (std::size_t s = 0; s < tables.size(); ++s) {
    const std::int64_t first = bounds[s], num_new = bounds[s + 1] - first, seq_len = seq_lens[s];
    contract.require(num_new <= seq_len, "needs at most seq_lens new tokens");
    if (num_new == 0) continue;
    const std::int64_t padded = (seq_len + 1) / 2 * 2, num_rows = num_new * group;
    const std::int64_t num_jobs = (num_rows + kQueryBlock - 1) / kQueryBlock;
    std::vector<bfloat16> keys(num_kv_heads * seq_len * head_dim), values_t(num_kv_heads * head_dim * padded);
#pragma omp parallel
    {
      std::vector<float> scratch = flash_scratch(head_dim);
      std::vector<Query> queries(kQueryBlock);
#pragma omp for schedule(static)
      for (std::int64_t h = 0; h < num_kv_heads; ++h) {
        for (std::int64_t i = 0; i < seq_len; ++i) {
          const std::int64_t at = cache.at(tables[s], i, h);
          pack_row(cache.keys + at, cache.values + at, i, padded, head_dim, keys.data() + h * seq_len * head_dim,
                   values_t.data() + h * head_dim * padded);
        }
      }
      // The last rows see most keys: they go first.
#pragma omp for schedule(dynamic)
      for (std::int64_t job = 0; job < num_kv_heads * num_jobs; ++job) {
        const std::int64_t h = job % num_kv_heads, start = (num_jobs - 1 - job / num_kv_heads) * kQueryBlock;
        const int count = static_cast<int>(std::min<std::int64_t>(kQueryBlock, num_rows - start));
        for (int q = 0; q < count; ++q) {
          const std::int64_t token = (start + q) / group, head = h * group + (start + q) % group;
          const std::int64_t at = ((first + token) * num_heads + head) * head_dim;
          queries[q] = {query.data<bfloat16>() + at, out.data<bfloat16>() + at, seq_len - num_new + token + 1};
        }
        flash_attention({keys.data() + h * seq_len * head_dim, values_t.data() + h * head_dim * padded, seq_len,
                         padded, head_dim},
                        queries.data(), count, scale, scratch.data());
      }
    }
  }
}

}  // namespace wemm
