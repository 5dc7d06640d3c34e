// ops/vision_attention.py: every patch attends to all patches of its image.

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
  const std::int64_t num_heads = contract["num_heads"];
  const int head_dim = static_cast<int>(contract["head_dim"]);
  contract.require(query.dtype == DType::bfloat16, "takes bfloat16");
  contract.require(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "takes an even head_dim up to 256");
  contract.require(scale >= 0, "takes no negative scale");
  contract.require_bounds("cu_seqlens", bounds, contract["num_patches"]);

  for (std::size_t image = 0; image + 1 < bounds.size(); ++image) {
    const std::int64_t first = bounds[image], num_keys = bounds[image + 1] - first;
    const auto at = [&](std::int64_t h, std::int64_t i) { return ((first + i) * num_heads + h) * head_dim; };
    flash_attention(
        {num_keys, head_dim}, num_heads, num_keys, scale,
        [&](std::int64_t h, std::int64_t i) {
          return KeyValue{key.data<bfloat16>() + at(h, i), value.data<bfloat16>() + at(h, i)};
        },
        [&](std::int64_t h, std::int64_t i) {
          return Query{query.data<bfloat16>() + at(h, i), out.data<bfloat16>() + at(h, i), num_keys};
        });
  }
}

}  // namespace wemm
