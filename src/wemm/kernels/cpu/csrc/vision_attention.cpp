// ops/vision_attention.py: every patch attends to all patches of its image.

#include <algorithm>
#include <utility>
#include <vector>

#include "flash_attention.h"
#include "kernels.h"

namespace wemm {

void vision_attention(const TensorArgument& query_argument, const TensorArgument& key_argument,
                      const TensorArgument& value_argument, const std::vector<std::int64_t>& bounds, float scale,
                      const TensorArgument& out_argument) {
  const Tensor query(query_argument), key(key_argument), value(value_argument), out(out_argument);
  Contract contract("vision_attention");
  for (const auto& [name, tensor] : {std::pair{"query", &query}, {"key", &key}, {"value", &value}, {"out", &out}}) {
    contract.expect(name, *tensor, {"num_patches", "num_heads", "head_dim"});
  }
  contract.same_dtype({&query, &key, &value, &out});
  const std::int64_t num_heads = contract["num_heads"], row = num_heads * contract["head_dim"];
  const int head_dim = static_cast<int>(contract["head_dim"]);
  contract.require(query.dtype == DType::bfloat16, "takes bfloat16");
  contract.require(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "takes an even head_dim up to 256");
  contract.require_bounds("cu_seqlens", bounds, contract["num_patches"]);

  for (std::size_t image = 0; image + 1 < bounds.size(); ++image) {
    const std::int64_t first = bounds[image], num_keys = bounds[image + 1] - first;
    if (num_keys == 0) continue;
    const std::int64_t padded = (num_keys + 1) / 2 * 2, num_blocks = (num_keys + kQueryBlock - 1) / kQueryBlock;
    std::vector<bfloat16> keys(num_heads * num_keys * head_dim), values_t(num_heads * head_dim * padded);
#pragma omp parallel
    {
      std::vector<float> scratch = flash_scratch(head_dim);
      std::vector<Query> queries(kQueryBlock);
#pragma omp for schedule(static)
      for (std::int64_t h = 0; h < num_heads; ++h) {
        for (std::int64_t i = 0; i < num_keys; ++i) {
          const std::int64_t at = (first + i) * row + h * head_dim;
          pack_row(key.data<bfloat16>() + at, value.data<bfloat16>() + at, i, padded, head_dim,
                   keys.data() + h * num_keys * head_dim, values_t.data() + h * head_dim * padded);
        }
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t job = 0; job < num_heads * num_blocks; ++job) {
        const std::int64_t h = job / num_blocks, start = job % num_blocks * kQueryBlock;
        const int count = static_cast<int>(std::min<std::int64_t>(kQueryBlock, num_keys - start));
        for (int q = 0; q < count; ++q) {
          const std::int64_t at = (first + start + q) * row + h * head_dim;
          queries[q] = {query.data<bfloat16>() + at, out.data<bfloat16>() + at, num_keys};
        }
        flash_attention({keys.data() + h * num_keys * head_dim, values_t.data() + h * head_dim * padded, num_keys,
                         padded, head_dim},
                        queries.data(), count, scale, scratch.data());
      }
    }
  }
}

}  // namespace wemm
