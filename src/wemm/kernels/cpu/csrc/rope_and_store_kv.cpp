// ops/rope_and_store_kv.py: one pass over the packed projection. Queries and keys are turned in float32, without fused
// multiply-add (CMakeLists.txt) as the definition does it; keys and values go where they will be read.

#ifndef WEMM_COMPILING_FOR_ISA

#include <type_traits>
#include <vector>

#define WEMM_THIS_FILE "rope_and_store_kv.cpp"
#include "foreach_isa.h"
#include "kernels.h"
#include "quantize_rows.h"

namespace wemm {
namespace {

// quantization.py: quantize_kv.
template <typename T>
void store_int8(const T* row, std::int64_t head_dim, std::int8_t* cache) {
  float scale;
  quantize_rows(row, 1, head_dim, head_dim, cache, &scale);
  std::memcpy(cache + head_dim, &scale, sizeof scale);
}

// Cache: T or int8. `width`: its elements per head.
template <typename T, typename Cache>
void run(const Tensor& qkv, const float* cos, const float* sin, const std::int64_t* slots, Cache* keys, Cache* values,
         std::int64_t width, T* out) {
  const std::int64_t tokens = qkv.shape[0], heads = qkv.shape[1], group = qkv.shape[2] - 2, head_dim = qkv.shape[3];
  const std::int64_t half = head_dim / 2;
  const auto rotate = WEMM_BEST(rotate_head<T, T>);
  const auto widen = WEMM_BEST(rotate_head<T, float>);
#pragma omp parallel if (tokens > 1)
  {
    std::vector<float> wide(head_dim);
#pragma omp for schedule(static)
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float *c = cos + t * half, *s = sin + t * half;
      for (std::int64_t h = 0; h < heads; ++h) {
        const T* packed = qkv.data<T>() + (t * heads + h) * (group + 2) * head_dim;
        for (std::int64_t g = 0; g < group; ++g) {
          rotate(packed + g * head_dim, c, s, half, out + ((t * heads + h) * group + g) * head_dim);
        }
        const T *key = packed + group * head_dim, *value = key + head_dim;
        const std::int64_t at = (slots[t] * heads + h) * width;
        if constexpr (std::is_same_v<Cache, std::int8_t>) {
          widen(key, c, s, half, wide.data());
          store_int8(wide.data(), head_dim, keys + at);
          store_int8(value, head_dim, values + at);
        } else {
          rotate(key, c, s, half, keys + at);
          std::memcpy(values + at, value, sizeof(T) * head_dim);
        }
      }
    }
  }
}

}  // namespace

void rope_and_store_kv(const TensorArgument& qkv_argument, const TensorArgument& cos_argument,
                       const TensorArgument& sin_argument, const TensorArgument& key_cache_argument,
                       const TensorArgument& value_cache_argument, const TensorArgument& slots_argument,
                       const TensorArgument& out_argument) {
  const Tensor qkv(qkv_argument), cos(cos_argument), sin(sin_argument), out(out_argument);
  const Tensor keys(key_cache_argument), values(value_cache_argument), slots(slots_argument);
  const bool quantized = keys.dtype == DType::int8;
  const DType stored = quantized ? DType::int8 : qkv.dtype;
  Contract contract("rope_and_store_kv");
  contract.expect("qkv", qkv, {"num_tokens", "num_kv_heads", "group + 2", "head_dim"})
      .expect("cos", cos, {"num_tokens", "half"}, DType::float32)
      .expect("sin", sin, {"num_tokens", "half"}, DType::float32)
      .expect("key_cache", keys, {"num_blocks", "block_size", "num_kv_heads", "width"}, stored)
      .expect("value_cache", values, {"num_blocks", "block_size", "num_kv_heads", "width"}, stored)
      .expect("slot_mapping", slots, {"num_tokens"}, DType::int64)
      .expect("out", out, {"num_tokens", "num_heads", "head_dim"}, qkv.dtype);
  const std::int64_t group = contract["group + 2"] - 2, head_dim = contract["head_dim"], width = contract["width"];
  contract.require(group >= 0 && contract["num_heads"] == group * contract["num_kv_heads"], "needs a result per query");
  contract.require(head_dim == 2 * contract["half"], "needs an angle per pair of a head");
  contract.require(width == head_dim + (quantized ? static_cast<std::int64_t>(sizeof(float)) : 0),
                   "needs heads of the cache as wide as those given");
  for (std::int64_t t = 0; t < contract["num_tokens"]; ++t) {
    const std::int64_t slot = slots.data<std::int64_t>()[t];
    contract.require(slot >= 0 && slot < contract["num_blocks"] * contract["block_size"], "needs slots of the cache");
  }
  with_dtype(qkv.dtype, [&](auto element) {
    using T = decltype(element);
    const auto with_cache = [&](auto cached) {
      using Cache = decltype(cached);
      run<T, Cache>(qkv, cos.data<float>(), sin.data<float>(), slots.data<std::int64_t>(), keys.data<Cache>(), values.data<Cache>(), width,
                    out.data<T>());
    };
    quantized ? with_cache(std::int8_t()) : with_cache(T());
  });
}

}  // namespace wemm

#else

template <typename T, typename Out>
void rotate_head(const T* x, const float* cos, const float* sin, std::int64_t half, Out* out) {
  for (std::int64_t i = 0; i < half; i += kLanes) {
    const std::int64_t count = half - i;
    const Floats first = load(x + i, count), second = load(x + half + i, count);
    const Floats c = load(cos + i, count), s = load(sin + i, count);
    store(first * c - second * s, out + i, count);
    store(second * c + first * s, out + half + i, count);
  }
}

#endif
